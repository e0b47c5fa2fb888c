"""What all runs share: errors, signals, files, devices, checkpoints, results, seeds.

Every script passes its `main` to `command_line` and its training function to `run_seeds`:

    def train(run):                      # run.args, run.seed, run.dataset, run.device, run.dtype
        history = run.restore(states)    # [], or loads an interrupted run's states and returns its epochs
        ...
        run.save(states, history)        # after an epoch
        return weights, outcome          # for seed<k>.pt and seed<k>.json
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows has no file locks
    fcntl = None

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEPT = "finished work is kept; run the same command to continue"
# The files that train every run, besides its own script
CODE = ("augment.py", "data.py", "models.py", "runs.py", "train.py")
SLOW_IN_BF16 = ("efficientnet_b0",)  # on a CPU: depthwise convolutions run at half the speed of float32
# Arguments that do not identify a run. The dtype stands for `amp`; the fingerprint and class names stand for
# `data` and `classes`, which can be written in several ways
NEUTRAL = ("seed", "out", "root", "force", "checkpoint_every", "graph", "device", "amp", "data", "classes")

# In a run's name, settings that differ from their defaults appear in this order, as tag and value
TAGS = {
    "data": "", "classes": "only-", "fraction": "p", "epochs": "epochs", "batch_size": "batch",
    "steps_per_epoch": "steps", "lr": "lr", "optimizer": "", "momentum": "momentum", "weight_decay": "wd",
    "dropout": "dropout", "pretrained": "pretrained", "stem": "stem-", "schedule": "", "label_smoothing": "smooth",
    "amp": "amp-", "way": "way", "shot": "shot", "query": "query", "episodes": "episodes",
    "experts": "experts-", "train_adapters": "adapters", "adapter_width": "width",
}  # fmt: skip


# Command line


def command_line(main):
    """Run a script's main. Errors become one line on standard error, with exit status 2 for invalid arguments
    (ValueError), 1 for other expected ones, 130 for SIGINT, 143 for SIGTERM. TRACEBACK=1 shows tracebacks."""
    name, status = Path(sys.argv[0]).name, 0

    def stop(signum, _):
        for number in SIGNALS:  # a second one must not interrupt the handling of the first
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt(signum)

    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, stream), "reconfigure"):  # a notebook's streams lack it
            getattr(sys, stream).reconfigure(errors="backslashreplace")  # for characters an encoding lacks
    main_thread = threading.current_thread() is threading.main_thread()  # no other may handle signals
    before = {signum: signal.signal(signum, stop) for signum in SIGNALS if main_thread}
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        signal_name = signal.Signals(stopped.args[0]).name
        advice = "the same command resumes from the last checkpoint (see --checkpoint-every), if there is one"
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
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if status:
        sys.exit(status)


def new_parser(doc):
    """A parser whose help begins with the script's docstring and whose errors are ValueErrors."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(message):
        hint = " (--help lists all options)"
        _, unknown, words = message.partition("unrecognized arguments: ")
        wrong = next((word.split("=")[0] for word in words.split() if word.startswith("-")), None)
        if wrong:
            options = [option for option in parser._option_string_actions if option.startswith("--")]
            nearest = difflib.get_close_matches(wrong, options, 1, 0.6)
            hint = f": did you mean {nearest[0]}?" if nearest else hint
        elif unknown:
            hint = ": write values as in --data folder, --seed 1 2 3, --aug flip+crop, --classes cat,dog"
        raise ValueError(message + hint)

    parser.error = error
    return parser


def number(kind, interval):
    """An argparse type: an int or float in an interval, such as "(0, 1]" or "[1, inf)"."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            at_end = (value == low and "[" in interval) or (value == high and "]" in interval)
            if low < value < high or at_end:
                return value
        what = "an integer" if kind is int else "a number"
        several = re.search(r"\d([,;:]|-|\.\.)\d", text)
        hint = ": write decimals as 0.5, several seeds as 1 2 3" if several else ""
        raise argparse.ArgumentTypeError(f"{text} is not {what} in {interval}{hint}")

    return parse


def add_arguments(parser):
    """The arguments common to all runs."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--seed", type=number(int, "[0, 2147483647]"), nargs="+", default=[1], metavar="K",
        help="one or more seeds, trained in sequence (default: 1)")  # fmt: skip
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="compute dtype; auto: bf16 on a GPU or CPU that supports it, else fp16 with a gradient scaler "
        "on a CUDA GPU, and float32 elsewhere; off: float32, without TF32")  # fmt: skip
    add("--no-graph", dest="graph", action="store_false", help="disable CUDA graphs")
    add("--out", type=os.path.expanduser, default="results", help="folder for results (default: %(default)s)")
    add("--checkpoint-every", type=number(float, "[0, inf)"), default=20.0, metavar="S",
        help="minimum seconds between checkpoints, which follow an epoch (default: %(default)g)")  # fmt: skip
    add("--force", action="store_true", help="run again even if a result exists")


