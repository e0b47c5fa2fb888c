"""Train and test one network on 32x32 images; write metrics and settings to results/<run>/seed<k>.json.

    python train.py --data synthetic --epochs 3                   # runs anywhere, in a minute
    python train.py --arch densenet121 --aug flip --seed 1        # on CINIC-10, downloaded on the first run
    python train.py --data path/to/folder --arch custom --seed 1 2 3
    python train.py --data cifar10 --lr 0.002 --dropout 0.2 --epochs 30

Defaults reproduce the study's recipe: Adam, lr 0.001, batch 64, 10 epochs, constant learning rate. Finished
runs are skipped, interrupted ones resume. Extend OPTIMIZERS, models.ARCHITECTURES, augment.AUGMENTATIONS.
"""

import functools
import math
import time
from statistics import fmean, stdev

import tabulate
import torch
from torch.nn import functional as F

import augment
import data
import models
import runs

# Each takes parameters of any shape, lr and weight_decay, and its step() needs no closure
OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "nadam": torch.optim.NAdam,
}
FUSED = ("adam", "adamw", "sgd")  # one kernel per step, no device synchronization: can be captured
METRICS = ("accuracy", "precision", "recall", "f1", "loss")


# Metrics


def confusion_matrix(predictions, labels, num_classes):
    """Count predictions (columns) for each true class (rows), without device synchronization.

    predictions, labels: int64 (N,), on one device. Returns int64 (num_classes, num_classes). As a product
    of one-hot matrices: exact below 2**24 images, and a few kernels; a deterministic index_add_ would sort.
    """
    classes = torch.arange(num_classes, device=labels.device)
    true, predicted = ((values[:, None] == classes).float() for values in (labels, predictions))
    return (true.T @ predicted).long()


def metrics(confusion, loss):
    """METRICS as floats, from a confusion matrix int64 (C, C) and the mean loss.

    Precision, recall and F1 are macro averages over the classes that occur in labels or predictions; a ratio
    with denominator 0 counts as 0, as in scikit-learn with average="macro", zero_division=0.
    """
    confusion = confusion.cpu().double()  # on the host: MPS does not support float64
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = true + predicted > 0

    def macro(numerator, denominator):
        return (numerator / denominator.clamp(min=1))[occurs].mean().item()

    return {
        "loss": float(loss),
        "accuracy": (hits.sum() / true.sum()).item(),
        "precision": macro(hits, predicted),
        "recall": macro(hits, true),
        "f1": macro(2 * hits, true + predicted),
    }


class Totals:
    """The loss and confusion matrix of an epoch, summed on the device and read once, at the end."""

    def __init__(self, num_classes, device):
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.loss = torch.zeros((), dtype=dtype, device=device)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def reset(self):
        self.loss.zero_()
        self.confusion.zero_()

    def count(self, logits, labels, loss):
        """Add a batch. logits: float (B, C); labels: int64 (B,); loss: the batch's mean, 0-dimensional."""
        self.loss += loss.detach() * len(labels)
        self.confusion += confusion_matrix(logits.detach().argmax(1), labels, len(self.confusion))

    def metrics(self):
        """METRICS. Synchronizes with the device. Raises RuntimeError for a loss that is NaN or infinite."""
        loss = self.loss.item() / self.confusion.sum().item()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss}: lower --lr, or use --amp off")
        return metrics(self.confusion, loss)


# Optimizer and learning rate


def make_optimizer(parameters, args, device):
    """The optimizer named in args, with args.lr, args.weight_decay and, for sgd (Nesterov) and rmsprop,
    args.momentum. With a schedule, norms and biases get no weight decay."""
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.momentum:
        options |= {"momentum": args.momentum, **({"nesterov": True} if args.optimizer == "sgd" else {})}
    if args.schedule != "none" and args.weight_decay:
        parameters = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if args.optimizer in FUSED and device.type in ("cpu", "cuda"):
        options["fused"] = True
        if device.type == "cuda" and args.optimizer != "sgd":  # sgd has no step count to capture
            options["capturable"] = True
    try:
        optimizer = OPTIMIZERS[args.optimizer](parameters, **options)
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"OPTIMIZERS in train.py, {args.optimizer}: {error}") from error
    if args.optimizer == "sgd" and args.momentum:
        # Otherwise fused SGD allocates the buffers uninitialized, and leaves them so if fp16 overflows in
        # the first step
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def one_cycle(step, steps):
    """The learning rate at step 0, 1, ... of a run, as a fraction of its peak. It rises linearly over the
    first fifth, then falls linearly, to zero after the last step. It depends only on the step, so that
    resumed runs continue it. After Smith and Topin, 2018, arXiv:1708.07120, but with constant momentum."""
    top = max(1, steps // 5)
    return (step + 1) / top if step < top else (steps - step) / (steps - top + 1)


def set_learning_rate(optimizer, rate):
    """Set every parameter group's learning rate; a tensor, which a captured step reads, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# The loop


def mixed_precision(run):
    """The autocast context and the gradient scaler for a run's compute dtype; float32 disables both."""
    mixed = run.dtype != torch.float32
    autocast = torch.autocast(run.device.type, run.dtype if mixed else None, enabled=mixed)
    return autocast, torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)


