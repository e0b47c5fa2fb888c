"""Benchmark our code against alternatives, in turn and on the same images; medians of several rounds.

    python tests/benchmark.py                            # everything, or one or several of these:
    python tests/benchmark.py train                      # every architecture, against plain PyTorch
    python tests/benchmark.py fewshot                    # episodes, against a plain loop
    python tests/benchmark.py augment                    # every augmentation, against torchvision, Kornia
    python tests/benchmark.py data                       # decoding
    python tests/benchmark.py start --images 270000      # seconds to the first training step
    python tests/benchmark.py train --device cuda --rounds 2 --images 6400 --json train.json

Our training is `train.fit` itself; its rate comes from its history. Plain PyTorch is training as usually
written: ImageFolder, a DataLoader with workers, PIL transforms, float32, NCHW, `.item()` after each step.
Kornia is measured if it is installed. Files are written to a temporary folder only.
"""

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tabulate
import torch
import torchvision
from torch.nn import functional as F
from torchvision import datasets, transforms

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))
import augment
import data
import fewshot
import models
import runs
import train

PER_IMAGE = 64  # images for torchvision, which takes one at a time: its rate does not depend on the number
FILES = 4000  # image files decoded, at most
EPISODE = 75  # images: five support and ten query images of each of five classes


# Measuring


def synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def per_second(count, work):
    """A function that times work(), which processes `count` items, and returns items/s."""

    def rate():
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        return count / (time.perf_counter() - started)

    return rate


def compare(what, ways, rounds, warm_up=1):
    """A table row: medians of what the functions in ways, {name: function}, return, called in turn in each of
    `rounds` rounds after `warm_up` uncounted ones; and the ratio of ours to the highest other."""
    found = {name: [] for name in ways}
    for _ in range(warm_up + rounds):
        for name, way in ways.items():
            found[name].append(way())
    values = {name: statistics.median(of_way[warm_up:]) for name, of_way in found.items()}
    row, others = {"what": what, "values": values}, [name for name in ways if not name.startswith("ours")]
    if "ours" in ways and others:
        row["best"] = max(others, key=values.get)
        row["ratio"] = values["ours"] / values[row["best"]]
    return row


