"""Train one network on 32x32 images; test it; write what happened to results/<run>/seed<k>.json.

    python train.py --data synthetic --epochs 3                   # runs anywhere, in a minute
    python train.py --arch densenet121 --aug flip --seed 1        # on CINIC-10, fetched at the first run
    python train.py --data path/to/folder --arch custom --seed 1 2 3
    python train.py --data cifar10 --lr 0.002 --dropout 0.2 --epochs 30
    torchrun --standalone --nproc_per_node=2 train.py --arch resnet18    # one network on two GPUs

Left alone, a setting is the recipe of the slides: Adam, lr 0.001, batch 64, 10 epochs, no schedule.
A run whose result is there is skipped; one that was stopped goes on from its last whole epoch.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path

import tabulate
import torch
from torch import distributed as dist
from torch.nn import functional as F

import augment
import data
import models

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "nadam": torch.optim.NAdam,
}
METRICS = ("accuracy", "precision", "recall", "f1", "loss")
SLOW_IN_BF16 = ("efficientnet_b0",)  # on a CPU: depthwise convolutions, at half the speed of float32
EVALUATION_BATCH = {"cpu": 256, "cuda": 2048}  # what a CPU's cache holds; enough to keep a GPU busy
TENSOR_RATE = ("adam", "adamw", "sgd")  # take a learning rate that is on the device: a graph can change it
CAPTURABLE = ("adam", "adamw", "adamax", "nadam", "rmsprop", "sgd")  # adagrad counts its steps on the host

UNIMPORTANT = ("seed", "out", "root", "force", "checkpoint_every")  # to what a run computes
LOST = "what was finished is kept, and the same command goes on from there"

# How a setting shows in a run's name when it differs from the recipe, in this order
TAGS = {
    "data": lambda value: data.key(value),
    "classes": lambda value: "only-" + value.replace(",", "+"),
    "fraction": lambda value: f"p{value!r}",
    "epochs": lambda value: f"epochs{value}",
    "batch_size": lambda value: f"batch{value}",
    "steps_per_epoch": lambda value: f"steps{value}",
    "lr": lambda value: f"lr{value!r}",
    "optimizer": lambda value: value,
    "momentum": lambda value: f"momentum{value!r}",
    "weight_decay": lambda value: f"wd{value!r}",
    "dropout": lambda value: f"dropout{value!r}",
    "pretrained": lambda value: "pretrained",
    "stem": lambda value: f"stem-{value}",
    "schedule": lambda value: value,
    "label_smoothing": lambda value: f"smooth{value!r}",
    "tta": lambda value: f"tta-{value}",
    "amp": lambda value: f"amp-{value}",
    "method": lambda value: value,
    "way": lambda value: f"way{value}",
    "shot": lambda value: f"shot{value}",
    "query": lambda value: f"query{value}",
    "episodes": lambda value: f"episodes{value}",
    "animals": lambda value: "animals-" + value.replace(",", "+"),
    "train_adapters": lambda value: "adapters",
    "adapter_width": lambda value: f"width{value}",
}


# Metrics


def confusion_matrix(predictions, labels, num_classes):
    """Count predictions (columns) of every true class (rows), without a wait for the device.

    predictions, labels: int64 (N,), on one device. Returns int64 (num_classes, num_classes).
    """
    cells = labels * num_classes + predictions
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=labels.device)
    return counts.index_add_(0, cells, torch.ones_like(cells)).view(num_classes, num_classes)


def metrics(confusion, loss):
    """METRICS as floats, of a confusion matrix int64 (C, C) and the mean loss.

    Precision, recall and F1 are macro averages over the classes that occur among labels or predictions, a
    ratio with nothing below it counts 0: scikit-learn's average="macro", zero_division=0.
    """
    confusion = confusion.double().cpu()
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
    """Loss and confusion matrix of an epoch, adding up on the device; read once, at its end."""

    def __init__(self, num_classes, device):
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss = torch.zeros((), dtype=exact, device=device)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def reset(self):
        self.loss.zero_()
        self.confusion.zero_()

    def count(self, logits, labels, loss):
        """Add a batch. logits: float (B, C); labels: int64 (B,); loss: its mean, 0-dimensional."""
        self.loss += loss.detach() * len(labels)
        self.confusion += confusion_matrix(logits.detach().argmax(1), labels, len(self.confusion))

    def metrics(self):
        """Of all processes together, once. Waits for the device."""
        if dist.is_initialized():
            dist.all_reduce(self.loss)
            dist.all_reduce(self.confusion)
        return metrics(self.confusion, self.loss.item() / self.confusion.sum().item())


# The loop


def train_step(model, optimizer, scaler, autocast, totals, label_smoothing, inputs, labels):
    """Forward, loss, backward, step, count. The loss counted is the one that is learned from."""
    with autocast:
        logits = model(inputs)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    totals.count(logits, labels, loss)


class CapturedStep:
    """step(inputs, labels) as a CUDA graph: recorded once, then replayed by one launch in place of hundreds.

    Batches of another size than the first run `step` itself, and so do the first ones: PyTorch asks for a warm-up, on
    a stream of its own. Whatever `step` changes has to stay where it is in memory.
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
            return self.run_aside(inputs, labels)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and runs nothing
                self.step(self.inputs, self.labels)
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.graph.replay()

    def run_aside(self, inputs, labels):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.step(inputs, labels)
        here.wait_stream(aside)


