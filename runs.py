"""What all runs share: errors, signals, files, devices, processes, checkpoints, results, seeds.

Every script passes its `main` to `command_line` and its training function to `run_seeds`:

    def train(run):                      # run.args, run.seed, run.dataset, run.device, run.dtype
        history = run.restore(states)    # [], or loads an interrupted run's states and returns its epochs
        ...
        run.save(states, history)        # after an epoch
        return weights, outcome          # for seed<k>.pt and seed<k>.json
"""

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import distributed as dist

try:
    import fcntl
except ImportError:  # Windows has no file locks
    fcntl = None

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEPT = "finished work is kept; run the same command to continue"
SLOW_IN_BF16 = ("efficientnet_b0",)  # on a CPU: depthwise convolutions run at half the speed of float32
# In error messages of torch and, the last, of oneDNN
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "create a primitive")

# Arguments that may change when a run resumes (device type, dtype and processes are compared instead)
NEUTRAL = ("seed", "out", "root", "force", "checkpoint_every", "graph", "device", "amp", "tta")

# In a run's name, settings that differ from their defaults appear in this order, as tag and value
TAGS = {
    "data": "", "classes": "only-", "fraction": "p", "epochs": "epochs", "batch_size": "batch", "steps_per_epoch": "steps",
    "lr": "lr", "optimizer": "", "momentum": "momentum", "weight_decay": "wd", "dropout": "dropout",
    "pretrained": "pretrained", "stem": "stem-", "schedule": "", "label_smoothing": "smooth", "amp": "amp-",
    "compile": "compiled", "way": "way", "shot": "shot", "query": "query", "episodes": "episodes",
    "animals": "animals-", "train_adapters": "adapters", "adapter_width": "width",
}  # fmt: skip


# Command line


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived."""


def command_line(main):
    """Run a script's main. Errors become one line on standard error, with exit status 2 for invalid arguments
    (ValueError), 1 for other expected ones, 130 for SIGINT, 143 for SIGTERM. TRACEBACK=1 shows tracebacks."""
    name = Path(sys.argv[0]).name

    def stop(signum, _):
        raise Stopped(signum)

    for signum in SIGNALS:
        signal.signal(signum, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    status = 0
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal_name = signal.Signals(stopped.args[0]).name
        advice = "the same command resumes from the last checkpoint, if there is one"
        print(f"{name}: stopped by {signal_name}: {advice}", file=sys.stderr)
        status = 128 + stopped.args[0]
    except BrokenPipeError:  # the reader, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{name}: error: standard output was closed: {KEPT}", file=sys.stderr)
        status = 1
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: error: {text}", file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # DistributedDataParallel leaves gloo's threads behind, even after destroy_process_group, and they can
        # abort the interpreter's exit with SIGABRT
        os._exit(status)
    if status:
        sys.exit(status)


def new_parser(doc):
    """A parser whose help begins with the script's docstring and whose errors are ValueErrors."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(message):
        hint = ": the option is --seed" if "--seeds" in message else " (--help lists all options)"
        raise ValueError(message + hint)

    parser.error = error
    return parser


def number(kind, low, high=math.inf, including=()):
    """An argparse type: a finite int or float between two bounds. including: those of them that are allowed."""

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and (low < value < high or value in including):
                return value
        what = "an integer" if kind is int else "a number"
        bounds = f"{'at least' if low in including else 'above'} {low}"
        bounds += f" and {'up to' if high in including else 'below'} {high}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"{text} is not {what} {bounds}")

    return parse


def add_arguments(parser):
    """The arguments that every run has."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--seed", type=number(int, 0, 2**31, (0,)), nargs="+", default=[1], metavar="K",
        help="one or more seeds, trained in sequence (default: 1)")  # fmt: skip
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="compute dtype; auto: bf16 on a GPU or CPU that supports it, else fp16 with a gradient scaler "
        "on a CUDA GPU, and float32 elsewhere; off: float32, without TF32")  # fmt: skip
    add("--no-graph", dest="graph", action="store_false", help="disable CUDA graphs")
    add("--out", default="results", help="folder for results (default: %(default)s)")
    add("--checkpoint-every", type=number(float, 0, including=(0,)), default=20.0, metavar="S",
        help="minimum seconds between checkpoints, saved after an epoch (default: %(default)g)")  # fmt: skip
    add("--force", action="store_true", help="run again even if a result exists")


def run_name(first, settings, defaults):
    """A run's folder name: `first` (architecture, augmentation), then each setting that is not its default.

    settings, defaults: {name: value}; names without a tag in TAGS are omitted.
    """
    parts = list(first)
    for name, tag in TAGS.items():
        value = settings.get(name)
        if value != defaults.get(name):
            value = value.replace(",", "+") if isinstance(value, str) else repr(value)
            parts.append(tag if settings[name] is True else f"{tag}{value}")
    return "-".join(parts)


def progress(items, what, total, count=lambda item: 1):
    """Yield the items, with a progress line on standard error if that is a terminal. total: the sum of
    count(item) over all items."""
    started = drawn = time.monotonic()
    done, terminal = 0, sys.stderr.isatty()
    for item in items:
        yield item
        done += count(item)
        now = time.monotonic()
        if terminal and now - drawn > 0.2:
            drawn, rate = now, done / (now - started)
            line = f"{what}: {done:,}/{total:,}, {rate:,.0f}/s, {(total - done) / rate:.0f} s left"
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# Files


def write_atomically(path, content):
    """Write a dictionary, as JSON to a .json file, otherwise with torch.save. An interruption leaves the old
    file or none, never a partial one."""
    temporary, buffer = path.with_name(f".{path.name}-{os.getpid()}"), io.BytesIO()
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=1).encode())
    else:
        torch.save(content, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): {KEPT}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path):
    """Admit one process at a time; others wait until it leaves the block or dies. path: the lock file.

    Works in shared folders whose file system supports locks. Without locks no process waits: work may be
    duplicated, but nothing is damaged, since files are written atomically.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while fcntl:
        lock = open(path, "a")  # noqa: SIM115 (held open to the end)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process holding {path}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
        lock.close()  # the previous owner has removed the file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if fcntl:
            lock.close()


