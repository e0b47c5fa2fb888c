"""A mixture of experts: a gating network learns how to weight frozen networks, image by image.

    python moe.py --seed 1 2 3                                # on CINIC-10; trains missing experts first
    python moe.py --data path/to/folder --experts cat,dog bird,frog,horse --fraction 0.25 --epochs 3
    python moe.py --experts vehicles animals --train-adapters --adapter-width 512    # as large as three bases

The experts are custom networks with hybrid augmentation and dropout 0.2, the study's best, and otherwise the
mixture's settings: one trained on all classes (the base), one on each group of --experts. Two more bases with
other seeds are for comparison. Those that train.py left in --out are reused; the others are trained first.
"""

import torch
from tabulate import tabulate
from torch.nn import functional as F

import data
import models
import runs
import train

EXPERT = {"aug": "hybrid", "dropout": 0.2}  # the study leaves the experts' settings open: these are its best
EXPERTS = ["airplane,automobile,ship,truck", "cat,deer,dog,horse"]  # vehicles, easily confused animals
ENSEMBLE = (1, 2, 3)  # seeds of the base networks whose softmax outputs are averaged, for comparison
ROWS = {  # keys of a result file, and their labels in tables
    "test": "mixture",
    "base": "base network",
    "pair": "ensemble of two bases",
    "ensemble": "ensemble of three bases",
}


def group_name(group):
    """The name of a group of --experts in tables: `vehicles`, `animals`, or its classes joined by +."""
    known = {data.spec(classes): name for name, classes in data.GROUPS.items()}
    return known.get(group, group.replace(",", "+"))


def expert(args, seed, group=None):
    """A frozen custom network in eval mode, for a group of classes or, if None, for all, with the settings
    that train.py and args have in common. It is trained first if its result is missing."""
    settings = train.make_parser().parse_args([])
    shared = {name: value for name, value in vars(args).items() if name in settings}
    vars(settings).update(shared, **EXPERT, seed=[seed], classes=group, force=False)
    folder, _ = runs.run_seeds(settings, train.run_name, train.load, train.train)
    return models.load(folder / f"seed{seed}.pt").requires_grad_(False)


@torch.no_grad()
def features(run, networks, model, split):
    """A Split of the experts' features of every image, (N, experts, width), or (N, experts, 4096) if
    adapters are trained, in the compute dtype, on the device if it fits. Computed once: the experts are
    frozen, and the gating network is trained on images without augmentation."""
    autocast, _ = train.mixed_precision(run)
    width = 4096 if run.args.train_adapters else run.args.adapter_width
    seen, start = torch.empty(len(split.labels), len(networks), width, dtype=run.dtype), 0
    for images, _ in train.evaluation_batches(run, split):
        with autocast:
            trunks = torch.stack([network.features(images).flatten(1) for network in networks], 1)
        adapted = trunks if run.args.train_adapters else model.adapt(trunks.float())
        seen[start : start + len(images)] = adapted
        start += len(images)
    return data.to_device(data.Split(seen, split.labels.cpu()), run.device)


def feature_batches(split, device, batch_size=256, seed=None, epoch=0):
    """Yield (features, labels) on the device. split: of features; the order is that of `data.make_plan`."""
    order, sizes = data.make_plan(len(split.labels), batch_size, seed, epoch)
    for rows in data.upload(order, split.labels.device).split(sizes):
        yield data.upload(split.images[rows], device).float(), data.upload(split.labels[rows], device)


def train_gate(run):
    """Train gating network, classifier and, if asked to, adapters. Returns weights and part of the result."""
    args, dataset, device, classes = run.args, run.dataset, run.device, len(run.dataset.classes)
    networks = [expert(args, run.seed, group) for group in (None, *args.experts)]
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

    def train_batches(epoch):
        return feature_batches(seen["train"], device, args.batch_size, run.seed, epoch)

    def valid_batches():
        return feature_batches(seen["valid"], device)

    _, sizes = data.make_plan(len(dataset.train.labels), args.batch_size, run.seed)
    history = train.fit(run, model, classes, [len(sizes)] * args.epochs, train_batches, valid_batches)
    totals = train.evaluate(run, model, feature_batches(seen["test"], device), classes)
    outcome |= {"history": history, "test": totals.metrics(), "confusion": totals.confusion.tolist()}
    outcome["gate"] = gate_by_class(model, feature_batches(seen["test"], device), classes)
    show(run, outcome)
    return {"arch": "moe", "state_dict": model.state_dict()}, outcome


