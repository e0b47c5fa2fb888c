"""A mixture of experts: a gate learns which of three frozen networks to listen to, image by image.

    python moe.py --seed 1 2 3                                # on CINIC-10; trains the experts if they are not there
    python moe.py --data path/to/folder --fraction 0.25 --epochs 3
    python moe.py --train-adapters --adapter-width 512 --animals all    # costs two base networks, is as large as three

The experts are the custom network on hybrid augmentation with dropout 0.2, the best on the slides: one trained
on all classes (the base), one on vehicles, one on animals. They are taken from --out if `train.py` left them there.
"""

import hashlib
import io
import itertools
from pathlib import Path

import torch
from tabulate import tabulate

import data
import models
import train

EXPERT = (
    "--arch",
    "custom",
    "--aug",
    "hybrid",
    "--dropout",
    "0.2",
)  # the slides leave the experts' own recipe open
ENSEMBLE = (1, 2, 3)  # seeds of the base networks whose softmaxes are averaged for comparison
ROWS = {
    "test": "mixture",
    "base": "base alone",
    "pair": "mean of two bases",
    "ensemble": "mean of three bases",
}
BATCH = 256  # images whose features are computed at a time


def specialties(args):
    """The classes of each expert, as --classes takes them; None is all."""
    return (None, "vehicles", "animals" if args.animals == "all" else args.animals)


def trained(args, seed, classes=None):
    """A custom network with the weights of its run of `train.py`, in eval mode, frozen."""
    command = [*EXPERT, "--seed", str(seed), *(["--classes", classes] if classes else [])]
    same = ("data", "root", "fraction", "epochs", "batch_size", "device", "amp", "out", "checkpoint_every")
    for name in same:
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    settings, run = train.parse_arguments([*command, *([] if args.graph else ["--no-graph"])])
    path = Path(args.out) / run / f"seed{seed}.pt"
    for _ in range(2):
        result = train.run_seeds(settings, run, train.train)[seed]
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() == result["weights"]:
            break
        print(f"{path} is missing or damaged: the run is done again")
        settings.force = True
    weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    model = models.build("custom", num_classes=len(weights["classifier.4.bias"]), dropout=settings.dropout)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features(networks, adapters, split, dataset, device, autocast):
    """What the experts see of every image: float (N, experts, width) adapted, or (N, experts, 4096) without
    adapters. Computed once: experts are frozen, and the gate is trained on images without augmentation."""
    seen = []
    for images, _ in data.batches(split, BATCH, dataset.mean, dataset.std, device):
        with autocast:
            trunks = torch.stack([network.features(images).flatten(1) for network in networks], 1).float()
        seen.append(adapters(trunks) if adapters else trunks)
    return torch.cat(seen)


def feature_batches(inputs, labels, batch_size, seed=None, epoch=0):
    """(features, labels) in the order of `data.batches`."""
    order, bounds = data.plan(len(labels), batch_size, seed, epoch)
    order = order.to(inputs.device)
    for start, end in itertools.pairwise(bounds):
        rows = order[start:end]
        yield inputs[rows], labels[rows]


def train_gate(args, seed, dataset, device, checkpoint):
    """Train gate and classifier (and adapters, if asked). Returns weights and the run's part of a result file."""
    networks = [trained(args, seed, classes) for classes in specialties(args)]
    networks = [network.to(device, memory_format=torch.channels_last) for network in networks]
    torch.manual_seed(seed)
    classes = len(dataset.classes)
    model = models.MixtureOfExperts(len(networks), classes, args.train_adapters, args.adapter_width).to(
        device
    )
    print(f"mixture: {train.describe_model(model, args, device)}")
    autocast, _ = train.mixed_precision(args, device)
    adapters = None if args.train_adapters else model.adapt
    seen = {
        name: features(networks, adapters, getattr(dataset, name), dataset, device, autocast)
        for name in data.SPLITS
    }
    labels = {name: getattr(dataset, name).labels.to(device) for name in data.SPLITS}
    history = train.fit(
        *(model, args, seed, classes, device, checkpoint),
        counts=[len(labels["train"])] * args.epochs,
        batch_size=args.batch_size,
        train_batches=lambda epoch: feature_batches(
            seen["train"], labels["train"], args.batch_size, seed, epoch
        ),
        valid_batches=lambda: feature_batches(seen["valid"], labels["valid"], BATCH),
    )
    totals = train.Totals(classes, device)
    train.evaluate(model, autocast, feature_batches(seen["test"], labels["test"], BATCH), totals)
    outcome = {"history": history, "test": totals.metrics(), "confusion": totals.confusion.tolist()}
    outcome["gate"] = gate_by_class(model, seen["test"], labels["test"], classes)
    bases = [trained(args, seed).to(device, memory_format=torch.channels_last) for seed in ENSEMBLE]
    for name, compared in (("base", networks[:1]), ("pair", bases[:2]), ("ensemble", bases)):
        outcome[name] = average(compared, dataset, device, autocast).metrics()
    outcome["cost"] = cost(args, networks, model, dataset)
    show(dataset, outcome)
    return model.state_dict(), outcome


