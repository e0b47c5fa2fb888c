"""How fast it is here: ours and the others in turn, on the same images, medians of several rounds.

    python tests/benchmark.py augment                    # images/s of every augmentation
    python tests/benchmark.py train                      # training images/s of every architecture, against the plain recipe
    python tests/benchmark.py fewshot                    # episodes/s, against a plain loop
    python tests/benchmark.py augment --device cuda --json augment.json

Kornia and torchaug are measured where they are installed (pip install kornia torchaug).
"""

import argparse
import functools
import importlib.util
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import tabulate
import torch
import torchvision
from torch.nn import functional as F
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import augment
import data
import fewshot
import models
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


def plain_training(folder, arch, device):
    """One epoch of training as it is usually written: ImageFolder, DataLoader with workers, PIL transforms, float32,
    NCHW, and the loss read at every step. Returns a function that does an epoch."""
    steps = [
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3),
    ]
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(folder, transforms.Compose(steps)),
        batch_size=64,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, torch.get_num_threads()),
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
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


def benchmark_train(device, rounds):
    """Training images/s at batch 64 with flip, ours and the plain recipe's, an epoch in turn."""
    count = 64 * (10 if device.type == "cpu" else 300)
    dataset, rows = data.synthetic((count, 100, 100)), []
    split, streams = data.to_device(dataset.train, device), augment.parse("flip")
    with tempfile.TemporaryDirectory() as folder:
        image_files(folder, dataset.train.images, dataset.train.labels)
        for arch in models.ARCHITECTURES:
            args, _ = train.parse_arguments(["--data", "synthetic", "--arch", arch])
            model = models.build(arch).to(device, memory_format=torch.channels_last)
            optimizer = train.make_optimizer(model.parameters(), args, device)
            autocast, scaler = train.mixed_precision(args, device)
            totals = train.Totals(10, device)
            step = functools.partial(train.train_step, model, optimizer, scaler, autocast, totals)
            step = step if train.why_not_captured(args, device, scaler) else train.CapturedStep(step)

            def ours(model=model, step=step, totals=totals):
                batches = data.batches(split, 64, dataset.mean, dataset.std, device, streams, seed=1)
                train.train_epoch(model, step, batches, data.Progress("ours", count))
                return totals.metrics()

            seconds = in_turn(
                {"ours": ours, "plain recipe": plain_training(folder, arch, device)}, device, rounds
            )
            rates = {way: count / seconds[way] for way in seconds}
            rows.append({"what": arch, "rates": rates, "ratio": rates["ours"] / rates["plain recipe"]})
    return rows


def show_pairs(rows):
    names = list(dict.fromkeys(name for row in rows for name in row["rates"]))
    table = [
        [row["what"], *(f"{row['rates'][name]:,.1f}" if name in row["rates"] else "-" for name in names)]
        + [f"{row['ratio']:.1f}x"]
        for row in rows
    ]
    print(tabulate.tabulate(table, ["", *names, "ratio"], tablefmt="github", disable_numparse=True,
                            colalign=["left"] + ["right"] * (len(names) + 1)))  # fmt: skip


BENCHMARKS = {
    "augment": (benchmark_augment, show_augment),
    "train": (benchmark_train, show_pairs),
    "fewshot": (benchmark_fewshot, show_pairs),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--rounds", type=int, default=7, help="counted after one that is not (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write all figures here too")
    args = parser.parse_args()
    found = {"machine": machine(args.device)}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), "\n")
    for name in args.what:
        measure, show = BENCHMARKS[name]
        found[name] = measure(args.device, args.rounds)
        show(found[name])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