def is_capturable(args, device):
    """Whether the training step can be captured in a CUDA graph."""
    return device.type == "cuda" and args.optimizer in FUSED


class CapturedStep:
    """step(inputs, labels) as a CUDA graph: captured once, then replayed with one launch instead of hundreds.

    Only batches as large as the first one are replayed. Others run eagerly, and so do the first three:
    PyTorch requires a warm-up on a side stream. `step` must change tensors in place.
    """

    WARM_UP = 3

    def __init__(self, step):
        self.step, self.graph, self.calls = step, None, 0

    def __call__(self, inputs, labels):
        if self.calls == 0:
            self.inputs, self.labels = inputs.clone(), labels.clone()
        if inputs.shape != self.inputs.shape:
            return self.step(inputs, labels)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self.warm_up(inputs, labels)
        if self.graph is None:
            self.capture()
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.graph.replay()

    def warm_up(self, inputs, labels):
        current, side = torch.cuda.current_stream(), side_stream(inputs.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.step(inputs, labels)
        current.wait_stream(side)

    def capture(self):
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread may allocate pinned memory meanwhile
            side = side_stream(self.inputs.device)
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self.step(self.inputs, self.labels)  # recorded, not executed
        except RuntimeError as error:
            remedy = "--no-graph disables CUDA graphs"
            raise RuntimeError(f"a step cannot be captured ({error}): {remedy}") from error
        self.graph = graph


@functools.cache
def side_stream(device):
    """One side stream per process, since each stream has its own cuBLAS workspace."""
    return torch.cuda.Stream(device)


def fit(run, model, num_classes, steps, train_batches, valid_batches=None):
    """Train for len(steps) epochs, resuming from the run's checkpoint. Returns the history, a list of epochs.

    steps: batches per epoch; train_batches(epoch) and valid_batches() yield (inputs, labels) on the device.
    """
    args, device, epochs, total_steps = run.args, run.device, len(steps), sum(steps)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], args, device)
    autocast, scaler = mixed_precision(run)
    stateful = {"model": model, "optimizer": optimizer, "scaler": scaler}
    history = run.restore(stateful)
    totals = Totals(num_classes, device)

    def step(inputs, labels):
        with autocast:
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        totals.count(logits, labels, loss)

    rate = args.lr
    if is_capturable(args, device) and args.schedule != "none":
        rate = torch.full((), args.lr, device=device)  # same bits even if the step is not captured
    if is_capturable(args, device) and args.graph:
        step = CapturedStep(step)
    elif device.type == "cuda":
        print("CUDA graphs are disabled: they need adam, adamw or sgd, without --no-graph")
    for group in optimizer.param_groups:  # a checkpoint restores that of its last step
        group["lr"] = rate

    for epoch in range(len(history) + 1, epochs + 1):
        torch.manual_seed(data.seed_from(run.seed, epoch, "dropout"))  # the same in a resumed run
        model.train()
        totals.reset()
        started, images = time.monotonic(), 0
        what = f"epoch {epoch}/{epochs}{summary(history)}"
        batches = runs.progress(train_batches(epoch), what, steps[epoch - 1])
        for number, (inputs, labels) in enumerate(batches, start=sum(steps[: epoch - 1])):
            if args.schedule == "onecycle":
                set_learning_rate(optimizer, args.lr * one_cycle(number, total_steps))
            step(inputs, labels)
            images += len(inputs)
        entry = {"epoch": epoch, "train": totals.metrics()}
        images_per_second = images / (time.monotonic() - started)
        if valid_batches:
            entry["valid"] = evaluate(run, model, valid_batches(), num_classes).metrics()
        entry |= {"seconds": time.monotonic() - started, "images_per_second": images_per_second}
        history.append(entry)
        if epoch < epochs:
            run.save(stateful, history)
        print(epoch_line(entry, epochs), flush=True)
    return history


