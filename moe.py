"""A mixture of experts: a gating network learns how to weight three frozen networks, image by image.

    python moe.py --seed 1 2 3                                # on CINIC-10; trains missing experts first
    python moe.py --data path/to/folder --fraction 0.25 --epochs 3
    python moe.py --train-adapters --adapter-width 512 --animals all    # trained as two bases, sized as three

The experts are custom networks with hybrid augmentation and dropout 0.2, the best on the slides: one trained
on all classes (the base), one on vehicles, one on animals; two more bases with other seeds for comparison.
Those that `train.py` left in --out are reused, others trained first: five for seed 1, nine for seeds 1 2 3.
"""

import torch
from tabulate import tabulate
from torch.nn import functional as F

import data
import models
import runs
import train

EXPERT = {"aug": "hybrid", "dropout": 0.2}  # the slides leave the experts' recipe open: this is their best
SHARED = ("data", "root", "fraction", "epochs", "batch_size", "device", "amp", "graph", "out",
          "checkpoint_every")  # fmt: skip
ENSEMBLE = (1, 2, 3)  # seeds of the base networks whose softmaxes are averaged for comparison
# Keys of a result file and their row labels in tables
ROWS = {
    "test": "mixture",
    "base": "base network",
    "pair": "ensemble of two bases",
    "ensemble": "ensemble of three bases",
}
BATCH = 256  # images evaluated at a time, from their features
TRUNK = 4096  # features of a custom network's trunk


def specialties(args):
    """The classes of each expert, as a --classes value; None means all."""
    return (None, "vehicles", "animals" if args.animals == "all" else args.animals)


def expert(args, seed, classes=None):
    """A frozen custom network in eval mode, trained by `train.py`, now if its result is missing."""
    settings, shared = train.make_parser().parse_args([]), {name: getattr(args, name) for name in SHARED}
    vars(settings).update(shared, **EXPERT, seed=[seed], classes=classes)
    train.check_arguments(settings)
    folder, _ = runs.run_seeds(settings, train.run_name, train.load, train.train)
    return models.load(folder / f"seed{seed}.pt").requires_grad_(False)


@torch.no_grad()
def features(run, networks, model, split):
    """A Split of the experts' features of every image, (N, experts, width), or (N, experts, 4096) to train
    adapters, in the compute dtype, on the device if it fits. Computed once: experts are frozen, and the gating
    network is trained on images without augmentation.
    """
    autocast, _ = train.mixed_precision(run)
    width = TRUNK if run.args.train_adapters else run.args.adapter_width
    seen, start = torch.empty(len(split.labels), len(networks), width, dtype=run.dtype), 0
    for images, _ in train.evaluation_batches(run, split):
        with autocast:
            trunks = torch.stack([network.features(images).flatten(1) for network in networks], 1)
        adapted = trunks if run.args.train_adapters else model.adapt(trunks.float())
        seen[start : start + len(images)] = adapted
        start += len(images)
    return data.to_device(data.Split(seen, split.labels.cpu()), run.device)


def feature_batches(split, plan, device):
    """Yield (features, labels) on the device. split: data.Split of features; plan: from `data.plan`."""
    order, sizes = plan
    for rows in data.upload(order, split.labels.device).split(sizes):
        yield data.upload(split.images[rows], device).float(), data.upload(split.labels[rows], device)