# Devices


def use_device(name):
    """Make `--device` current and return it as a torch.device. Raises ValueError if it is unavailable."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    kind, _, index = name.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= counts.get(kind, 0):
        raise ValueError(f"--device {name}: not available on this machine; use auto or cpu")
    if kind == "mps" and world_size() > 1:
        raise ValueError(f"--device {name}: torchrun does not support it; use --device cpu")
    if kind == "cuda" and world_size() > 1:
        if index:
            raise ValueError(f"--device {name}: torchrun gives each process its own GPU; use --device cuda")
        index = os.environ["LOCAL_RANK"]
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus:
            raise ValueError(f"torchrun started more processes than the {gpus} GPUs available: use fewer")
    if kind == "cuda":  # streams and graphs belong to the current device
        torch.cuda.set_device(int(index or 0))
    return torch.device(kind, int(index)) if index else torch.device(kind)


def compute_dtype(args, device):
    """The dtype that `--amp` selects on a device: torch.float32, bfloat16 or float16."""
    if args.amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16: needs CUDA, but the device is {device.type}; use bf16 or off")
    if args.amp != "auto":
        return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    slow = getattr(args, "arch", None) in SLOW_IN_BF16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() and not slow else torch.float32


def cpu_has_bf16():
    """Whether the CPU multiplies bf16 natively; otherwise PyTorch emulates it, slowly."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # undocumented, so they may disappear
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def make_repeatable():
    """Make the same command give the same bits on the same machine, and disable TF32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling takes time, and nothing here reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False


# Several processes: torchrun --standalone --nproc_per_node=2 train.py ... No effect on a single process.


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def processes(args):
    """Join the processes that torchrun started; only rank 0 prints. Raises RuntimeError if one is lost."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield
        return
    if args.batch_size < 2 * world:
        raise ValueError(f"--batch-size {args.batch_size}: each of {world} processes needs two images")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Rank 0 may wait for another run's lock for hours; if a process dies, torchrun ends the others
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        with contextlib.redirect_stdout(io.StringIO()) if rank() else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RuntimeError(f"another process of this run was lost: {KEPT}") from error
        raise
    finally:
        dist.destroy_process_group()


def distribute(model):
    """The model with gradients averaged over processes and, on CUDA, batch norm over the whole batch (PyTorch
    has no SyncBatchNorm for CPUs)."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(model)


def share(batches):
    """Yield (inputs, labels, weight) for this process's part of each batch. The mean loss times weight,
    averaged over processes, is the mean over the whole batch."""
    world = world_size()
    for inputs, labels in batches:
        parts = [tensor.tensor_split(world)[rank()] for tensor in (inputs, labels)]
        if len(parts[1]):
            yield *parts, len(parts[1]) * world / len(labels)


def broadcast_buffers(model):
    """Broadcast rank 0's BatchNorm buffers."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def on_rank0(function, *arguments):
    """Call function(*arguments) on rank 0 only; return its value on every rank."""
    returned = [function(*arguments) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(returned)
    return returned[0]


# Checkpoint and result


class Run:
    """One seed of a run: arguments, seed, data set, device, compute dtype, and its result and checkpoint."""

    def __init__(self, args, seed, dataset, device, path):
        self.args, self.seed, self.dataset, self.device = args, seed, dataset, device
        self.dtype = compute_dtype(args, device)
        self.path = path  # the result file, results/<run>/seed<k>.json
        self.checkpoint = path.with_suffix(".ckpt")
        self.saved = time.monotonic()
        self.settings = {key: value for key, value in vars(args).items() if key not in NEUTRAL}
        self.settings |= {"seed": seed, "fingerprint": dataset.fingerprint}
        self.settings |= {"device": device.type, "dtype": str(self.dtype), "processes": world_size()}

    def save(self, stateful, history):
        """Save a checkpoint, unless the last is less than args.checkpoint_every seconds old.

        stateful: {name: object with state_dict()}; history: a JSON-serializable list.
        """
        if rank() or time.monotonic() - self.saved < self.args.checkpoint_every:
            return
        states = {name: thing.state_dict() for name, thing in stateful.items()}
        write_atomically(self.checkpoint, {"settings": self.settings, "history": history, "states": states})
        self.saved = time.monotonic()

    def restore(self, stateful):
        """Load the states of this run's checkpoint and return its history, or [] if none matches."""
        content = on_rank0(lambda: self.checkpoint.read_bytes() if self.checkpoint.exists() else b"")
        if not content:
            return []
        try:
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            settings, history, states = (saved[name] for name in ("settings", "history", "states"))
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError):
            print(f"{self.checkpoint} is damaged: restarting from scratch")
            return []
        every = sorted(self.settings.keys() | settings.keys())
        changed = [key for key in every if self.settings.get(key) != settings.get(key)]
        if changed:
            print(f"{self.checkpoint}: different settings ({', '.join(changed)}); restarting from scratch")
            return []
        for name, thing in stateful.items():
            thing.load_state_dict(states[name])
        print(f"resuming after epoch {len(history)} ({self.checkpoint})")
        return history


