"""How fast it is here: ours and the others in turn, on the same images, medians of several rounds.

    python tests/benchmark.py augment                    # images/s of every augmentation
    python tests/benchmark.py augment --device cuda --json augment.json

Kornia and torchaug are measured where they are installed (pip install kornia torchaug).
"""

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import tabulate
import torch
import torchvision
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import augment
import data

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


BENCHMARKS = {"augment": (benchmark_augment, show_augment)}


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
