"""How fast it is here: ours and the others in turn, on the same images, medians of several rounds.

    python tests/benchmark.py                            # all of it; or one or several of these:
    python tests/benchmark.py augment                    # images/s of every augmentation
    python tests/benchmark.py train                      # training images/s of every architecture, against the plain recipe
    python tests/benchmark.py fewshot                    # episodes/s, against a plain loop
    python tests/benchmark.py data --images 10000000     # decoding, and training on more images than memory holds
    python tests/benchmark.py jobs                       # several runs at a time on one device
    python tests/benchmark.py study -- --data cifar10    # how long run_all.sh with these options will take
    python tests/benchmark.py train --device cuda --json train.json

Kornia and torchaug are measured where they are installed (pip install kornia torchaug).
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tabulate
import torch
import torchvision
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))
import augment
import data
import fewshot
import models
import moe
import train

SIZES = (64, 1024, 16384)  # images in a batch
PER_IMAGE = 64  # on so many are ways timed that take one image after the other: their rate does not hang on N


def machine(device):
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else open(__file__) as file:
        name = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), name)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{name}, {torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__, "torchvision": torchvision.__version__}


def in_turn(ways, device, rounds):
    """Median seconds of each way, {name: function}: each once, then the next, round after round. The first
    round is not counted."""
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def the_others():
    """{augmentation: {name of another way: (kind, function)}}; kind says what it takes: a list of PIL images, a list
    of tensors, or a batch of bytes or of floats in [0, 1]; `chunks` is a batch way that must be told N."""
    torchvisions = {
        "flip": transforms.RandomHorizontalFlip(),
        "rotation": transforms.RandomRotation(15),
        "crop": transforms.RandomResizedCrop(32, scale=(0.8, 1.0)),
        "jitter": transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
        "autoaugment": transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
        "cutout": transforms.RandomErasing(p=0.5, scale=(0.02, 0.2), ratio=(0.3, 3.3)),
    }
    others = {name: {"torchvision tensor": ("tensors", way)} for name, way in torchvisions.items()}
    for name, way in torchvisions.items():
        if name != "cutout":  # RandomErasing takes no PIL image
            others[name]["torchvision PIL"] = ("pil", way)
    if importlib.util.find_spec("kornia"):
        import kornia.augmentation as kornia

        for name, way in {
            "flip": kornia.RandomHorizontalFlip(p=0.5),
            "rotation": kornia.RandomRotation(15.0, resample="nearest", p=1.0),
            "crop": kornia.RandomResizedCrop((32, 32), scale=(0.8, 1.0), cropping_mode="resample"),
            "jitter": kornia.ColorJitter(0.4, 0.4, 0.4, 0.1),
            "autoaugment": kornia.auto.AutoAugment("cifar10"),
            "cutout": kornia.RandomErasing(scale=(0.02, 0.2), ratio=(0.3, 3.3), p=0.5),
        }.items():
            others[name]["kornia"] = ("floats", way)
    if importlib.util.find_spec("torchaug"):
        import torchaug.transforms as torchaug

        batch = {"batch_transform": True}
        others["flip"]["torchaug"] = ("bytes", torchaug.RandomHorizontalFlip(0.5, **batch))
        # these draw one set of parameters a chunk: as many chunks as images
        for name, make in {
            "rotation": functools.partial(torchaug.RandomRotation, 15, **batch),
            "crop": functools.partial(torchaug.RandomResizedCrop, 32, scale=(0.8, 1.0), **batch),
            "jitter": functools.partial(torchaug.ColorJitter, 0.4, 0.4, 0.4, 0.1, **batch),
            "cutout": functools.partial(torchaug.RandomErasing, scale=(0.02, 0.2), ratio=(0.3, 3.3), **batch),
        }.items():
            others[name]["torchaug"] = ("chunks", make)
    return others


def benchmark_augment(device, rounds):
    """Rows of images/s, ours and the others', on 32x32 images at three sizes of a batch."""
    rows, others = [], the_others()
    drawn = data.synthetic((1024, 10, 10)).train.images
    for count in SIZES:
        images = drawn.repeat(-(-count // 1024), 1, 1, 1)[:count].to(device)
        floats = images.float() / 255
        few = list(images[:PER_IMAGE])
        pil = [transforms.functional.to_pil_image(image.cpu()) for image in few]
        for name, ours in augment.AUGMENTATIONS.items():
            generator = torch.Generator().manual_seed(1)
            ways, share = {"ours": functools.partial(ours, images, generator)}, {"ours": count}
            for other, (kind, way) in others[name].items():
                share[other] = (
                    len(few) if kind in ("pil", "tensors") or (kind == "chunks" and count > 1024) else count
                )
                if kind == "chunks":
                    way = way(num_chunks=share[other])
                source = {"pil": pil, "tensors": few, "floats": floats}.get(kind, images[: share[other]])
                each = kind in ("pil", "tensors")
                ways[other] = (
                    (lambda way, source: [way(x) for x in source])
                    if each
                    else (lambda way, source: way(source))
                )
                ways[other] = functools.partial(ways[other], way, source)
            rates = {way: share[way] / seconds for way, seconds in in_turn(ways, device, rounds).items()}
            best = max((way for way in rates if way != "ours"), key=rates.get)
            row = {
                "images": count,
                "augmentation": name,
                "rates": rates,
                "ratio": rates["ours"] / rates[best],
                "best": best,
            }
            rows.append(row)
    return rows


def show_augment(rows):
    columns = ["ours", "torchvision PIL", "torchvision tensor", "kornia", "torchaug"]
    columns = [column for column in columns if any(column in row["rates"] for row in rows)]
    table = [
        [row["images"], row["augmentation"]]
        + [f"{row['rates'][column]:,.0f}" if column in row["rates"] else "-" for column in columns]
        + [f"{row['ratio']:.1f}x {row['best']}"]
        for row in rows
    ]
    headers = ["N", "images/s", *columns, "ours to the fastest other"]
    print(tabulate.tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=["right", "left"]
                            + ["right"] * len(columns) + ["left"]))  # fmt: skip


class PlainAttention(torch.nn.MultiheadAttention):
    def forward(self, tokens):
        return super().forward(tokens, tokens, tokens)[0]


def image_files(folder, images, labels):
    """A folder in ImageFolder's layout."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = Path(folder) / data.CLASSES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        transforms.functional.to_pil_image(image).save(path)
    return folder


def plain_episodes(folder, args, device):
    """Few-shot training as it is usually written: a data set that decodes and augments image after image, PyTorch's
    own attention, float32, support and query embedded one after the other. Returns a function that does one step."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    support_set = datasets.ImageFolder(folder, transforms.Compose(to_tensor))
    query_set = datasets.ImageFolder(
        folder, transforms.Compose([transforms.RandomHorizontalFlip(), policy, *to_tensor])
    )
    rows = [[i for i, label in enumerate(support_set.targets) if label == c] for c in range(10)]
    model = models.FewShotEmbedding()
    model.attention = PlainAttention(64, 2, batch_first=True)
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    labels = torch.arange(args.way, device=device).repeat_interleave(args.query)

    def step():
        support, query = [], []
        for label in random.sample(range(10), args.way):
            chosen = random.sample(rows[label], args.shot + args.query)
            support += [support_set[i][0] for i in chosen[: args.shot]]
            query += [query_set[i][0] for i in chosen[args.shot :]]
        prototypes = model(torch.stack(support).to(device)).view(args.way, args.shot, -1).mean(1)
        logits = -torch.cdist(model(torch.stack(query).to(device)), prototypes).square()
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def benchmark_fewshot(device, rounds):
    """Episodes/s of 5-way 5-shot training with 10 queries a class, ours and the plain loop's."""
    args, count = fewshot.parse_arguments(["--data", "synthetic", "--fraction", "0.01"])[0], 20
    dataset = data.synthetic((1000, 100, 100))
    split = data.to_device(dataset.train, device)
    network = fewshot.Prototypes(models.FewShotEmbedding(), args.way, args.shot)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = train.make_optimizer(network.parameters(), args, device)
    autocast, scaler = train.mixed_precision(args, device)
    generator, streams = torch.Generator().manual_seed(1), augment.parse("flip+autoaugment")
    totals = train.Totals(args.way, device)
    captured = functools.partial(train.train_step, network, optimizer, scaler, autocast, totals)
    captured = captured if train.why_not_captured(args, device, scaler) else train.CapturedStep(captured)

    def ours():
        batches = fewshot.episodes(split, dataset, args, count, device, generator, streams)
        train.train_epoch(network, captured, batches, data.Progress("ours", 75 * count))
        return totals.metrics()

    with tempfile.TemporaryDirectory() as folder:
        step = plain_episodes(image_files(folder, dataset.train.images, dataset.train.labels), args, device)
        ways = {"ours": ours, "plain loop": lambda: [step() for _ in range(count // 2)]}
        seconds = in_turn(ways, device, rounds)
    rates = {"ours": count / seconds["ours"], "plain loop": count // 2 / seconds["plain loop"]}
    return [{"what": "episodes/s", "rates": rates, "ratio": rates["ours"] / rates["plain loop"]}]


def plain_loader(folder, device):
    """Batches as they are usually made: ImageFolder, PIL transforms, worker processes."""
    steps = [
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3),
    ]
    return torch.utils.data.DataLoader(
        datasets.ImageFolder(folder, transforms.Compose(steps)),
        batch_size=64,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, torch.get_num_threads()),
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def plain_training(folder, arch, device):
    """One epoch of training as it is usually written: float32, NCHW, and the loss read at every step. Returns a
    function that does an epoch."""
    loader = plain_loader(folder, device)
    model = models.build(arch).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)

    def epoch():
        model.train()
        total = 0.0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    return epoch


def our_training(dataset, split, arch, device, repeatable=True):
    """As plain_training, through the functions of train.py. repeatable: with deterministic algorithms, as train.py."""
    args, _ = train.parse_arguments(["--data", "synthetic", "--arch", arch])
    model = models.build(arch).to(device, memory_format=torch.channels_last)
    optimizer = train.make_optimizer(model.parameters(), args, device)
    autocast, scaler = train.mixed_precision(args, device)
    totals = train.Totals(10, device)
    step = functools.partial(train.train_step, model, optimizer, scaler, autocast, totals)
    step = step if train.why_not_captured(args, device, scaler) else train.CapturedStep(step)
    streams = augment.parse("flip")

    def epoch(batches=None):
        train.make_repeatable()
        if not repeatable:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = True
        batches = batches or data.batches(split, 64, dataset.mean, dataset.std, device, streams, seed=1)
        train.train_epoch(model, step, batches, data.Progress("ours", len(split.labels)))
        return totals.metrics()

    return epoch


def benchmark_train(device, rounds):
    """Training images/s at batch 64 with flip, ours (also without determinism) and the plain recipe's, an epoch in
    turn; and how far ours is from what the device can do."""
    count = 64 * (10 if device.type == "cpu" else 300)
    dataset, rows = data.synthetic((count, 100, 100)), []
    split = data.to_device(dataset.train, device)
    with tempfile.TemporaryDirectory() as folder:
        image_files(folder, dataset.train.images, dataset.train.labels)
        for arch in models.ARCHITECTURES:
            ways = {
                "ours": our_training(dataset, split, arch, device),
                "not repeatable": our_training(dataset, split, arch, device, repeatable=False),
                "plain recipe": plain_training(folder, arch, device),
            }
            rates = {way: count / seconds for way, seconds in in_turn(ways, device, rounds).items()}
            row = {"what": arch, "rates": rates, "ratio": rates["ours"] / rates["plain recipe"]}
            rows.append({**row, **limits(arch, device)})
    return rows


@functools.cache
def peaks(device, dtype):
    """Multiply-adds a second of a large matrix product, and bytes a second of a large copy, the best of ten."""
    size = 2048 if device.type == "cpu" else 8192
    factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
    source, target = torch.empty(
        2, 2**28 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device
    )
    seconds = []
    for work in (lambda: factors[0] @ factors[1], lambda: target.copy_(source)):
        times = [in_turn({"work": work}, device, 1)["work"] for _ in range(10)]
        seconds.append(min(times))
    return size**3 / seconds[0], 2 * len(source) / seconds[1]


def limits(arch, device):
    """Multiply-adds and bytes of a training image, and the images/s that either allows at the device's peak.

    Bytes, the fewest without fusion: what a layer puts out is written, read by the next, kept and read again on the way
    back, where its gradient is written and read: five times its size. Adam reads four and writes three float32 of each
    parameter a step.
    """
    args, _ = train.parse_arguments(["--data", "synthetic", "--arch", arch])
    dtype = train.precision(args, device) or torch.float32
    model, images = models.build(arch).train(), torch.randn(64, 3, 32, 32)
    outputs = []
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, given, out: outputs.append(out.numel()))
    with FlopCounterMode(display=False) as counter:
        model(images)
    products = 3 * counter.get_total_flops() / 2 / 64  # the way back takes twice as many
    parameters = sum(p.numel() for p in model.parameters())
    moved = (5 * sum(outputs) * dtype.itemsize + 7 * 4 * parameters) / 64
    peak, bandwidth = peaks(device, dtype)
    return {
        "multiply_adds": products,
        "bytes": moved,
        "limits": {"arithmetic": peak / products, "memory": bandwidth / moved},
        "peak": peak,
        "bandwidth": bandwidth,
    }


def show_train(rows):
    show_pairs(rows)
    table = []
    for row in rows:
        bound = min(row["limits"], key=row["limits"].get)
        table.append(
            [
                row["what"],
                f"{row['multiply_adds'] / 1e6:,.0f} M",
                f"{row['bytes'] / 1e6:,.1f} MB",
                f"{row['limits']['arithmetic']:,.0f}",
                f"{row['limits']['memory']:,.0f}",
                f"{row['rates']['ours'] / row['limits'][bound]:.0%} of {bound}",
            ]
        )
    headers = ["an image", "multiply-adds", "moves", "images/s by arithmetic", "by memory", "ours reaches"]
    print("\n" + tabulate.tabulate(table, headers, tablefmt="github", disable_numparse=True,
                                   colalign=["left"] + ["right"] * 5))  # fmt: skip
    print(
        f"\npeak here: {rows[0]['peak'] / 1e9:,.0f} G multiply-adds/s in a matrix product, "
        f"{rows[0]['bandwidth'] / 1e9:,.1f} GB/s in a copy"
    )


def benchmark_data(device, rounds, count=200_000):
    """Images/s of decoding a folder and of an epoch's batches, ours and the plain recipe's; then batches and training
    on `count` images in a file, in turn with a set that fits."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder, some = Path(folder), data.synthetic((4000, 200, 200))
        for split in ("train", "test"):
            image_files(folder / split, *getattr(some, split))
        loader, roots = plain_loader(folder / "train", device), iter(range(10**6))

        def decode():
            return data.load(folder, folder / f"root{next(roots)}")

        held = data.to_device(decode().train, device)

        def epoch():
            batches = data.batches(held, 64, some.mean, some.std, device, augment.parse("flip"), seed=1)
            return sum(len(labels) for _, labels in batches)

        for what, ours in {"decoding, once": decode, "an epoch's batches, with flip": epoch}.items():
            ways = {"ours": ours, "plain recipe": lambda: sum(len(labels) for _, labels in loader)}
            rates = {way: 4000 / seconds for way, seconds in in_turn(ways, device, rounds).items()}
            rows.append({"what": what, "rates": rates, "ratio": rates["ours"] / rates["plain recipe"]})

        sizes = {"of a set that fits": min(20_000, count), f"of {count:,} in a file": count}
        splits = {name: data_file(folder / f"{size}.npy", size) for name, size in sizes.items()}
        splits["of a set that fits"] = data.to_device(in_memory(splits["of a set that fits"]), device)
        for what, chunks in {"batches": 16, "training custom": 2 if device.type == "cpu" else 64}.items():
            taken = chunks * data.CHUNK
            ways = {}
            for name, split in splits.items():
                use = our_training(some, split, "custom", device) if what != "batches" else exhaust
                source = endless(split, some, device)
                ways[name] = lambda use=use, source=source, taken=taken: use(
                    itertools.islice(source, taken // 64)
                )
            rates = {way: taken / seconds for way, seconds in in_turn(ways, device, min(rounds, 3)).items()}
            fits, in_file = rates.values()
            rows.append({"what": what, "rates": rates, "ratio": in_file / fits, "memory": own_memory()})
    return rows


def data_file(path, count):
    """A split of `count` random images that lie in a file."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, 32, 32))
    block = torch.randint(256, (10_000, 3, 32, 32), dtype=torch.uint8).numpy()
    for start in range(0, count, len(block)):
        array[start : start + len(block)] = block[: count - start]
    array.flush()
    return data.Split(data.mapped(path), torch.arange(count) % 10)


def in_memory(split):
    return data.Split(split.images.clone(), split.labels)


def endless(split, dataset, device):
    """Epoch after epoch of batches with flip."""
    streams = augment.parse("flip")
    for epoch in itertools.count():
        yield from data.batches(split, 64, dataset.mean, dataset.std, device, streams, 1, epoch)


def exhaust(batches):
    for _ in batches:
        pass


def own_memory():
    """Bytes of memory that this process holds and no file backs; None where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


def show_data(rows):
    show_pairs(rows)
    memory = [row["memory"] for row in rows if row.get("memory")]
    if memory:
        print(f"\nmemory held beside the file: {' and '.join(f'{m / 1e9:.2f} GB' for m in memory)}")


def show_pairs(rows):
    names = list(dict.fromkeys(name for row in rows for name in row["rates"]))
    table = [
        [row["what"], *(f"{row['rates'][name]:,.1f}" if name in row["rates"] else "-" for name in names)]
        + [f"{row['ratio']:.1f}x"]
        for row in rows
    ]
    print(tabulate.tabulate(table, ["", *names, "ratio"], tablefmt="github", disable_numparse=True,
                            colalign=["left"] + ["right"] * (len(names) + 1)))  # fmt: skip


def timed_runs(commands, out, threads=None):
    """Wall seconds and result files of runs of the project's scripts, all at once."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    processes, started = [], time.perf_counter()
    for number, command in enumerate(commands):
        words = [sys.executable, *map(str, command), "--out", str(out / str(number))]
        quiet = {"stdout": subprocess.DEVNULL, "cwd": HOUSE, "env": environment}
        processes.append((time.perf_counter(), subprocess.Popen(words, **quiet)))
    seconds = []
    for begun, process in processes:
        if process.wait():
            sys.exit("a run failed: see above")
        seconds.append(time.perf_counter() - begun)
    results = [json.loads(path.read_text()) for path in sorted(out.rglob("seed*.json"))]
    return time.perf_counter() - started, statistics.median(seconds), results


@contextlib.contextmanager
def multi_process_service():
    """CUDA MPS, by which processes share a GPU at the same moment, for the time inside."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(CUDA_MPS_PIPE_DIRECTORY=folder, CUDA_MPS_LOG_DIRECTORY=folder)
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=False)
            for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
                del os.environ[name]


def benchmark_jobs(device, rounds):
    """Training images/s of all of 1, 2, 4, 8 runs at a time (seeds of the custom network), on a GPU with MPS too."""
    cuda, rows = device.type == "cuda", []
    epochs = 60 if cuda else 2
    run = [
        "train.py",
        "--data",
        "synthetic",
        "--epochs",
        epochs,
        "--device",
        device,
        "--aug",
        "flip",
        "--seed",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for service in (False, True) if cuda and shutil.which("nvidia-cuda-mps-control") else (False,):
            for jobs in (1, 2, 4, 8) if cuda else (1, 2):
                threads = None if cuda else max(1, os.cpu_count() // jobs)
                with multi_process_service() if service else contextlib.nullcontext():
                    place = Path(folder) / f"{jobs}{service}"
                    _, seconds, results = timed_runs([[*run, k] for k in range(jobs)], place, threads)
                rates = [statistics.median(e["images_per_second"] for e in r["history"][1:]) for r in results]
                row = {"what": f"{jobs} at a time{', MPS' if service else ''}", "seconds": seconds}
                row["rates"] = {"images/s, each": statistics.mean(rates), "images/s, all": sum(rates)}
                rows.append(
                    {**row, "ratio": sum(rates) / (rows[0] if rows else row)["rates"]["images/s, all"]}
                )
    return rows


def sample(arch, device, jobs, folder):
    """What a run of an architecture (or `fewshot`) costs, with `jobs` going at once: seconds to start, and seconds of
    a training image and of an evaluated one (of few-shot: of an episode)."""
    epochs = 8 if device.type == "cuda" else 2
    run = {"fewshot": ["fewshot.py", "--fraction", 0.1, "--query", 10, "--episodes", 200]}
    run = run.get(arch, ["train.py", "--arch", arch, "--aug", "flip", "--epochs", epochs])
    threads = max(1, os.cpu_count() // jobs) if device.type == "cpu" and jobs > 1 else None
    commands = [[*run, "--data", "synthetic", "--device", device, "--seed", k] for k in range(jobs)]
    _, seconds, results = timed_runs(commands, folder / arch, threads)
    history = results[0]["history"]  # the first entry has what every start has
    train_seconds = statistics.median(
        2000 / e["images_per_second"] if arch != "fewshot" else e["seconds"] for e in history[1:]
    )
    counts = results[0]["data"]
    if arch == "fewshot":
        return {"start": seconds - len(history) * train_seconds, "train": train_seconds / 100, "evaluate": 0}
    valid_seconds = statistics.median(e["seconds"] for e in history[1:]) - train_seconds
    evaluate = valid_seconds / counts["valid"]
    start = seconds - len(history) * (train_seconds + valid_seconds) - evaluate * counts["test"]
    return {"start": start, "train": train_seconds / counts["train"], "evaluate": evaluate}


def benchmark_study(device, rounds, options=()):
    """How long `run_all.sh` with these options will take here, from samples of runs of each kind: for each, how many
    runs and their hours."""
    listed = ["bash", "run_all.sh", *options]
    at = listed.index("--") if "--" in listed else len(listed)
    listed = [*listed[:at], "--list", *listed[at:]]
    commands = subprocess.run(listed, check=False, cwd=HOUSE, capture_output=True, text=True)
    if commands.returncode:
        sys.exit(commands.stderr.strip())
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    jobs = (
        int(options[options.index("--jobs") + 1])
        if "--jobs" in options
        else 2
        if "--smoke" in options
        else gpus or 1
    )
    costs, kinds, seeds_of_base = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for command in map(shlex.split, commands.stdout.splitlines()):
            script, words = Path(command[1]).stem, command[2:]
            if script == "augment":
                continue
            args, _ = {"train": train, "fewshot": fewshot, "moe": moe}[script].parse_arguments(words)
            kind = args.arch if script == "train" else script
            sampled = "custom" if script == "moe" else kind
            if sampled not in costs:
                costs[sampled] = sample(sampled, device, -(-jobs // max(gpus, 1)), Path(folder))
            cost, counts = costs[sampled], split_sizes(args)
            if script == "fewshot":  # an episode of the sample has 75 images
                work = args.episodes * cost["train"] * args.way * (args.shot + args.query) / 75
            elif script == "train":
                images = counts[0] * args.epochs * (2 if args.aug == "hybrid" else 1)
                work = images * cost["train"] + (counts[1] * args.epochs + counts[2]) * cost["evaluate"]
                if args.aug == "hybrid" and args.dropout == 0.2 and not args.classes:
                    seeds_of_base = args.seed
            else:  # three experts look at every image, and bases at the test split; it may lack some of these
                work = (3 * sum(counts) + 4 * counts[2]) * cost["evaluate"]
                lacks = len(set(moe.ENSEMBLE) - set(seeds_of_base)) / len(args.seed)
                work += lacks * (counts[0] * args.epochs * 2) * cost["train"]
            runs, seconds = kinds.get(kind, (0, 0))
            kinds[kind] = (runs + len(args.seed), seconds + cost["start"] + len(args.seed) * work)
    return {
        "jobs": jobs,
        "kinds": kinds,
        "hours": sum(seconds for _, seconds in kinds.values()) / jobs / 3600,
    }


@functools.cache
def sizes_of(name, root):
    dataset = None if name == "cinic10" else data.load(name, root)
    return [90_000] * 3 if dataset is None else [len(getattr(dataset, part).labels) for part in data.SPLITS]


def split_sizes(args):
    """Images in each split of a run's data."""
    counts = sizes_of(args.data, args.root)
    share = 1 if not args.classes else (len(data.GROUPS.get(args.classes) or args.classes.split(","))) / 10
    return [counts[0] * args.fraction * share, counts[1] * share, counts[2] * share]


def show_study(found):
    table = [[kind, runs, f"{seconds / 3600:.2f} h"] for kind, (runs, seconds) in found["kinds"].items()]
    print(tabulate.tabulate(table, ["", "runs", "one at a time"], tablefmt="github", disable_numparse=True))
    hours = found["hours"]
    took = f"{hours * 60:.1f} minutes" if hours < 3 else f"{hours:.1f} hours"
    print(f"\nall of it, {found['jobs']} at a time: {took}")


BENCHMARKS = {
    "augment": (benchmark_augment, show_augment),
    "train": (benchmark_train, show_train),
    "fewshot": (benchmark_fewshot, show_pairs),
    "data": (benchmark_data, show_data),
    "jobs": (benchmark_jobs, show_pairs),
    "study": (benchmark_study, show_study),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--rounds", type=int, default=7, help="counted after one that is not (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=200_000, help="in the file of data (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.epilog = "What follows -- are options of run_all.sh, for study."
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:at])
    if unknown := set(args.what) - set(BENCHMARKS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    more = {"data": [args.images], "study": [given[at + 1 :]]}
    found = {"machine": machine(args.device)}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    for name in args.what or BENCHMARKS:
        measure, show = BENCHMARKS[name]
        print(f"\n{name}\n")
        found[name] = measure(args.device, args.rounds, *more.get(name, ()))
        show(found[name])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