@torch.no_grad()
def evaluate(run, model, batches, num_classes, mirrored=False):
    """Totals of a model in eval mode over batches of (images, labels). mirrored: average the logits of each
    image and its mirror image."""
    autocast, _ = mixed_precision(run)
    totals = Totals(num_classes, run.device)
    model.eval()
    for images, labels in batches:
        with autocast:
            logits = model(images)
            if mirrored:
                logits = (logits + model(images.flip(3))) / 2
        totals.count(logits, labels, F.cross_entropy(logits.float(), labels))
    return totals


def summary(history):
    """The last epoch's loss, accuracy and speed, for the progress line."""
    if not history:
        return ""
    last = history[-1].get("valid") or history[-1]["train"]
    rate = f"{history[-1]['images_per_second']:,.0f} images/s"
    return f" (last: loss {last['loss']:.4f}, accuracy {last['accuracy']:.4f}, {rate})"


def epoch_line(entry, epochs):
    parts = [f"epoch {entry['epoch']:>{len(str(epochs))}}/{epochs}"]
    for split in [name for name in ("train", "valid") if name in entry]:
        parts.append(f"{split} loss {entry[split]['loss']:.4f} accuracy {entry[split]['accuracy']:.4f}")
    left = entry["seconds"] * (epochs - entry["epoch"])
    parts.append(f"{entry['seconds']:.1f} s, {entry['images_per_second']:,.0f} images/s, {left:.0f} s left")
    return "  ".join(parts)


# One run


def train(run):
    """One supervised run. Returns the tested weights and the run's part of the result file."""
    args, dataset = run.args, run.dataset
    if args.arch != "custom" and min(args.batch_size, len(dataset.train.labels)) == 1:
        raise ValueError(f"{args.arch} cannot train on one image at a time (batch norm): raise --batch-size")
    torch.manual_seed(run.seed)
    model = models.build(args.arch, len(dataset.classes), args.dropout, args.pretrained, args.stem)
    model = model.to(run.device, memory_format=data.memory_format(run.device))
    print(f"{args.arch}: {describe(model, run)}")
    streams = augment.parse(args.aug, dataset.mean)
    images = len(dataset.train.labels) * len(streams)

    def make_plan(epoch):
        return data.make_plan(images, args.batch_size, run.seed, epoch, args.steps_per_epoch)

    def train_batches(epoch):
        return data.batches(dataset.train, dataset, run.device, make_plan(epoch), streams, (run.seed, epoch))

    _, sizes = make_plan(1)
    steps, num_classes = [len(sizes)] * args.epochs, len(dataset.classes)
    valid_batches = functools.partial(evaluation_batches, run, dataset.valid)
    history = fit(run, model, num_classes, steps, train_batches, valid_batches)
    totals = evaluate(run, model, evaluation_batches(run, dataset.test), num_classes)
    outcome = {"history": history, "test": totals.metrics(), "confusion": totals.confusion.tolist()}
    totals = evaluate(run, model, evaluation_batches(run, dataset.test), num_classes, mirrored=True)
    outcome["test_tta"] = totals.metrics()
    return {"arch": args.arch, "stem": args.stem, "state_dict": model.state_dict()}, outcome


def evaluation_batches(run, split):
    """Batches of (images, labels), in order and not augmented."""
    size = 256 if run.device.type == "cpu" else 512  # fits a CPU's cache; keeps a GPU busy within 8 GiB
    return data.batches(split, run.dataset, run.device, data.make_plan(len(split.labels), size))


def describe(model, run):
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{count:,} trainable parameters, compute dtype {str(run.dtype).removeprefix('torch.')}"


def load(args, device):
    """The data set that the arguments name, on the device if it fits."""
    dataset = data.load(args.data, args.root, args.fraction, args.classes)
    print(data.describe(dataset))
    return dataset._replace(**{name: data.to_device(getattr(dataset, name), device) for name in data.SPLITS})