def why_not_captured(args, device, scaler):
    """Why the step is not a CUDA graph; None if it is one."""
    if dist.is_initialized():
        return "several processes train together"
    if device.type != "cuda":
        return f"only CUDA has graphs, and this is {device.type}"
    if not args.graph:
        return "--no-graph"
    if scaler.is_enabled():
        return "fp16's gradient scaler waits for the host"
    if args.schedule != "none" and args.optimizer not in TENSOR_RATE:
        return f"a graph cannot change the learning rate of {args.optimizer}"
    return None if args.optimizer in CAPTURABLE else f"{args.optimizer} waits for the host"


def one_cycle(step, steps):
    """The share of the learning rate at step 0, 1, ... of a run: up in a straight line over the first fifth, and down in
    one to zero behind the last. A function of the step alone, so that a resumed run goes on from it. After Smith
    and Topin, 2018, arXiv:1708.07120, without their change of momentum."""
    top = max(1, steps // 5)
    return (step + 1) / top if step < top else (steps - step) / (steps - top + 1)


def scheduled(batches, optimizer, peak, first, steps):
    """Yield the batches, and before each give the optimizer the learning rate of its step; that of the first is `first`."""
    for step, batch in enumerate(batches, start=first):
        for group in optimizer.param_groups:
            rate = peak * one_cycle(step, steps)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)  # where a captured step reads it, without a wait
            else:
                group["lr"] = rate
        yield batch


def train_epoch(model, step, batches, progress):
    """One pass over `batches`. Nothing on the device is read here, so that the host runs ahead of it."""
    model.train()
    for inputs, labels in batches:
        step(inputs, labels)
        progress(len(inputs))
    progress.clear()


@torch.no_grad()
def evaluate(model, autocast, batches, totals):
    """Count the predictions of a model in eval mode."""
    model.eval()
    for images, labels in batches:
        with autocast:
            logits = model(images)
        totals.count(logits, labels, F.cross_entropy(logits.float(), labels))
    return totals