def run_name(first, settings, defaults):
    """A run's folder name: `first`, such as its architecture, then settings that differ from their defaults.

    settings, defaults: {name: value}; "data" is the data set's name. Raises LookupError for a setting that is
    in neither TAGS nor NEUTRAL, since two different runs would share a folder.
    """
    parts, known = list(first), {*TAGS, *NEUTRAL, "arch", "aug"}
    for name in settings:
        if name not in known:
            raise LookupError(f"--{name.replace('_', '-')}: add it to TAGS in runs.py, or to NEUTRAL")
    for name, tag in TAGS.items():
        value = settings.get(name)
        if value is True:
            parts.append(tag)
        elif value != defaults.get(name):
            parts.append(value if name == "data" else tag + readable(value))
    return "-".join(parts)


def readable(value):
    """A setting's value as part of a file name: short, safe and different for different values."""
    text = value if isinstance(value, str) else "\0".join(value) if isinstance(value, list) else repr(value)
    safe = re.sub(r"[^\w.+-]", "_", text.replace(",", "+"), flags=re.ASCII)
    if len(safe) <= 60 and not re.search("[^A-Za-z0-9.,\0-]", text):
        return safe
    return f"{safe[:50]}-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:8]}"


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
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be overwritten
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# Files


def write_atomically(path, content):
    """Write a dictionary, as JSON to a .json file, otherwise with torch.save. An interruption leaves the old
    file or none, never a partial one. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if path.suffix == ".json":
                file.write(json.dumps(content, indent=1).encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save's own RuntimeError hides a full disk's OSError
        reason = getattr(error.__context__ or error, "strerror", error)
        raise OSError(f"{path} cannot be written ({reason}): {KEPT}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path):
    """Admit one process at a time; others wait until it leaves the block or dies. path: the lock file. If the
    file system has no locks, work may be done twice, but nothing is damaged: files are written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:  # never removed: a process may be waiting for it
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process holding {path}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # no locks here
                pass
        yield


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
    # Undocumented, so they may disappear. A CPU that has neither would emulate bf16, slowly
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, name)() for name in native if hasattr(torch.cpu, name))
    slow = getattr(args, "arch", None) in SLOW_IN_BF16
    return torch.bfloat16 if device.type == "cpu" and fast and not slow else torch.float32


def make_repeatable():
    """Make the same command give the same bits on the same machine, and disable TF32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling takes time, and nothing here reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False


# Checkpoint and result


class Run:
    """One seed of a run: arguments, seed, data set, device, compute dtype, and its result and checkpoint."""

    def __init__(self, args, seed, dataset, device, path, code=None):
        self.args, self.seed, self.dataset, self.device = args, seed, dataset, device
        self.dtype = compute_dtype(args, device)
        self.path, self.checkpoint = path, path.with_suffix(".ckpt")  # path: results/<run>/seed<k>.json
        self.code = code  # from code_hash
        self.saved = time.monotonic()
        data = {"fingerprint": dataset.fingerprint, "classes": list(dataset.classes)}
        self.settings = identity({**vars(args), "seed": seed}, data)
        # Compared only with a checkpoint's
        self.settings |= {"device": device.type, "dtype": str(self.dtype)}

    def save(self, stateful, history):
        """Save a checkpoint, unless the last is less than args.checkpoint_every seconds old.

        stateful: {name: object with state_dict()}; history: a JSON-serializable list.
        """
        if time.monotonic() - self.saved < self.args.checkpoint_every:
            return
        states = {name: thing.state_dict() for name, thing in stateful.items()}
        content = {"settings": self.settings, "code": self.code, "history": history, "states": states}
        write_atomically(self.checkpoint, content)
        self.saved = time.monotonic()

    def restore(self, stateful):
        """Load the states of this run's checkpoint and return its history, or [] if none matches."""
        if not self.checkpoint.exists():
            return []
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            settings, history, states = (saved[name] for name in ("settings", "history", "states"))
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError):
            print(f"{self.checkpoint} is damaged: restarting from scratch")
            return []
        if changed := differences(self.settings, settings):
            print(f"{self.checkpoint}: different settings ({', '.join(changed)}); restarting from scratch")
            return []
        for name, thing in stateful.items():
            try:
                thing.load_state_dict(states[name])
            except (RuntimeError, ValueError, LookupError) as error:
                text = f"{self.checkpoint} does not fit this code's {name}: --force starts from scratch"
                raise RuntimeError(text) from error
        other = "" if saved.get("code") == self.code else ", which other code saved"
        print(f"resuming after epoch {len(history)} ({self.checkpoint}{other})")
        return history