def print_results(name, results):
    """Print METRICS, a row for each seed; if there are several, also mean and standard deviation (n - 1)."""
    columns = {metric: [result["test"][metric] for result in results.values()] for metric in METRICS}
    if all("test_tta" in result for result in results.values()):
        columns["accuracy with mirror images"] = [r["test_tta"]["accuracy"] for r in results.values()]
    rows = [[seed, *(f"{v:.4f}" for v in row)] for seed, *row in zip(results, *columns.values(), strict=True)]
    if len(results) > 1:
        rows.append(["mean ± std", *(f"{fmean(v):.4f} ± {stdev(v):.4f}" for v in columns.values())])
    table = tabulate.tabulate(rows, ["seed", *columns], disable_numparse=True)
    print(f"\n{name}, test split\n{table}")


# Command line


def add_training_arguments(parser):
    """Optimizer and loss, with the study's defaults; shared by every script."""
    group = parser.add_argument_group("optimizer")
    add, positive, below_1 = group.add_argument, runs.number(float, "(0, inf)"), runs.number(float, "[0, 1)")
    add("--lr", "--learning-rate", type=positive, default=0.001, help="learning rate (default: %(default)s)")
    add("--optimizer", default="adam", choices=OPTIMIZERS, help="(default: %(default)s)")
    add("--momentum", type=below_1, default=0.0, help="for sgd (Nesterov) and rmsprop (default: 0)")
    add("--weight-decay", type=runs.number(float, "[0, inf)"), default=0.0, help="(default: 0)")
    add("--schedule", default="none", choices=("none", "onecycle"),
        help="none: constant learning rate; onecycle: rises linearly to --lr over the first fifth of the "
        "run, then falls to zero; norms and biases get no weight decay")  # fmt: skip
    add("--label-smoothing", type=below_1, default=0.0, help="label smoothing factor (default: 0)")


def add_epoch_arguments(parser):
    """The arguments for the length of training. Returns their group."""
    group, count = parser.add_argument_group("epochs"), runs.number(int, "[1, inf)")
    group.add_argument("--epochs", type=count, default=10, help="(default: %(default)s)")
    group.add_argument("--batch-size", type=count, default=64, help="(default: %(default)s)")
    return group


def check_arguments(args):
    """Raise ValueError for momentum that the optimizer lacks."""
    if args.momentum and args.optimizer not in ("sgd", "rmsprop"):
        raise ValueError(f"--momentum: {args.optimizer} has none; only sgd and rmsprop have it")


def make_parser():
    parser = runs.new_parser(__doc__)
    data.add_arguments(parser)
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="custom", choices=models.ARCHITECTURES, help="(default: %(default)s)",
        type=lambda name: {"efficientnet": "efficientnet_b0"}.get(name, name))  # fmt: skip
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    add("--stem", default="imagenet", choices=("imagenet", "small"), help="for torchvision's networks; "
        "small: 3x3 convolution of stride 1, no max-pool, for 32x32 (default: %(default)s)")  # fmt: skip
    add("--dropout", type=runs.number(float, "[0, 1)"), default=0.0, help="for the custom network: rate k "
        "after each block, min(2k, 0.9) before the last layer (default: 0)")  # fmt: skip
    names = ", ".join(augment.NAMES)
    add("--aug", default="none", help=f"{names}, or several joined by + (default: %(default)s)")
    group = add_epoch_arguments(parser)
    group.add_argument("--steps-per-epoch", type=runs.number(int, "[1, inf)"), metavar="N",
        help="batches per epoch; a small training set is repeated (default: one pass)")  # fmt: skip
    add_training_arguments(parser)
    runs.add_arguments(parser)
    return parser


def run_name(args, data, only=None):
    """The folder name of a run. data: the data set's name; only: its selected classes, None if all."""
    settings = {**vars(args), "data": data, "classes": only}
    return runs.run_name((args.arch, args.aug), settings, vars(make_parser().parse_args([])))


def parse_arguments(argv=None):
    args = make_parser().parse_args(argv)
    check_arguments(args)
    augment.parse(args.aug)
    models.check(args.arch, args.dropout, args.pretrained, args.stem)
    return args


def main():
    folder, results = runs.run_seeds(parse_arguments(), run_name, load, train)
    print_results(folder.name, results)


if __name__ == "__main__":
    runs.command_line(main)