def fit(
    model,
    args,
    seed,
    num_classes,
    device,
    checkpoint,
    counts,
    batch_size,
    train_batches,
    valid_batches=None,
    unit="epoch",
):
    """Train for len(counts) epochs, from the checkpoint if there is one; returns the history.

    train_batches(epoch) and valid_batches() begin an epoch of (inputs, labels); counts: inputs in each epoch.
    """
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], args, device)
    autocast, scaler = mixed_precision(args, device)
    stateful = {"model": model, "optimizer": optimizer, "scaler": scaler}
    history = checkpoint.restore(stateful)
    totals, workers = Totals(num_classes, device), Workers()
    smoothing = vars(args).get("label_smoothing", 0.0)
    step = functools.partial(train_step, workers.join(model), optimizer, scaler, autocast, totals, smoothing)
    steps = list(itertools.accumulate((math.ceil(count / batch_size) for count in counts), initial=0))
    if args.schedule != "none" and device.type == "cuda" and args.optimizer in TENSOR_RATE:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(
                args.lr, device=device
            )  # also after a checkpoint, which holds the CPU's
    reason = why_not_captured(args, device, scaler)
    if not reason:
        step = CapturedStep(step)
    elif device.type == "cuda":
        print(f"steps run one kernel at a time: {reason}")
    for epoch, count in list(enumerate(counts, start=1))[len(history) :]:
        # Drawn anew in each epoch, so that a resumed run draws the same
        torch.manual_seed(data.seed_from(seed, epoch, "dropout", *workers.name))
        started = time.monotonic()
        totals.reset()
        progress = data.Progress(f"{unit} {epoch}/{len(counts)}", count // workers.number)
        batches = workers.share(train_batches(epoch))
        if args.schedule != "none":
            batches = scheduled(batches, optimizer, args.lr, steps[epoch - 1], steps[-1])
        train_epoch(model, step, batches, progress)
        entry = {"epoch": epoch, "train": totals.metrics()}
        rate = count / (time.monotonic() - started)
        check_finite(entry["train"]["loss"], f"{unit} {epoch}")
        if valid_batches:
            workers.agree(model)
            of_valid = workers.share(valid_batches())
            entry["valid"] = evaluate(model, autocast, of_valid, Totals(num_classes, device)).metrics()
            check_finite(entry["valid"]["loss"], f"the validation of {unit} {epoch}")
        history.append({**entry, "seconds": time.monotonic() - started, "images_per_second": rate})
        if epoch < len(counts) and epoch % args.checkpoint_every == 0:
            checkpoint.save(stateful, history)
        print(epoch_line(history[-1], len(counts), unit), flush=True)
    return history


def train(args, seed, dataset, device, checkpoint):
    """One supervised run. Returns the weights tested and the run's part of a result file."""
    if args.arch != "custom" and min(args.batch_size, len(dataset.train.labels)) == 1:
        raise ValueError(
            f"{args.arch} cannot learn from one image at a time (batch norm): raise --batch-size"
        )
    torch.manual_seed(seed)
    model = models.build(args.arch, len(dataset.classes), args.dropout, args.pretrained, args.stem)
    model = model.to(device, memory_format=torch.channels_last)
    print(f"{args.arch}: {describe_model(model, args, device)}")
    streams = augment.parse(args.aug, dataset.mean)
    evaluation_batch = EVALUATION_BATCH.get(device.type, EVALUATION_BATCH["cuda"])

    images = len(dataset.train.labels) * len(streams)
    if args.steps_per_epoch:
        images = args.steps_per_epoch * args.batch_size

    def batches(split, size, *shuffle):
        return data.batches(split, size, dataset.mean, dataset.std, device, *shuffle)

    history = fit(
        *(model, args, seed, len(dataset.classes), device, checkpoint),
        counts=[images] * args.epochs,
        batch_size=args.batch_size,
        train_batches=lambda epoch: batches(
            dataset.train, args.batch_size, streams, seed, epoch, args.steps_per_epoch
        ),
        valid_batches=lambda: batches(dataset.valid, evaluation_batch),
    )
    autocast, _ = mixed_precision(args, device)

    def test(network):
        of_test = Workers().share(batches(dataset.test, evaluation_batch))
        return evaluate(network, autocast, of_test, Totals(len(dataset.classes), device))

    totals = test(model)
    tested = {"test": totals.metrics(), "confusion": totals.confusion.tolist()}
    if args.tta == "flip":
        tested["test_tta"] = test(Mirrored(model)).metrics()
        print(f"with mirror images: test accuracy {tested['test_tta']['accuracy']:.4f}")
    return model.state_dict(), {"history": history, **tested}


class Mirrored(torch.nn.Module):
    """A network that sees each image twice, as it is and mirrored: the mean of both logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return (self.model(images) + self.model(images.flip(3))) / 2


def check_finite(loss, when):
    """Raise RuntimeError if the loss is no number."""
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss became {loss} in {when}: lower --lr, or use --amp off")


def describe_model(model, args, device):
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{learned:,} parameters to learn, computed in {precision(args, device) or torch.float32}"


def epoch_line(entry, epochs, unit):
    parts = [f"{unit} {entry['epoch']:>{len(str(epochs))}}/{epochs}"]
    parts += [
        f"{part} loss {entry[part]['loss']:.4f} accuracy {entry[part]['accuracy']:.4f}"
        for part in ("train", "valid")
        if part in entry
    ]
    left = entry["seconds"] * (epochs - entry["epoch"])
    parts.append(f"{entry['seconds']:.1f} s, {entry['images_per_second']:,.0f} images/s, {left:.0f} s left")
    return "  ".join(parts)


def make_optimizer(parameters, args, device):
    """The optimizer of OPTIMIZERS with args.lr, args.weight_decay and, for sgd (Nesterov's) and rmsprop, args.momentum;
    fused into one kernel where PyTorch has one. With a schedule, norms and biases have no weight decay."""
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.momentum:
        options |= {"momentum": args.momentum, **({"nesterov": True} if args.optimizer == "sgd" else {})}
    if args.schedule != "none" and args.weight_decay:
        parameters = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if device.type in ("cpu", "cuda") and args.optimizer in ("adam", "adamw", "sgd"):
        options["fused"] = True
    if device.type == "cuda" and args.optimizer in CAPTURABLE and args.optimizer != "sgd":  # sgd always is
        options["capturable"] = True
    return OPTIMIZERS[args.optimizer](parameters, **options)


def choose_device(name):
    """A torch.device; auto is cuda, else mps, else cpu. Raises ValueError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    kind, _, index = name.partition(":")
    if not there.get(kind):
        raise ValueError(f"--device {name}: there is no such device here; use auto or cpu")
    if index and not (index.isdigit() and (kind != "cuda" or int(index) < torch.cuda.device_count())):
        raise ValueError(f"--device {name}: there is no such device here; use auto or {kind}")
    return torch.device(name)


def precision(args, device):
    """The dtype that --amp computes in, None for float32. auto: on CUDA bf16 where the GPU has it, else fp16; on a
    CPU bf16 where it has instructions for that, save for networks that it slows down."""
    if args.amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16: a CPU has no fast fp16; use bf16 or off")
    if args.amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast = device.type == "cpu" and cpu_has_bf16() and vars(args).get("arch") not in SLOW_IN_BF16
    return torch.bfloat16 if fast else None


def cpu_has_bf16():
    """Whether the CPU multiplies in bf16; elsewhere PyTorch emulates it, at a loss."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not documented, so they may be gone
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def mixed_precision(args, device):
    """The autocast context and the gradient scaler for --amp; both do nothing for float32."""
    dtype = precision(args, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# Several processes: torchrun --standalone --nproc_per_node=2 train.py ...


class Workers:
    """The processes that torchrun started, which train one network: each has a part of every batch. Alone, nothing
    here does anything."""

    def __init__(self):
        self.number = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.name = () if self.rank == 0 else (self.rank,)  # a part of seeds: each draws dropout of its own
        self.part = 1.0  # of the batch that is here

    def join(self, model):
        """The model, with gradients of the whole batch wherever they are taken; on CUDA with batch norm over all of it
        (on a CPU, PyTorch's batch norm knows its own process only)."""
        if self.number == 1:
            return model
        if next(model.parameters()).is_cuda:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        joined = torch.nn.parallel.DistributedDataParallel(model)
        joined.register_comm_hook(self, Workers.add_up)
        return joined

    @staticmethod
    def add_up(workers, bucket):
        """A mean over all images, from means over parts that need not be of one size."""
        gradients = dist.all_reduce(bucket.buffer().mul_(workers.part), async_op=True).get_future()
        return gradients.then(lambda future: future.value()[0])

    def share(self, batches):
        """This process's part of each batch; a last batch of fewer than two images each joins the one before."""
        if self.number == 1:
            yield from batches
            return
        batches = itertools.chain(batches, [None])
        held = next(batches)
        for batch in batches:
            if batch and len(batch[1]) < 2 * self.number:
                held, batch = [torch.cat(pair) for pair in zip(held, batch, strict=True)], None
            inputs, labels = (tensor.tensor_split(self.number)[self.rank] for tensor in held)
            self.part = len(labels) / len(held[1])
            if len(labels):
                yield inputs, labels
            if not batch:
                return
            held = batch

    def agree(self, model):
        """Give all the first one's statistics of batch norm."""
        if self.number > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def first(self, function, *given):
        """What function(*given) returns in the first process, which alone runs it."""
        returned = [function(*given) if self.rank == 0 else None]
        if self.number > 1:
            dist.broadcast_object_list(returned)
        return returned[0]


@contextlib.contextmanager
def joined_workers(args):
    """Inside, what torchrun started works together. Raises RuntimeError if one is lost."""
    number, rank = (int(os.environ.get(name, low)) for name, low in (("WORLD_SIZE", 1), ("RANK", 0)))
    if number == 1:
        yield
        return
    if args.batch_size < 2 * number:
        raise ValueError(
            f"--batch-size {args.batch_size}: {number} processes share it, and each needs two images"
        )
    cuda = choose_device(args.device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        quiet = contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext()
        with quiet:  # the first one speaks for all
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RuntimeError(f"another process of this run was lost: {LOST}") from error
        raise
    finally:
        dist.destroy_process_group()


# Files


def write_whole(path, content):
    """Bytes to a file that is there whole or not at all, whatever happens on the way. A signal waits for the end."""
    temporary = None
    try:
        with data.Signals.held():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise OSError(f"{path} cannot be written ({error.strerror}): {LOST}") from error


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Checkpoint:
    """Where an unfinished run can go on: a file that begins with the checksum of what follows.

    settings: what the run computes with; a checkpoint of other settings is not gone on from.
    """

    def __init__(self, path, settings):
        self.path, self.settings = path, settings

    def save(self, stateful, history):
        """stateful: {name: object with state_dict()}; history: a list that JSON can hold."""
        if Workers().rank:
            return
        states = {name: thing.state_dict() for name, thing in stateful.items()}
        content = torch_bytes({"settings": self.settings, "history": history, "states": states})
        write_whole(self.path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    def restore(self, stateful):
        """Load the saved states into `stateful` and return the saved history; [] if there is none to use."""
        content = Workers().first(lambda: self.path.read_bytes() if self.path.exists() else b"")
        if not content:
            return []
        digest, _, content = content.partition(b"\n")
        try:
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise pickle.UnpicklingError
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # also what torch says of a pickle that would run code
            print(f"{self.path} is damaged, or no checkpoint: the run begins again")
            return []
        if saved["settings"] != self.settings:
            print(f"{self.path} is of other settings: the run begins again")
            return []
        for name, thing in stateful.items():
            thing.load_state_dict(saved["states"][name])
        print(f"going on after epoch {len(saved['history'])} ({self.path})")
        return saved["history"]

    def remove(self):
        self.path.unlink(missing_ok=True)


def result_bytes(result):
    """A result file: JSON, of which the last entry is the checksum of the rest."""
    return json.dumps({**result, "checksum": checksum(result)}, indent=1).encode()


def checksum(result):
    """SHA-256 of a result without its checksum, in hexadecimal."""
    rest = {key: value for key, value in result.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def read_result(path):
    """A finished run's result, or None; a file that is none is named and counts as not there."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_bytes())
        if result["version"] == 1 and result["test"] and result["checksum"] == checksum(result):
            return result
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    print(f"{path} is no result file, or damaged: the run is done again")
    return None


def environment(device):
    """Versions, the device's name, and the commit of this code, for a result file."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)"
        if device.type == "cpu"
        else name,
        "commit": commit,
    }


def peak_memory_bytes(device):
    """The most memory the run held: on the GPU where it ran there, else in the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


# Runs


def run_name(args, first, recipe):
    """The folder of a run: `first` (architecture, augmentation), then what differs from the recipe."""
    given = {key: value for key, value in vars(args).items() if key in TAGS}
    changed = [tag(given[key]) for key, tag in TAGS.items() if key in given and given[key] != recipe(key)]
    return "-".join([*first, *changed])


def run_seeds(args, name, train_one):
    """Do what is missing of a run, seed by seed, with the data loaded once; then print a table.

    train_one(args, seed, dataset, device, checkpoint) returns weights and a part of a result.
    """
    device, workers = choose_device(args.device), Workers()
    precision(args, device)  # complains now, not after loading
    make_repeatable()
    dataset, results = None, {}
    for seed in args.seed:
        path = Path(args.out) / name / f"seed{seed}.json"
        result = None if args.force else workers.first(read_result, path)
        if result:
            print(f"{name} seed {seed}: skipped, its result is there ({path}); --force does it again")
        else:
            dataset = dataset or load_data(args, device)
            with data.alone(path.with_suffix(".lock")) if workers.rank == 0 else contextlib.nullcontext():
                # it may have been made by another process while this one waited
                result = None if args.force else workers.first(read_result, path)
                result = result or run_seed(args, seed, path, dataset, device, train_one)
        results[seed] = result
    print(f"\n{name}, test split\n{result_table(results)}")
    return results


def load_data(args, device):
    dataset = data.load(args.data, args.root, args.fraction, args.classes)
    print(data.describe(dataset))
    return dataset._replace(**{part: data.to_device(getattr(dataset, part), device) for part in data.SPLITS})


def run_seed(args, seed, path, dataset, device, train_one):
    """One seed of a run, from its checkpoint if there is one: writes and returns the result."""
    settings = {key: value for key, value in vars(args).items() if key not in UNIMPORTANT}
    settings |= {"seed": seed, "fingerprint": dataset.fingerprint}
    checkpoint, first = Checkpoint(path.with_suffix(".ckpt"), settings), Workers().rank == 0
    if args.force and first:
        checkpoint.remove()
    print(f"\n{path.parent.name} seed {seed} on {device} -> {path}", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        weights, outcome = train_one(args, seed, dataset, device, checkpoint)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(
            error
        ):  # CUDA's and the CPU's own have no type
            raise
        sizes = ("batch_size", "way", "shot", "query")
        sizes = [f"--{s.replace('_', '-')} {vars(args)[s]}" for s in sizes if s in vars(args)]
        raise RuntimeError(f"out of memory on {device} with {' '.join(sizes)}: lower it; {LOST}") from error
    check_finite(outcome["test"]["loss"], "the test")
    dtype = precision(args, device) or torch.float32
    result = {
        "version": 1,
        "config": {**vars(args), "seed": seed},
        "data": {
            "name": dataset.name,
            "classes": dataset.classes,
            **{part: len(getattr(dataset, part).labels) for part in data.SPLITS},
            "mean": dataset.mean,
            "std": dataset.std,
            "fingerprint": dataset.fingerprint,
        },
        "environment": {
            **environment(device),
            "dtype": str(dtype).removeprefix("torch."),
            "processes": Workers().number,
        },
        **outcome,
        "seconds": sum(entry["seconds"] for entry in outcome["history"]),
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    if first:
        content = torch_bytes(weights)
        result["weights"] = hashlib.sha256(content).hexdigest()
        write_whole(path.with_suffix(".pt"), content)
        write_whole(path, result_bytes(result))
        checkpoint.remove()
    return result


def result_table(results):
    """A row of METRICS for each seed and, of several, their mean and standard deviation (n - 1)."""
    rows = [[seed, *(f"{result['test'][m]:.4f}" for m in METRICS)] for seed, result in results.items()]
    if len(results) > 1:
        values = torch.tensor([[result["test"][m] for m in METRICS] for result in results.values()]).double()
        spread = zip(values.mean(0).tolist(), values.std(0).tolist(), strict=True)
        rows.append(["mean ± std", *(f"{mean:.4f} ± {std:.4f}" for mean, std in spread)])
    return tabulate.tabulate(rows, ["seed", *METRICS], disable_numparse=True)


def make_repeatable():
    """The same bits for the same command on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it costs, and nothing here reads such memory
    )
    torch.backends.cudnn.benchmark = False


# Command line


def number(kind, low, high=math.inf, low_itself=False):
    """An argparse type: a finite number above `low` (or `low` itself), below `high`."""

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and low <= value < high and (value > low or low_itself):
                return value
        bounds = f"{'at least' if low_itself else 'above'} {low}" + (
            f" and below {high}" if high < math.inf else ""
        )
        raise argparse.ArgumentTypeError(
            f"{text} is not a{'n integer' if kind is int else ' number'} {bounds}"
        )

    return parse


def add_run_arguments(parser):
    """The arguments that every run has, whatever it trains."""
    data.add_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=number(int, 0, 2**31, True), nargs="+", default=[1], metavar="K",
                       help="one or several, one after the other (default: 1)")  # fmt: skip
    group.add_argument(
        "--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps"
    )
    group.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
                       help="number format: auto is the fastest: bf16 on a GPU or CPU that has it, else fp16 with a "
                       "gradient scaler on a GPU and float32 on a CPU")  # fmt: skip
    group.add_argument("--no-graph", dest="graph", action="store_false",
                       help="on CUDA, launch every kernel of a step by itself")  # fmt: skip
    group.add_argument("--out", default="results", help="folder for results (default: %(default)s)")
    group.add_argument("--checkpoint-every", type=number(int, 0), default=1, metavar="N",
                       help="epochs between checkpoints (default: %(default)s)")  # fmt: skip
    group.add_argument("--force", action="store_true", help="run again even if the result is there")


def add_optimizer_arguments(parser):
    """The optimizer, as on the slides."""
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--lr", type=number(float, 0), default=0.001, help="learning rate (default: %(default)s)"
    )
    group.add_argument("--optimizer", default="adam", choices=OPTIMIZERS, help="(default: %(default)s)")
    group.add_argument("--momentum", type=number(float, 0, 1, True), default=0.0,
                       help="of sgd, as Nesterov's, and of rmsprop (default: 0)")  # fmt: skip
    group.add_argument(
        "--weight-decay", type=number(float, 0, low_itself=True), default=0.0, help="(default: 0)"
    )
    group.add_argument("--schedule", default="none", choices=("none", "onecycle"), help="onecycle: the learning rate goes up "
                       "to --lr over a fifth of the run and then down to zero, and norms and biases have no weight "
                       "decay; none: it stays")  # fmt: skip


def add_training_arguments(parser):
    """The arguments of supervised training, at the recipe of the slides."""
    add_optimizer_arguments(parser)
    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=number(int, 0), default=10, help="(default: %(default)s)")
    group.add_argument("--batch-size", type=number(int, 0), default=64, help="(default: %(default)s)")
    group.add_argument("--dropout", type=number(float, 0, 1, True), default=0.0, help="k of the custom network: k after "
                       "each block, min(2k, 0.9) before the last layer (default: 0)")  # fmt: skip
    group.add_argument("--label-smoothing", type=number(float, 0, 1, True), default=0.0, metavar="E",
                       help="share of a label that goes to all classes alike (default: 0)")  # fmt: skip