def identity(config, data):
    """What identifies a run: its settings and seed, and the images and classes of its data set."""
    settings = {key: value for key, value in config.items() if key not in NEUTRAL}
    return settings | {key: data[key] for key in ("fingerprint", "classes")} | {"seed": config["seed"]}


def differences(settings, others):
    """The settings that differ, as `lr 0.002, not 0.001`. A setting that only one side has is ignored: a
    newer option has its default in both, since any other value changes the run's name."""
    both = sorted(settings.keys() & others.keys())
    return [f"{key} {settings[key]}, not {others[key]}" for key in both if settings[key] != others[key]]


def finished(path, settings):
    """The result at `path`, or None. A damaged one is reported and ignored. settings: from `identity`. Raises
    RuntimeError for a result with different settings, which is never replaced."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_bytes())
        if not (result["version"] == 1 and result["test"] and result["history"]):
            raise ValueError
        theirs = identity(result["config"], result["data"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        print(f"{path} is damaged or not a result file: running again")
        return None
    if changed := differences(settings, theirs):
        raise RuntimeError(f"{path} has different settings (now {'; '.join(changed)}): --force replaces it")
    return result


def code_hash(script):
    """8 hexadecimal digits of the SHA-256 of the files that train every run, and of the script."""
    digest = hashlib.sha256()
    for path in [Path(__file__).with_name(name) for name in CODE] + [Path(script)]:
        digest.update(path.read_bytes() if path.is_file() else b"")  # a notebook's cell is not a file
    return digest.hexdigest()[:8]


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
        capability = torch.backends.cpu.get_cpu_capability()
        device = f"{run.device.type} ({capability}, {torch.get_num_threads()} threads)"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["torchvision"] = metadata.version("torchvision")
    dtype = str(run.dtype).removeprefix("torch.")
    return {**versions, "device": device, "commit": commit, "code": run.code, "dtype": dtype}


# Seeds


def run_seeds(args, name_run, load, train):
    """Run the seeds that have no result yet, in sequence. Returns the run's folder and {seed: result}.

    load(args, device) returns the data set, and may adapt args to it; name_run(args, its name, its selected
    classes) returns the folder's name; train(run) the contents of seed<k>.pt and part of seed<k>.json.
    """
    device = use_device(args.device)
    compute_dtype(args, device)  # raises before the data set is loaded
    make_repeatable()
    dataset, code, results = load(args, device), code_hash(train.__code__.co_filename), {}
    folder = Path(args.out) / name_run(args, dataset.name, dataset.only)
    for number, seed in enumerate(args.seed, start=1):
        run = Run(args, seed, dataset, device, folder / f"seed{seed}.json", code)
        results[seed] = None if args.force else finished(run.path, run.settings)
        if result := results[seed]:
            other = "" if result.get("environment", {}).get("code") == code else ", made by other code"
            exists = f"skipped, its result exists ({run.path}{other})"
            print(f"{folder.name} seed {seed}: {exists}; --force runs it again")
            continue
        with exclusive(Path(args.out) / ".locks" / f"{folder.name}-seed{seed}"):
            several = f" ({number} of {len(args.seed)})" if len(args.seed) > 1 else ""
            print(f"\n{folder.name} seed {seed}{several} on {device} -> {run.path}", flush=True)
            result = None if args.force else finished(run.path, run.settings)  # from another process
            results[seed] = result or run_seed(run, train)
    return folder, results


def run_seed(run, train):
    """Train and test one seed; write and return the result."""
    if run.args.force:
        run.checkpoint.unlink(missing_ok=True)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        weights, outcome = train(run)
    finally:
        with contextlib.suppress(OSError):
            run.path.parent.rmdir()  # only if empty, as after a failure before the first checkpoint
    peak = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None
    dataset = run.dataset
    shared = {"classes": list(dataset.classes), "mean": list(dataset.mean), "std": list(dataset.std)}
    splits = {split: len(getattr(dataset, split).labels) for split in ("train", "valid", "test")}
    result = {
        "version": 1,
        "config": {**vars(run.args), "seed": run.seed, "classes": dataset.only},
        "data": {"name": dataset.name, **shared, **splits, "fingerprint": dataset.fingerprint},
        "environment": environment(run),
        **outcome,
        "seconds": sum(entry["seconds"] for entry in outcome["history"]),
        "peak_memory_bytes": peak,  # None without CUDA
    }
    write_atomically(run.path.with_suffix(".pt"), {**shared, **weights})
    write_atomically(run.path, result)
    run.checkpoint.unlink(missing_ok=True)
    return result