@torch.no_grad()
def gate_by_class(model, batches, classes):
    """Mean weight of each expert for each true class: a list (classes) of lists (experts)."""
    weights, labels = zip(*((model.weigh(model.adapt(seen)), true) for seen, true in batches), strict=True)
    weights, labels = torch.cat(weights), torch.cat(labels)
    return [weights[labels == label].mean(0).tolist() for label in range(classes)]


@torch.no_grad()
def average(run, networks):
    """Totals on the test split, for the mean of the networks' softmax outputs."""
    autocast, _ = train.mixed_precision(run)
    totals = train.Totals(len(run.dataset.classes), run.device)
    for images, labels in train.evaluation_batches(run, run.dataset.test):
        with autocast:
            logits = [network(images) for network in networks]
        probabilities = torch.stack([part.float().softmax(1) for part in logits]).mean(0)
        log_probabilities = probabilities.clamp(min=1e-30).log()
        totals.count(log_probabilities, labels, F.nll_loss(log_probabilities, labels))
    return totals


def show(run, outcome):
    gate = zip(run.dataset.classes, outcome["gate"], strict=True)
    rows = [[name, *(f"{weight:.3f}" for weight in row)] for name, row in gate]
    headers = ["true class", "base", *map(group_name, run.args.experts)]
    print(f"\nmean weight of each expert, test split\n{tabulate(rows, headers, disable_numparse=True)}")
    rows = [[name, *(f"{outcome[key][m]:.4f}" for m in train.METRICS)] for key, name in ROWS.items()]
    print("\n" + tabulate(rows, ["test split", *train.METRICS], disable_numparse=True))


def load(args, device):
    """The data set; writes --experts in one spelling. Raises ValueError for a class that the data set lacks,
    and for a group that has one class, has all classes, or is given twice."""
    dataset = train.load(args, device)
    option = "--experts" if args.experts != EXPERTS else "give --experts instead of the default"
    groups = [data.pick(dataset, option, group) for group in args.experts]
    args.experts = [data.spec(names) for names in groups]
    unusable = {1, len(dataset.classes)} & {len(names) for names in groups}
    if unusable or len(set(args.experts)) < len(groups):
        rule = "give each group once, with two classes or more, but not all"
        raise ValueError(f"--experts {' '.join(args.experts)}: {rule}")
    return dataset


def make_parser():
    parser = runs.new_parser(__doc__)
    data.add_arguments(parser, classes=False)
    add = parser.add_argument_group("mixture").add_argument
    add("--experts", nargs="+", default=EXPERTS, metavar="CLASSES",
        help="classes of each expert besides the base: vehicles, animals, or names such as cat,dog (default: "
        "vehicles cat,deer,dog,horse; these animals are easily confused)")  # fmt: skip
    add("--adapter-width", type=runs.number(int, "[1, 4095]"), default=1280,
        help="512 makes the mixture as large as three base networks (default: %(default)s)")  # fmt: skip
    add("--train-adapters", action="store_true", help="train the layers between experts and gating network; "
        "by default they keep their random initialization, as in the authors' code. On CINIC-10 the features "
        "then take 7 GB of memory in bf16 or fp16, 13 GB in float32")  # fmt: skip
    train.add_epoch_arguments(parser)
    train.add_training_arguments(parser)
    runs.add_arguments(parser)
    return parser


def parse_arguments(argv=None):
    args = make_parser().parse_args(argv)
    train.check_arguments(args)
    if args.batch_size == 1:
        raise ValueError("--batch-size 1: the gating network needs 2 or more images (batch norm)")
    return args


def run_name(args, data, only=None):
    """The folder name of a run. data: the data set's name; only: its selected classes, None if all."""
    settings = {**vars(args), "data": data, "classes": only}
    return runs.run_name(("moe",), settings, vars(make_parser().parse_args([])))


def main():
    folder, results = runs.run_seeds(parse_arguments(), run_name, load, train_gate)
    train.print_results(folder.name, results)


if __name__ == "__main__":
    runs.command_line(main)