def check_optimizer(args):
    """Raise ValueError for settings that the optimizer does not have; give --classes its one spelling."""
    if args.momentum and args.optimizer not in ("sgd", "rmsprop"):
        raise ValueError(f"--momentum: {args.optimizer} has none; only sgd and rmsprop do")
    if args.classes and args.classes not in data.GROUPS:
        args.classes = ",".join(sorted({name.strip() for name in args.classes.split(",")}))


def check(args):
    """Raise ValueError for arguments that do not go together; give each setting its one spelling."""
    if args.arch == "efficientnet":
        args.arch = "efficientnet_b0"
    check_optimizer(args)
    augment.parse(args.aug)
    with torch.device("meta"):
        models.build(args.arch, 10, args.dropout, stem=args.stem)
    if args.pretrained and args.arch == "custom":
        raise ValueError("--pretrained: custom has no pretrained weights")
    if args.pretrained and args.stem != "imagenet":
        raise ValueError("--pretrained: the weights are of the ImageNet stem; leave --stem out")


def make_parser():
    parser = data.new_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--arch", default="custom", choices=(*models.ARCHITECTURES, "efficientnet"),
                       help="(default: %(default)s)")  # fmt: skip
    group.add_argument("--aug", default="none", help=f"{', '.join(augment.NAMES)}, or several joined by + "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    group.add_argument("--stem", default="imagenet", choices=("imagenet", "small"), help="of torchvision's networks; small: "
                       "a 3x3 convolution of stride 1 and no max-pool, for 32x32 images (default: %(default)s)")  # fmt: skip
    add_training_arguments(parser)
    parser.add_argument("--steps-per-epoch", type=number(int, 0), metavar="N", help="batches in an epoch (default: one pass "
                        "over the data); more repeat it, for small fractions")  # fmt: skip
    group = parser.add_argument_group("test")
    group.add_argument("--tta", default="none", choices=("none", "flip"), help="flip: test the mean over each image and its "
                       "mirror image too, beside the plain test (default: %(default)s)")  # fmt: skip
    add_run_arguments(parser)
    return parser


def parse_arguments(argv=None):
    """The settings of a command line, and the name of its run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check(args)
    return args, run_name(args, (args.arch, args.aug), parser.get_default)


def main():
    args, name = parse_arguments()
    with joined_workers(args):
        run_seeds(args, name, train)


if __name__ == "__main__":
    data.command_line(main)