@torch.no_grad()
def gate_by_class(model, inputs, labels, classes):
    """Mean weight of each expert for each true class: a list (classes) of lists (experts)."""
    weights = torch.cat([model.weigh(model.adapt(part)) for part in inputs.split(BATCH)])
    return [weights[labels == label].mean(0).tolist() for label in range(classes)]


@torch.no_grad()
def average(networks, dataset, device, autocast):
    """Totals on the test split of the mean softmax of some networks."""
    totals = train.Totals(len(dataset.classes), device)
    for images, labels in data.batches(dataset.test, BATCH, dataset.mean, dataset.std, device):
        with autocast:
            logits = [network(images) for network in networks]
        chances = torch.stack([part.float().softmax(1) for part in logits]).mean(0)
        log_chances = chances.clamp(min=1e-30).log()
        totals.count(log_chances, labels, torch.nn.functional.nll_loss(log_chances, labels))
    return totals


def cost(args, networks, model, dataset):
    """Of each of ROWS: parameters, and the images that its networks are trained on, in base networks. That leaves out the
    gate, which is trained on features."""
    sizes = torch.bincount(dataset.train.labels.cpu(), minlength=len(dataset.classes)).tolist()
    groups = [data.class_names(classes or ",".join(dataset.classes)) for classes in specialties(args)]
    seen = [
        size for group in groups for name, size in zip(dataset.classes, sizes, strict=True) if name in group
    ]
    whole = [p.numel() for p in networks[0].parameters()]
    parts = [
        p.numel() for part in (model, *(network.features for network in networks)) for p in part.parameters()
    ]
    costs = {
        name: {"parameters": n * sum(whole), "bases": n}
        for name, n in (("base", 1), ("pair", 2), ("ensemble", 3))
    }
    return {"test": {"parameters": sum(parts), "bases": sum(seen) / sum(sizes)}, **costs}


def show(dataset, outcome):
    names = ["base", "vehicles", "animals"]
    rows = [
        [name, *(f"{w:.3f}" for w in row)] for name, row in zip(dataset.classes, outcome["gate"], strict=True)
    ]
    print("\nmean weight of each expert, test split")
    print(tabulate(rows, ["true class", *names], disable_numparse=True))
    rows = [
        [
            name,
            *(f"{outcome[key][m]:.4f}" for m in train.METRICS),
            f"{outcome['cost'][key]['parameters']:,}",
            f"{outcome['cost'][key]['bases']:.1f}",
        ]
        for key, name in ROWS.items()
    ]
    headers = ["test split", *train.METRICS, "parameters", "training, in bases"]
    print("\n" + tabulate(rows, headers, disable_numparse=True))


def make_parser():
    parser = data.new_parser(__doc__)
    group = parser.add_argument_group("mixture")
    group.add_argument("--animals", default="cat,dog,deer,horse", help="classes of the animals expert, or all six "
                       "(default: %(default)s, which get confused)")  # fmt: skip
    group.add_argument("--adapter-width", type=train.number(int, 0, 4096), default=1280, help="with 512 the mixture is as "
                       "large as three base networks (default: %(default)s)")  # fmt: skip
    group.add_argument("--train-adapters", action="store_true", help="let the layers between experts and gate learn; by "
                       "default they stay at their random start, as in the authors' code")  # fmt: skip
    train.add_training_arguments(parser)
    train.add_run_arguments(parser)
    return parser


def parse_arguments(argv=None):
    """The settings of a command line, and the name of its run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.classes or args.dropout:
        raise ValueError("--classes and --dropout: the mixture has all classes and dropouts of its own")
    return args, train.run_name(args, ("moe",), parser.get_default)


def main():
    train.run_seeds(*parse_arguments(), train_gate)


if __name__ == "__main__":
    data.command_line(main)