def shown(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def show(rows):
    table = []
    for row in rows:
        table.append({"": row["what"], **{name: shown(value) for name, value in row["values"].items()}})
        if "ratio" in row:
            table[-1]["ours / fastest other"] = f"{row['ratio']:.1f}x {row['best']}"
    columns = {"tablefmt": "github", "colalign": ["left"], "stralign": "right"}
    print(tabulate.tabulate(table, "keys", disable_numparse=True, missingval="-", **columns))


# Ours


def our_run(args, dataset, parse, *options):
    """A run of train.py or fewshot.py, whose parse_arguments is `parse`, that saves nothing."""
    given = parse(["--data", "synthetic", "--checkpoint-every", "1e9", *options])
    return runs.Run(given, 1, dataset, args.device, args.folder / "seed1.json")


def quietly(training, *arguments):
    """Call one of our training functions as runs.run_seeds does, without its output."""
    runs.make_repeatable()
    with contextlib.redirect_stdout(io.StringIO()):
        return training(*arguments)


def our_training(run, steps):
    """A function that trains for some steps and returns images/s."""
    model = models.build(run.args.arch).to(run.device, memory_format=data.memory_format(run.device))
    # The first epoch is not counted: on CUDA its steps capture the graph
    epochs, batches = [5 if run.device.type == "cuda" else 1, steps], endless(run)

    def train_batches(epoch):
        return itertools.islice(batches, epochs[epoch - 1])

    return lambda: quietly(train.fit, run, model, 10, epochs, train_batches)[-1]["images_per_second"]


def endless(run):
    """A run's training batches, epoch after epoch."""
    split, streams = run.dataset.train, augment.parse(run.args.aug)
    for epoch in itertools.count(1):
        plan = data.make_plan(len(split.labels), run.args.batch_size, run.seed, epoch)
        yield from data.batches(split, run.dataset, run.device, plan, streams, (run.seed, epoch))


# Plain PyTorch


def image_files(folder, images, labels):
    """Write images as files in ImageFolder's layout and return the folder."""
    for name in data.CLASSES:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / data.CLASSES[label] / f"{number}.png"
        transforms.functional.to_pil_image(image).save(path)
    return folder


def undo_repeatable():
    """Restore PyTorch's defaults after runs.make_repeatable, and let cuDNN choose the fastest kernels."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True


def plain_transform(*augmentations):
    normalise = transforms.Normalize((0.5,) * 3, (0.25,) * 3)
    return transforms.Compose([*augmentations, transforms.ToTensor(), normalise])


def plain_loader(folder, batch_size, device):
    dataset = datasets.ImageFolder(folder, plain_transform(transforms.RandomHorizontalFlip()))
    options = {"shuffle": True, "drop_last": True, "pin_memory": device.type == "cuda"}
    options |= {"num_workers": min(8, torch.get_num_threads()), "persistent_workers": True}
    return torch.utils.data.DataLoader(dataset, batch_size, **options)


def plain_training(model, batches, device):
    """A function that trains on what batches() yields, as usually written."""
    model = model.to(device)
    for layer in model.modules():
        if isinstance(layer, models.Convolution):
            layer.__class__ = torch.nn.Conv2d  # not ours
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)

    def epoch():
        undo_repeatable()
        model.train()
        total = 0.0
        for images, labels in batches():
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epoch


def plain_episodes(folder, count, options):
    """A function that yields `count` episodes as fewshot.py has them, images decoded and augmented singly."""
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    support_set = datasets.ImageFolder(folder, plain_transform())
    query_set = datasets.ImageFolder(folder, plain_transform(transforms.RandomHorizontalFlip(), policy))
    rows = [[i for i, label in enumerate(support_set.targets) if label == c] for c in range(10)]
    labels = torch.arange(options.way).repeat_interleave(options.query)

    def episodes():
        for _ in range(count):
            support, query = [], []
            for label in random.sample(range(10), options.way):
                chosen = random.sample(rows[label], options.shot + options.query)
                support += [support_set[i][0] for i in chosen[: options.shot]]
                query += [query_set[i][0] for i in chosen[options.shot :]]
            yield torch.stack(support + query), labels

    return episodes


# The benchmarks: each takes args (device, rounds, images, folder) and yields its table rows


def benchmark_train(args):
    """Training images/s with flip, in alternating epochs. On CUDA also without graphs, and in float32."""
    batch_size = min(64, args.images)
    steps = args.images // batch_size
    dataset = data.synthetic((steps * batch_size, 10, 10))
    loader = plain_loader(image_files(args.folder / "train", *dataset.train), batch_size, args.device)
    dataset = dataset._replace(train=data.to_device(dataset.train, args.device))
    ours = {"ours": []}
    if args.device.type == "cuda":
        ours |= {"ours --no-graph": ["--no-graph"], "ours --amp off": ["--amp", "off"]}
    for arch in models.ARCHITECTURES:
        options = ("--arch", arch, "--aug", "flip", "--batch-size", str(batch_size))
        ways = {}
        for name, more in ours.items():
            run = our_run(args, dataset, train.parse_arguments, *options, *more)
            ways[name] = our_training(run, steps)
        plain = plain_training(models.build(arch), loader.__iter__, args.device)
        ways["plain PyTorch"] = per_second(steps * batch_size, plain)
        yield compare(arch, ways, args.rounds)


def benchmark_fewshot(args):
    """Episodes/s of 5-way 5-shot training with 10 query images per class."""
    episodes = max(1, args.images // EPISODE)
    dataset = data.synthetic((1000, 150, 100))
    folder = image_files(args.folder / "train", *dataset.train)
    options = ("--way", "5", "--shot", "5", "--query", "10", "--episodes", str(episodes))
    dataset = dataset._replace(train=data.to_device(dataset.train, args.device))
    run = our_run(args, dataset, fewshot.parse_arguments, *options)

    def ours():
        _, outcome = quietly(fewshot.train_embedding, run)
        return outcome["history"][-1]["images_per_second"] / EPISODE

    count = max(1, episodes // 10)
    network = fewshot.Prototypes(models.FewShotEmbedding(), 5, 5)
    plain = plain_training(network, plain_episodes(folder, count, run.args), args.device)
    ways = {"ours": ours, "plain loop": per_second(count, plain)}
    yield compare("episodes/s", ways, args.rounds)


TORCHVISION = {
    "flip": transforms.RandomHorizontalFlip(),
    "rotation": transforms.RandomRotation(15),
    "crop": transforms.RandomResizedCrop(32, scale=(0.8, 1.0)),
    "jitter": transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "autoaugment": transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
    "cutout": transforms.RandomErasing(p=0.5, scale=(0.02, 0.2), ratio=(0.3, 3.3)),
    "translate": transforms.RandomCrop(32, padding=4),
}


def kornias():
    """Kornia's augmentations of a batch, float (N, 3, H, W), by our names; {} if it is not installed."""
    if not importlib.util.find_spec("kornia"):
        return {}
    import kornia.augmentation as kornia

    return {
        "flip": kornia.RandomHorizontalFlip(p=0.5),
        "rotation": kornia.RandomRotation(15.0, resample="nearest", p=1.0),
        "crop": kornia.RandomResizedCrop((32, 32), scale=(0.8, 1.0), cropping_mode="resample"),
        "jitter": kornia.ColorJitter(0.4, 0.4, 0.4, 0.1),
        "autoaugment": kornia.auto.AutoAugment("cifar10"),
        "cutout": kornia.RandomErasing(scale=(0.02, 0.2), ratio=(0.3, 3.3), p=0.5),
        "translate": kornia.RandomCrop((32, 32), padding=4),
    }


def benchmark_augment(args):
    """Images/s of every augmentation, at three batch sizes, of which --images is the largest. torchvision
    takes one PIL image at a time, or one tensor for cutout."""
    undo_repeatable()  # torchvision does not support deterministic mode
    kornia = kornias()
    drawn = data.synthetic((1024, 10, 10)).train.images
    tensors = list(drawn[:PER_IMAGE].to(args.device))
    pictures = [transforms.functional.to_pil_image(image) for image in drawn[:PER_IMAGE]]
    for count in sorted({min(size, args.images) for size in (64, 1024, args.images)}):
        images = drawn.repeat(-(-count // 1024), 1, 1, 1)[:count].to(args.device)
        for name, augmentation in augment.AUGMENTATIONS.items():
            generator = torch.Generator().manual_seed(1)
            ways = {"ours": per_second(count, functools.partial(augmentation, images, generator))}
            if name in TORCHVISION:
                one, few = TORCHVISION[name], tensors if name == "cutout" else pictures
                work = functools.partial(lambda one, few: [one(image) for image in few], one, few)
                ways["torchvision"] = per_second(len(few), work)
            if name in kornia:
                ways["kornia"] = per_second(count, functools.partial(kornia[name], images.float() / 255))
            yield compare(f"{name} of {count:,}", ways, args.rounds)


def benchmark_data(args):
    """Images/s of decoding a folder of --images files, at most 4,000: ours once, plain PyTorch each epoch."""
    dataset = data.synthetic((min(FILES, args.images), 100, 100))
    for name in ("train", "test"):
        image_files(args.folder / "images" / name, *getattr(dataset, name))
    roots = (args.folder / f"root{number}" for number in itertools.count())
    size = min(64, args.images)
    loader = plain_loader(args.folder / "images" / "train", size, args.device)

    def decode():
        with contextlib.redirect_stdout(io.StringIO()):
            data.load(args.folder / "images", next(roots))

    ours = per_second(len(dataset.train.labels) + 100, decode)
    plain = per_second(len(loader) * size, lambda: list(loader))
    yield compare("decoding", {"ours": ours, "plain PyTorch": plain}, args.rounds)


def benchmark_start(args):
    """Seconds from process start to the end of the first training step, on synthetic images and on --images
    images decoded by an earlier start; for comparison, to the end of `import torch`."""
    folder, dataset = args.folder / "images", data.synthetic((min(args.images, FILES), 20, 20))
    rows = torch.arange(args.images) % len(dataset.train.labels)
    dataset = dataset._replace(train=data.Split(*(tensor[rows] for tensor in dataset.train)))
    for name in data.SPLITS:
        image_files(folder / name, *getattr(dataset, name))
    data.load(folder, args.folder / "root")
    ways = {
        "import torch": import_torch,
        "train.py --data synthetic": lambda: first_step(args, "synthetic"),
        f"on {args.images:,} decoded images": lambda: first_step(args, folder),
    }
    yield compare("seconds", ways, args.rounds, warm_up=0)


def import_torch():
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def first_step(args, source):
    out = tempfile.mkdtemp(dir=args.folder)
    command = [sys.executable, HOUSE / "train.py", "--data", source, "--root", args.folder / "root"]
    command += ["--out", out, "--device", args.device, "--epochs", 1, "--steps-per-epoch", 1]
    environment = os.environ | {"TMPDIR": out}  # PyTorch's compiler creates a folder there, even if unused
    started = time.perf_counter()
    process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        for line in process.stdout:
            if line.startswith("epoch"):
                seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit("train.py failed: see above")
    (path,) = Path(out).rglob("seed1.json")
    result = json.loads(path.read_text())
    (epoch,) = result["history"]
    validation = epoch["seconds"] - result["config"]["batch_size"] / epoch["images_per_second"]
    return seconds - validation


# Command line

BENCHMARKS = {  # function, and default --images on a CPU and on other devices
    "train": (benchmark_train, 320, 19_200),
    "fewshot": (benchmark_fewshot, 7_500, 15_000),
    "augment": (benchmark_augment, 16_384, 16_384),
    "data": (benchmark_data, 4_000, 4_000),
    "start": (benchmark_start, 2_000, 2_000),
}


def main():
    parser = runs.new_parser(__doc__)
    add, number = parser.add_argument, runs.number
    add("what", nargs="*", choices=[*BENCHMARKS, "all"], default="all", help="(default: %(default)s)")
    add("--device", default="auto", help="as for train.py (default: %(default)s)")
    add("--rounds", type=number(int, "[1, inf)"), default=7, help="counted rounds (default: %(default)s)")
    add("--images", type=number(int, "[32, inf)"), help="images per round; for data and start, in "
        "the folder (default: enough for a steady rate)")  # fmt: skip
    add("--json", type=Path, help="also write the figures to this file, row by row")
    args = parser.parse_args()
    given, args.device = args.images, runs.use_device(args.device)
    runs.make_repeatable()
    on_gpu = args.device.type == "cuda"
    name = torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    found = {"machine": {"device": name, "threads": torch.get_num_threads(), **versions}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    for name in BENCHMARKS if "all" in args.what else args.what:
        measure, on_cpu, elsewhere = BENCHMARKS[name]
        args.images = given or (on_cpu if args.device.type == "cpu" else elsewhere)
        print(f"\n{name}: {' '.join(measure.__doc__.split())}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            args.folder, found[name] = Path(folder), []
            for row in measure(args):
                found[name].append(row)
                values = ", ".join(f"{way} {shown(value)}" for way, value in row["values"].items())
                print(f"{row['what']}: {values}", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1))
        show(found[name])


if __name__ == "__main__":
    runs.command_line(main)