def train_gate(run):
    """Train gating network, classifier and, if asked, adapters. Returns weights and part of the result."""
    args, dataset, device, classes = run.args, run.dataset, run.device, len(run.dataset.classes)
    networks = [expert(args, run.seed, part) for part in specialties(args)]
    bases = [networks[0] if seed == run.seed else expert(args, seed) for seed in ENSEMBLE]
    for network in (*networks, *bases):
        network.to(device, memory_format=data.memory_format(device))
    compared = {"base": networks[:1], "pair": bases[:2], "ensemble": bases}
    outcome = {name: average(run, several).metrics() for name, several in compared.items()}
    torch.manual_seed(run.seed)
    model = models.MixtureOfExperts(len(networks), classes, args.train_adapters, args.adapter_width)
    model = model.to(device)
    print(f"mixture: {train.describe(model, run)}")
    seen = {name: features(run, networks, model, getattr(dataset, name)) for name in data.SPLITS}
    count = len(dataset.train.labels)

    def train_batches(epoch):
        return feature_batches(seen["train"], data.make_plan(count, args.batch_size, run.seed, epoch), device)

    def batches(name):
        return feature_batches(seen[name], data.make_plan(len(seen[name].labels), BATCH), device)

    steps = [-(-count // args.batch_size)] * args.epochs
    history = train.fit(run, model, classes, steps, train_batches, lambda: batches("valid"))
    totals = train.evaluate(run, model, batches("test"), classes)
    outcome |= {"history": history, "test": totals.metrics(), "confusion": totals.confusion.tolist()}
    outcome["gate"] = gate_by_class(model, batches("test"), classes)
    outcome["cost"] = cost(args, networks, model, dataset)
    show(dataset, outcome)
    return {"arch": "moe", "state_dict": model.state_dict()}, outcome


@torch.no_grad()
def gate_by_class(model, batches, classes):
    """Mean weight of each expert for each true class: a list (classes) of lists (experts)."""
    weights, labels = zip(*((model.weigh(model.adapt(seen)), true) for seen, true in batches), strict=True)
    weights, labels = torch.cat(weights), torch.cat(labels)
    return [weights[labels == label].mean(0).tolist() for label in range(classes)]


@torch.no_grad()
def average(run, networks):
    """Test totals of the networks' mean softmax."""
    autocast, _ = train.mixed_precision(run)
    totals = train.Totals(len(run.dataset.classes), run.device)
    for images, labels in train.evaluation_batches(run, run.dataset.test):
        with autocast:
            logits = [network(images) for network in networks]
        probabilities = torch.stack([part.float().softmax(1) for part in logits]).mean(0)
        log_probabilities = probabilities.clamp(min=1e-30).log()
        totals.count(log_probabilities, labels, F.nll_loss(log_probabilities, labels))
    return totals


def cost(args, networks, model, dataset):
    """For each of ROWS: its parameters, and its networks' training images, as a multiple of one base's. The
    gating network is not counted: it is trained on features."""
    sizes = torch.bincount(dataset.train.labels.cpu(), minlength=len(dataset.classes)).tolist()
    by_name = dict(zip(dataset.classes, sizes, strict=True))
    groups = [data.class_names(part) if part else dataset.classes for part in specialties(args)]
    seen = sum(by_name[name] for group in groups for name in group)
    base = sum(p.numel() for p in networks[0].parameters())
    parts = (model, *(network.features for network in networks))
    size = sum(p.numel() for part in parts for p in part.parameters())
    costs = {"test": {"parameters": size, "bases": seen / sum(sizes)}}
    for count, name in enumerate(("base", "pair", "ensemble"), start=1):
        costs[name] = {"parameters": count * base, "bases": count}
    return costs


def show(dataset, outcome):
    gate = zip(dataset.classes, outcome["gate"], strict=True)
    rows = [[name, *(f"{weight:.3f}" for weight in row)] for name, row in gate]
    print("\nmean weight of each expert, test split")
    print(tabulate(rows, ["true class", "base", "vehicles", "animals"], disable_numparse=True))
    rows = []
    for key, name in ROWS.items():
        measured = [f"{outcome[key][m]:.4f}" for m in train.METRICS]
        costs = outcome["cost"][key]
        rows.append([name, *measured, f"{costs['parameters']:,}", f"{costs['bases']:.1f}"])
    headers = ["test split", *train.METRICS, "parameters", "training cost, in bases"]
    print("\n" + tabulate(rows, headers, disable_numparse=True))


def load(args, device):
    """The data set; raises ValueError if it lacks the experts' classes."""
    dataset = train.load(args, device)
    for option, spec in zip(("the vehicles expert", "--animals"), specialties(args)[1:], strict=True):
        data.check_classes(dataset, option, spec)
    return dataset


def make_parser():
    parser = runs.new_parser(__doc__)
    data.add_arguments(parser, classes=False)
    group = parser.add_argument_group("mixture")
    add = group.add_argument
    add("--animals", default="cat,dog,deer,horse",
        help="classes of the animals expert, or all (default: %(default)s, which get confused)")  # fmt: skip
    add("--adapter-width", type=runs.number(int, 0, 4096), default=1280,
        help="512 makes the mixture as large as three base networks (default: %(default)s)")  # fmt: skip
    add("--train-adapters", action="store_true", help="train the layers between experts and gating network; "
        "by default they keep their random initialization, as in the authors' code. On CINIC-10 the features "
        "take 7 GB of memory in bf16 or fp16, 13 GB in float32")  # fmt: skip
    train.add_epoch_arguments(parser)
    train.add_training_arguments(parser)
    runs.add_arguments(parser)
    return parser


def parse_arguments(argv=None):
    args = make_parser().parse_args(argv)
    train.check_arguments(args)
    return args


def run_name(args, data, only=None):
    settings = {**vars(args), "data": data, "classes": only}
    return runs.run_name(("moe",), settings, vars(make_parser().parse_args([])))


def main():
    folder, results = runs.run_seeds(parse_arguments(), run_name, load, train_gate)
    train.print_results(folder.name, results)


if __name__ == "__main__":
    runs.command_line(main)