def finished(path, dataset):
    """The result at `path`, or None. A damaged one, or one from different images, is reported and ignored."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_bytes())
        complete = result["version"] == 1 and result["test"] and result["history"]
        if complete and result["data"]["fingerprint"] == dataset.fingerprint:
            return result
    except (ValueError, LookupError, TypeError, RecursionError):
        complete = False
    reason = "is damaged or not a result file"
    if complete:
        reason = f"comes from different images ({dataset.name} has changed)"
    print(f"{path} {reason}: running again")
    return None


def environment(run):
    """Versions, device and this code's commit, for the result file."""
    git = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"]
    try:
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name(run.device)
    else:
        device = f"{run.device.type} ({processor()}, {torch.get_num_threads()} threads)"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "device": device,
        "commit": commit,
        "dtype": str(run.dtype).removeprefix("torch."),
        "processes": world_size(),
    }


def processor():
    """The CPU's model name, which `platform` knows on few systems."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


# Seeds


def run_seeds(args, name, load, train):
    """Run the seeds that have no result yet, in sequence. Returns {seed: result}.

    load(args, device) returns the data set; train(run) the contents of seed<k>.pt and part of seed<k>.json.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) != world_size():
        raise ValueError("only train.py supports torchrun: start this script directly, one process per GPU")
    device = use_device(args.device)
    compute_dtype(args, device)  # raises before the data set is loaded
    make_repeatable()
    dataset, results = load(args, device), {}
    for seed in args.seed:
        path = Path(args.out) / name / f"seed{seed}.json"
        result = None if args.force else on_rank0(finished, path, dataset)
        if result:  # found without the lock, which a read-only folder would refuse
            print(f"{name} seed {seed}: skipped, its result exists ({path}); --force runs it again")
        else:
            with exclusive(path.with_suffix(".lock")) if rank() == 0 else contextlib.nullcontext():
                result = None if args.force else on_rank0(finished, path, dataset)  # by another process
                if not result:
                    print(f"\n{name} seed {seed} on {device} -> {path}", flush=True)
                    result = run_seed(Run(args, seed, dataset, device, path), train)
        results[seed] = result
    return results


def run_seed(run, train):
    """Train and test one seed; write and return the result."""
    if run.args.force:
        on_rank0(lambda: run.checkpoint.unlink(missing_ok=True))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    try:
        weights, outcome = train(run)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        sizes = [name for name in ("batch_size", "way", "shot", "query") if name in vars(run.args)]
        sizes = " ".join(f"--{name.replace('_', '-')} {getattr(run.args, name)}" for name in sizes)
        raise RuntimeError(f"out of memory on {run.device} with {sizes}: lower it; {KEPT}") from error
    if not math.isfinite(outcome["test"]["loss"]):
        raise RuntimeError(f"the test loss is {outcome['test']['loss']}: lower --lr, or use --amp off")
    peak = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None
    dataset = run.dataset
    shared = {"classes": list(dataset.classes), "mean": list(dataset.mean), "std": list(dataset.std)}
    splits = {split: len(getattr(dataset, split).labels) for split in ("train", "valid", "test")}
    result = {
        "version": 1,
        "config": {**vars(run.args), "seed": run.seed},
        "data": {"name": dataset.name, **shared, **splits, "fingerprint": dataset.fingerprint},
        "environment": environment(run),
        **outcome,
        "seconds": sum(entry["seconds"] for entry in outcome["history"]),
        "peak_memory_bytes": peak,  # of a CUDA GPU
    }

    def write():
        write_atomically(run.path.with_suffix(".pt"), {**shared, **weights})
        write_atomically(run.path, result)
        run.checkpoint.unlink(missing_ok=True)

    on_rank0(write)  # the others wait, since they may read the weights next
    return result
