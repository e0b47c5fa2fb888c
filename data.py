"""Image sets as uint8 tensors: fetched and decoded once, cached, memory-mapped, batched on any device.

    python data.py --data cinic10         # fetch (688 MB), decode, cache, describe
    python data.py --data path/to/folder  # train/<class>/*, test/<class>/* and, if you have it, valid/<class>/*

A set has three splits; a split is `images`, uint8 (N, 3, 32, 32), and `labels`, int64 (N,).
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image  # comes with torchvision, which takes over a second to import: only to download

try:
    import fcntl
except ImportError:  # Windows has none, and so no locks
    fcntl = None

SIZE = 32  # pixels a side
CHUNK = 4096  # images gathered and normalised at a time: 50 MB as floats
BLOCK = 4096  # images of an epoch whose random numbers are drawn together; CHUNK is a multiple of it
SPLITS = ("train", "valid", "test")
NAMES = ("cinic10", "cifar10", "synthetic", "synthetic-small")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GROUPS = {
    "vehicles": ("airplane", "automobile", "ship", "truck"),
    "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000  # a larger image is taken for a decompression bomb
CACHE_VERSION = 3  # part of every cache's name: raise it when decoding changes

# Darlow et al., 2018, arXiv:1810.03505, CC BY 4.0. The host has moved its links before: tried in turn.
CINIC10_SIZE, CINIC10_MD5 = 687_544_992, "6ee4d0c996905fe93221de577967a372"
CINIC10_URLS = (
    "https://datashare.ed.ac.uk/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/download",
    "https://datashare.ed.ac.uk/server/api/core/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/content",
    "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
)
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"  # of cifar-10-python.tar.gz
STALLED = 60  # seconds without a byte after which a download is given up
OTHERWISE = "or use --data cifar10, --data PATH (a folder of your own) or --data synthetic (no download)"


class Split(NamedTuple):
    images: torch.Tensor  # uint8 (N, 3, 32, 32)
    labels: torch.Tensor  # int64 (N,)


class Dataset(NamedTuple):
    name: str
    classes: tuple  # of str, in label order
    train: Split
    valid: Split
    test: Split
    mean: tuple  # of 3 floats: mean of a channel over the train split, pixels in [0, 1]
    std: tuple
    cache: Path | None  # where it is memory-mapped from
    fingerprint: str  # of all images and labels, in their order: 16 hexadecimal digits of a SHA-256


def load(data="cinic10", root="data", fraction=1.0, classes=None):
    """The data set `data` (a name in NAMES or a folder), decoded now if it never was.

    fraction: keep so much of the train split, the same number of images of every class, at least one.
    classes: `vehicles`, `animals` or names joined by commas; labels are renumbered, names kept.
    Raises ValueError for a wrong argument, OSError or RuntimeError for data that cannot be had.
    """
    root = Path(root)
    if data == "synthetic":
        dataset = synthetic()
    elif data == "synthetic-small":
        dataset = synthetic((400, 100, 200))._replace(name="synthetic-small")
    elif data == "cinic10":
        dataset = _load_cinic10(root)
    elif data == "cifar10":
        dataset = _load_cached(root, "cifar10", "cifar10", CIFAR10_MD5, lambda: _cifar10(root))
    elif Path(data).is_dir():
        dataset = _load_folder(Path(data), root, key(data), Path(data).resolve().name)
    else:
        raise ValueError(f"--data {data}: not one of {', '.join(NAMES)}, and no folder of that name")
    if classes:
        dataset = _select_classes(dataset, classes)
    if fraction < 1:
        dataset = dataset._replace(train=_subset(dataset.train, fraction))
    if classes or fraction < 1:  # a part is normalised by its own colours
        mean, std = _mean_and_std(_histogram(dataset.train.images))
        dataset = dataset._replace(mean=mean, std=std)
    return dataset


def to_device(split, device):
    """The split on the device whole if it fits in half of the free memory, else as it is: `batches` will do
    with either."""
    if device.type == "cuda" and 2 * split.images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return split
    return Split(split.images.to(device), split.labels.to(device))


def batches(split, batch_size, mean, std, device, streams=((),), seed=None, epoch=0, steps=None):
    """One epoch of (images, labels): float32 (B, 3, H, W), normalised, channels_last; int64 (B,).

    streams: lists of functions (uint8 images, generator) -> uint8 images; every image goes once through
    each stream, so that an epoch has len(streams) * N images. seed: shuffle, by seed and epoch alone; None
    keeps the order. The last batch may be short. steps: so many batches in place of one pass.
    """
    order, bounds = plan(len(split.labels) * len(streams), batch_size, seed, epoch, steps)
    chunks = _chunks(split, order, mean, std, device, streams, seed, epoch)
    images = labels = torch.empty(
        0
    )  # made and not handed out yet; the first of them is at `first` in the epoch
    first = 0
    for start, end in itertools.pairwise(bounds):
        while first + len(labels) < end:
            more, rest = next(chunks), start - first < len(labels)
            images, labels = (
                torch.cat([old[start - first :], new]) if rest else new
                for old, new in zip((images, labels), more, strict=True)
            )
            first = start
        yield images[start - first : end - first], labels[start - first : end - first]


def _chunks(split, order, mean, std, device, streams, seed, epoch):
    """Yield CHUNK images at a time, augmented and normalised, in `order`. Random numbers are drawn on the CPU, for
    BLOCK images at a time, by seed, epoch and place: so that batch size, CHUNK and device change none of them."""
    scale, shift = scale_and_shift(mean, std, device)
    count, blocks = len(split.labels), itertools.count()
    places = order.split(CHUNK)  # below, place // count is the number of an image's stream
    gathered = _gathered(split, (some % count for some in places), device)
    for some, (images, labels) in zip(places, gathered, strict=True):
        if any(streams):
            pairs = zip(images.split(BLOCK), (some // count).split(BLOCK), strict=True)
            parts = [_augment(*pair, streams, seed_from(seed, epoch, next(blocks))) for pair in pairs]
            images = parts[0] if len(parts) == 1 else torch.cat(parts)
        images = images.contiguous(memory_format=torch.channels_last)
        yield images.float().mul_(scale).add_(shift), labels


def _gathered(split, chunks, device):
    """Yield (images, labels) of each chunk of rows, on the device. Where the split is not there itself, the next chunk
    is read while this one is in use: from disk, if the split is larger than memory."""

    def gather(rows):
        # By numpy: a second thread that runs PyTorch's parallel code has OpenMP threads of its own, and while it lives,
        # all of them wait for each other in a way that costs small networks half of their speed
        part = Split(*(torch.from_numpy(tensor.numpy()[rows.numpy()]) for tensor in split))
        return Split(*(tensor.pin_memory() for tensor in part)) if device.type == "cuda" else part

    if split.images.device.type != "cpu":
        for rows in chunks:
            rows = rows.to(split.images.device)
            yield split.images[rows], split.labels[rows]
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for rows in itertools.chain(chunks, [None]):
            ready, ahead = ahead, rows is not None and reader.submit(gather, rows)
            if ready:
                images, labels = ready.result()
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def plan(total, batch_size, seed=None, epoch=0, steps=None):
    """An epoch's order, int64 (N,), by seed and epoch alone (seed None keeps it), and the bounds of its batches.
    steps: that many whole batches, from as many passes in random order as they take."""
    generator = torch.Generator().manual_seed(seed_from(seed, epoch))
    passes = 1 if steps is None else math.ceil(steps * batch_size / total)
    if seed is None:
        order = torch.arange(total)
    else:
        order = torch.cat([torch.randperm(total, generator=generator) for _ in range(passes)])
    if steps is not None:
        order = order[: steps * batch_size]
    bounds = [*range(0, len(order), batch_size), len(order)]
    if seed is not None and len(bounds) > 2 and len(order) - bounds[-2] == 1:
        # Batch norm cannot train on a single 1x1 map: a last image alone joins the batch before
        del bounds[-2]
    return order, bounds


def scale_and_shift(mean, std, device):
    """float32 (3, 1, 1) each: bytes * scale + shift have mean 0 and standard deviation 1 in each channel."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(3, 1, 1)
    return scale, shift


def _augment(images, numbers, streams, seed):
    """Pass each image through its stream. numbers: int64 (N,) on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for number, stream in enumerate(streams):
        selected = numbers == number
        rows = None if selected.all() else selected.nonzero()[:, 0].to(images.device)
        part = images if rows is None else images[rows]
        for augmentation in stream:
            part = augmentation(part, generator)
        images = part if rows is None else images.index_copy_(0, rows, part)
    return images


def seed_from(*parts):
    """A 32-bit seed out of whatever names a use of randomness, so that no two uses share a stream."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


class Progress:
    """A line on a terminal that says how far we are; silent when standard error is not a terminal."""

    def __init__(self, what, total):
        self.what, self.total, self.done = what, total, 0
        self.started = self.drawn = time.monotonic()

    def __call__(self, count):
        self.done += count
        now = time.monotonic()
        if now - self.drawn > 0.2 and sys.stderr.isatty():
            self.drawn = now
            rate = self.done / (now - self.started)
            left = f"{rate:,.0f}/s, {(self.total - self.done) / rate:.0f} s left"
            print(
                f"\r{self.what}: {self.done:,}/{self.total:,}, {left}\033[K",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def clear(self):
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# Parts of a set


def class_names(spec):
    """The names that --classes means: a group's, or those between commas."""
    return GROUPS.get(spec) or tuple(name.strip() for name in spec.split(","))


def _select_classes(dataset, spec):
    names = class_names(spec)
    for name in names:
        if name not in dataset.classes:
            raise ValueError(
                f"--classes {spec}: {dataset.name} has no class {name!r}; it has {', '.join(dataset.classes)}"
            )
    kept = [label for label, name in enumerate(dataset.classes) if name in names]
    renumbered = torch.full((len(dataset.classes),), -1)
    renumbered[kept] = torch.arange(len(kept))

    def part(split):
        rows = (renumbered[split.labels] >= 0).nonzero()[:, 0]
        return Split(split.images[rows], renumbered[split.labels[rows]])

    return dataset._replace(
        classes=tuple(dataset.classes[label] for label in kept),
        **{name: part(getattr(dataset, name)) for name in SPLITS},
    )


def _subset(split, fraction):
    """The same number of images of every class, at least one: the first of each class in a fixed random
    order, so that a smaller fraction lies inside a larger one, whatever the seed of the run."""
    counts = torch.bincount(split.labels)
    per_class = max(1, min(round(fraction * len(split.labels) / len(counts)), int(counts.min())))
    rows = _per_class_shuffled(split.labels, [per_class] * len(counts))
    return Split(split.images[rows], split.labels[rows])


def _per_class_shuffled(labels, counts):
    """Rows of counts[c] images of each class c, chosen by a fixed seed, in ascending order."""
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for label, count in enumerate(counts):
        rows = (labels == label).nonzero()[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def _hold_out(images, labels, counts):
    """Arrays split in two: what is left, and counts[c] images of each class c."""
    held = np.zeros(len(labels), bool)
    held[_per_class_shuffled(torch.from_numpy(labels), counts).numpy()] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def _histogram(images):
    """Counts of the 256 values of each channel, int64 (3, 256), of images uint8 (N, 3, H, W)."""
    return torch.stack([torch.bincount(images[:, c].reshape(-1), minlength=256) for c in range(3)])


def _mean_and_std(histogram):
    """Exact mean and standard deviation of each channel, pixels in [0, 1]; a flat channel has std 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = histogram.double() / histogram.sum(1, keepdim=True)
    mean = weights @ values
    std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())


# Cache: one folder a data set, with images and labels of each split as .npy, and meta.json


def _load_cached(root, key, name, source, make):
    """The data set out of the cache, or made by `make` and put there. source: what it is made from: the
    cache's name holds its digest, so that a changed set is made anew, and replaces what it was."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {source}".encode()).hexdigest()[:16]
    folder = root / "cache" / f"{key}-{digest}"
    if not (folder / "meta.json").is_file():
        with alone(root / "cache" / f".{folder.name}.lock"):
            _make_cache(folder, key, make)
    try:
        return _open_cache(folder, name)
    except Damaged as damage:
        print(f"{damage}: the images are decoded again")
        with alone(root / "cache" / f".{folder.name}.lock"):
            shutil.rmtree(folder)
            _make_cache(folder, key, make)
        return _open_cache(folder, name)


def _make_cache(folder, key, make):
    if (folder / "meta.json").is_file():
        return  # another process has made it while this one waited
    with _temporary_folder(folder.parent) as temporary:
        make_arrays(temporary, *make())
        _put_in_place(temporary, folder)
    for old in folder.parent.glob(f"{key}-{'?' * 16}"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def make_arrays(folder, classes, splits):
    """Write a cache folder. splits: {name: (number, iterator over (images, labels) blocks)}."""
    digest = hashlib.sha256()
    for split, (count, blocks) in splits.items():
        histogram, labels, progress = 0, [], Progress(f"decoding {split}", count)
        with open(folder / f"{split}-images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, SIZE, SIZE)}
            np.lib.format.write_array_header_1_0(file, header)
            for images, block_labels in blocks:
                images = np.ascontiguousarray(images)
                file.write(images)
                digest.update(images)
                labels.append(block_labels)
                if split == "train":
                    histogram = histogram + _histogram(torch.from_numpy(images))
                progress(len(images))
            progress.clear()
            file.flush()
            os.fsync(file.fileno())
        labels = np.concatenate(labels).astype(np.int64)
        np.save(folder / f"{split}-labels.npy", labels)
        digest.update(labels)
        if split == "train":
            mean, std = _mean_and_std(histogram)
    checksums = {path.name: _checksum(path) for path in sorted(folder.glob("*.npy"))}
    meta = {"classes": list(classes), "mean": mean, "std": std, "fingerprint": digest.hexdigest()[:16]}
    meta = json.dumps({**meta, "checksums": checksums})
    (folder / "meta.json").write_text(f"{hashlib.sha256(meta.encode()).hexdigest()}\n{meta}")


class Damaged(RuntimeError):
    """A file of the cache is not what was written."""


def _open_cache(folder, name):
    """Raises Damaged for a file that is missing, cut short or changed; of a set larger than memory, which would take
    minutes to read, only the size is looked at."""
    digest, _, text = (folder / "meta.json").read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise Damaged(f"{folder / 'meta.json'} is damaged")
    meta = json.loads(text)

    def array(file):
        try:
            values = mapped(folder / file)
            whole = meta["checksums"][file] == _checksum(folder / file)
        except (OSError, ValueError, EOFError):  # numpy's for a file that is missing or too short
            whole = False
        if not whole:
            raise Damaged(f"{folder / file} is damaged")
        return values

    def split(part):
        return Split(array(f"{part}-images.npy"), array(f"{part}-labels.npy"))

    splits = {part: split(part) for part in SPLITS}
    rest = {key: meta[key] for key in ("mean", "std", "fingerprint")}
    return Dataset(name, tuple(meta["classes"]), **splits, **rest, cache=folder)


def mapped(path):
    """The array of an .npy file as a tensor of which nothing is read before it is used, and to which nothing may be
    written."""
    array = np.load(path, mmap_mode="r")  # mode c, which could be written to, must fit in memory
    if _larger_than_memory(array.nbytes):
        array.base.madvise(mmap.MADV_RANDOM)  # no reading ahead: what is not asked for would push out what is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch knows no tensor that is for reading only
        return torch.from_numpy(array)


def _larger_than_memory(size):
    """Or half of it: no use to read the whole."""
    return hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def _checksum(path):
    """Of a file: the SHA-256 of the sums of its pages, which changes with any byte and costs a tenth of its own."""
    if _larger_than_memory(path.stat().st_size):
        return "too large"
    words = np.memmap(path, np.uint8, "r")
    whole = len(words) // 4096 * 4096
    sums = words[:whole].view(np.uint64).reshape(-1, 512).sum(1)
    return hashlib.sha256(sums.tobytes() + words[whole:].tobytes()).hexdigest()


@contextlib.contextmanager
def alone(path):
    """Inside, no other process is: it waits here until this one has left, or died. path: a file to lock.

    Over a shared folder too, if its file system has locks; where there are none, nobody waits, which wastes work and
    harms nothing, since every file is put in place whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while fcntl:
        lock = open(path, "a")  # noqa: SIM115 (held open to the end)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that holds {path}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            break
        lock.close()  # the one before removed it in the meantime
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if fcntl:
            lock.close()


@contextlib.contextmanager
def _temporary_folder(parent):
    for left in parent.glob(".unfinished-*"):  # by a process that was killed a day ago or earlier
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(temporary, final):
    """Rename a complete folder; if another process was faster, its own is as good."""
    temporary.chmod(0o755)
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def key(data):
    """`--data` as a part of a file name: different for different values, short, and safe. A folder below
    the current one is known by its way from here, so that a moved project keeps its names."""
    if data in NAMES:
        return data
    path = Path(data).resolve()
    place = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)[:40]}-{digest}"


# A folder of images


def _load_folder(folder, root, cache_key, name):
    classes, files = _list_images(folder)
    source = hashlib.sha256(repr((str(folder.resolve()), classes, files)).encode(errors="surrogateescape"))
    return _load_cached(
        root, cache_key, name, source.hexdigest(), lambda: _decode_folder(folder, classes, files)
    )


def _list_images(folder):
    """Class names, and of each split a list, class by class, of its files: (name, bytes, time of change), sorted."""
    splits = [split for split in SPLITS if (folder / split).is_dir()]
    for split in ("train", "test"):
        if split not in splits:
            raise FileNotFoundError(
                f"{folder} has no folder {split}/: it needs train/<class>/* and test/<class>/*, and may have valid/"
            )
    names = {split: _class_names(folder / split) for split in splits}
    classes = sorted(set().union(*names.values()))
    if not classes:
        raise FileNotFoundError(f"{folder / 'train'} has no class folders: it needs train/<class>/*")
    files = {split: [] for split in splits}
    for split in splits:
        for name in classes:
            if name not in names[split]:
                raise FileNotFoundError(
                    f"{folder / split} has no folder for class {name!r}, which another split has"
                )
            found = _list_files(folder / split / name)
            if not found:
                kinds = " ".join(IMAGE_SUFFIXES)
                raise FileNotFoundError(
                    f"{folder / split / name} is empty: it needs at least one image ({kinds})"
                )
            files[split].append(found)
    return classes, files


def _list_files(folder):
    """(name, bytes, time of change) of each image file, sorted: with 270,000 files, most of a start's time."""
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name, stat.st_size, stat.st_mtime_ns)
            for entry in entries
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "." and entry.is_file()
            for stat in (entry.stat(),)
        )


def _class_names(folder):
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}


def _decode_folder(folder, classes, files):
    """Arguments of make_arrays. Without valid/, a tenth of train, class by class, at least one image."""
    files = {
        split: [
            (os.path.join(folder, split, name, file), label)
            for label, (name, found) in enumerate(zip(classes, of_class, strict=True))
            for file, *_ in found
        ]
        for split, of_class in files.items()
    }
    if "valid" in files:
        return classes, {split: (len(files[split]), _decode(files[split])) for split in SPLITS}
    images, labels = (np.concatenate(arrays) for arrays in zip(*_decode(files["train"]), strict=True))
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[counts.argmin()]!r} has one image in train/: too few to split off valid/"
        )
    train, valid = _hold_out(images, labels, [max(1, round(count / 10)) for count in counts])
    splits = {"train": (len(train[0]), [train]), "valid": (len(valid[0]), [valid])}
    return classes, {**splits, "test": (len(files["test"]), _decode(files["test"]))}


def _decode(entries, block=500):
    """Decode files on all cores: yields (images, labels) of `block` files at a time, in their order."""
    blocks = [entries[i : i + block] for i in range(0, len(entries), block)]
    workers = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), len(blocks)
    )
    if workers == 1 or len(entries) < 4 * block:  # starting processes would take longer
        yield from map(_decode_block, blocks)
        return
    method = (
        "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    )  # no second import of torch
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _leave_signals_to_the_parent)
    except OSError:  # no /dev/shm, no semaphores
        yield from map(_decode_block, blocks)
        return
    with pool:
        try:
            yield from pool.map(_decode_block, blocks)
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_signals_to_the_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _decode_block(entries):
    images = np.stack([read_image(path) for path, _ in entries])
    return images, np.array([label for _, label in entries])


def read_image(path):
    """Any image file as RGB, uint8 (3, 32, 32): transparency is dropped, 16-bit grey keeps its upper eight
    bits, other sizes are resized (bilinear, antialiased). Raises RuntimeError that names the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # noqa: BLE001 (a damaged file can raise nearly anything)
        raise RuntimeError(f"{path} cannot be read as an image ({error}): mend it or take it out") from None


# CINIC-10 and CIFAR-10


def _load_cinic10(root):
    """Out of the cache, an unpacked tree, an archive, or the network, whichever is there first."""
    trees = [root / "cinic10", root / "CINIC-10", root]
    tree = next((t for t in trees if all((t / split).is_dir() for split in SPLITS)), None)
    if tree is None:
        caches = sorted((root / "cache").glob("cinic10-*/meta.json"))
        if caches:  # the images have been decoded, and were then cleared away
            try:
                return _open_cache(caches[0].parent, "cinic10")
            except Damaged as damage:
                print(f"{damage}: CINIC-10 is fetched again")
        tree = trees[0]
        with alone(root / ".cinic10.lock"):
            if not tree.is_dir():  # else another process has fetched it while this one waited
                _unpack(_download_cinic10(root), tree)
    return _load_folder(tree, root, "cinic10", "cinic10")


def _download_cinic10(root):
    """The path of CINIC-10.tar.gz, checked; fetched if it is not there."""
    from torchvision.datasets import utils

    archive = root / "CINIC-10.tar.gz"
    if archive.exists():
        if not _is_cinic10(archive):
            raise RuntimeError(
                f"{archive} is damaged or another file (wrong size or MD5): remove it and start again"
            )
        return archive
    root.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in CINIC10_URLS:
        print(f"fetching {url}", flush=True)
        # Never taken for whole: it gets its place when it is checked
        with _temporary_folder(root) as temporary:
            try:
                with _impatient():
                    utils.download_url(url, temporary, filename=archive.name)
                if _is_cinic10(temporary / archive.name):
                    (temporary / archive.name).rename(archive)
                    return archive
                reasons.append(f"{(temporary / archive.name).stat().st_size:,} bytes that are not CINIC-10")
            except (OSError, RuntimeError, ValueError) as error:
                reasons.append(str(error) or type(error).__name__)
    raise RuntimeError(
        f"CINIC-10 cannot be fetched ({'; '.join(reasons)}): connect to the network, put CINIC-10.tar.gz into "
        f"{root}, {OTHERWISE}"
    )


def _is_cinic10(archive):
    from torchvision.datasets import utils

    return archive.stat().st_size == CINIC10_SIZE and utils.check_md5(archive, CINIC10_MD5)


@contextlib.contextmanager
def _impatient():
    """Inside, a connection that stalls fails; a progress bar is drawn on a terminal only."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            yield
    finally:
        socket.setdefaulttimeout(before)


def _unpack(archive, folder):
    """Unpack into a temporary folder that gets its name when complete. Raises RuntimeError for a member that
    would leave it (absolute, .., a link out, a device), and for an archive that is no such data set."""
    with _temporary_folder(folder.parent) as temporary:
        progress = Progress(f"unpacking {archive.name}", 270_033)  # images and their folders

        def members(tar):
            for member in tar:
                progress(1)
                yield member
            progress.clear()

        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, members(tar), filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise RuntimeError(
                f"{archive} cannot be unpacked ({error}): remove it and start again"
            ) from error
        missing = [split for split in SPLITS if not (temporary / split).is_dir()]
        if missing:
            raise RuntimeError(f"{archive} has no {missing[0]}/ at its top: it is not CINIC-10")
        _put_in_place(temporary, folder)


def _cifar10(root):
    """Arguments of make_arrays: 5,000 of the 50,000 training images, 500 a class, become the valid split."""
    from torchvision import datasets

    try:
        with _impatient():
            train, test = (datasets.CIFAR10(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"CIFAR-10 cannot be fetched ({error}): connect to the network, put cifar-10-python.tar.gz into {root}, "
            "or use --data PATH (a folder of your own) or --data synthetic (no download)"
        ) from error
    arrays = [(part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in (train, test)]
    kept, valid = _hold_out(*arrays[0], [count // 10 for count in np.bincount(arrays[0][1])])
    splits = {"train": kept, "valid": valid, "test": arrays[1]}
    return train.classes, {
        split: (len(labels), [(images, labels)]) for split, (images, labels) in splits.items()
    }


# Drawn images


def synthetic(counts=(2000, 500, 1000)):
    """Ten classes drawn by the program: vehicles from straight edges, animals from round ones, at random
    place, size, turn and colour on a noisy ground, so that no colour tells the class. Always the same."""
    splits = []
    for split, count in enumerate(counts):
        generator = torch.Generator().manual_seed(seed_from("synthetic", split))
        labels = torch.arange(count) % len(CLASSES)
        splits.append(Split(_draw(labels, generator), labels))
    mean, std = _mean_and_std(_histogram(splits[0].images))
    digest = hashlib.sha256()
    for tensor in itertools.chain(*splits):
        digest.update(tensor.numpy())
    fingerprint = digest.hexdigest()[:16]
    return Dataset("synthetic", CLASSES, *splits, mean=mean, std=std, cache=None, fingerprint=fingerprint)


def _draw(labels, generator):
    """One image for each label, uint8 (N, 3, 32, 32)."""

    def uniform(low, high, *shape):
        return torch.rand(len(labels), *shape, generator=generator) * (high - low) + low

    turn, radius = uniform(-0.4, 0.4, 1, 1), uniform(10, 14, 1, 1)
    cx, cy = uniform(-3, 3, 1, 1), uniform(-3, 3, 1, 1)
    across = torch.arange(SIZE) - (SIZE - 1) / 2
    dx, dy = across.view(1, 1, -1) - cx, across.view(1, -1, 1) - cy
    x = (turn.cos() * dx + turn.sin() * dy) / radius  # the shape spans [-1, 1]
    y = (turn.cos() * dy - turn.sin() * dx) / radius

    def box(x0, y0, half_width, half_height):  # signed distances: negative inside, in units of the radius
        return torch.maximum((x - x0).abs() - half_width, (y - y0).abs() - half_height)

    def disc(x0, y0, r):
        return ((x - x0) ** 2 + (y - y0) ** 2).sqrt() - r

    def join(*shapes):
        return torch.stack(shapes).amin(0)

    def cut(shape, *holes):
        return torch.maximum(shape, -join(*holes))

    shapes = {
        "airplane": lambda: join(box(0, 0, 0.2, 1), box(0, -0.1, 1, 0.2)),
        "automobile": lambda: join(box(0, 0.25, 1, 0.3), box(0, -0.25, 0.5, 0.3)),
        "bird": lambda: join(disc(-0.5, 0, 0.48), disc(0.5, 0, 0.48)),
        "cat": lambda: join(disc(0, 0.2, 0.75), disc(-0.55, -0.6, 0.35), disc(0.55, -0.6, 0.35)),
        "deer": lambda: cut(disc(0, 0, 1), disc(0, -0.55, 0.9)),
        "dog": lambda: cut(disc(0, 0, 1), disc(0, 0, 0.55)),
        "frog": lambda: cut(disc(0, 0, 1), disc(-0.42, -0.25, 0.27), disc(0.42, -0.25, 0.27)),
        "horse": lambda: join(disc(0, -0.65, 0.35), disc(0, 0.0, 0.3), disc(0, 0.65, 0.35)),
        "ship": lambda: torch.maximum(y - 0.8, (x.abs() * 1.6 - y - 0.8) / 1.9),
        "truck": lambda: cut(box(0, 0, 1, 0.8), box(0, 0, 0.6, 0.4)),
    }
    distance = torch.stack([shapes[name]() for name in CLASSES])[labels, torch.arange(len(labels))]
    inside = (0.5 - distance * radius).clamp(0, 1)[:, None]  # (N, 1, 32, 32), edges one pixel soft
    ground, ink = uniform(0, 140, 3, 1, 1), uniform(115, 255, 3, 1, 1)  # dark ground, bright ink
    noise = torch.randn(len(labels), 3, SIZE, SIZE, generator=generator) * 20
    return (ground + (ink - ground) * inside + noise).clamp(0, 255).round().to(torch.uint8)


def describe(dataset):
    """What a person wants to know of a data set: a few lines of text."""
    splits = {name: getattr(dataset, name) for name in SPLITS}
    lines = [
        f"{dataset.name}: {len(dataset.classes)} classes: {', '.join(dataset.classes)}",
        "images:  " + ", ".join(f"{name} {len(split.labels):,}" for name, split in splits.items()),
        *(
            f"{name}:    " + ", ".join(f"{value:.4f}" for value in getattr(dataset, name))
            for name in ("mean", "std")
        ),
        f"bytes:   {sum(split.images.nbytes + split.labels.nbytes for split in splits.values()):,}",
        f"cache:   {dataset.cache or 'none: drawn or cut out anew at every start'}",
    ]
    return "\n".join(lines)


def add_arguments(parser):
    """The arguments of `load`, which every script has."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="cinic10", help="cinic10, cifar10, synthetic (drawn by the program, needs no "
                       "network), or a folder with train/<class>/* and test/<class>/* (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--root", default="data", help="folder for downloads and decoded images (default: %(default)s)"
    )
    group.add_argument("--fraction", type=_fraction, default=1.0, help="use this part of the train split, in (0, 1], "
                       "the same number of images of every class (default: all)")  # fmt: skip
    group.add_argument(
        "--classes", help="use these classes only: vehicles, animals, or names such as cat,dog"
    )


def _fraction(text):
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")


class Stopped(BaseException):
    """SIGINT or SIGTERM has come."""


class Signals:
    """SIGINT and SIGTERM raise Stopped; inside `with Signals.held()`, not before its end."""

    depth, come = 0, None

    @classmethod
    def handle(cls, number, _):
        cls.come = number
        if not cls.depth:
            raise Stopped(number)

    @classmethod
    @contextlib.contextmanager
    def held(cls):
        cls.depth += 1
        try:
            yield
        finally:
            cls.depth -= 1
        if cls.come and not cls.depth:
            raise Stopped(cls.come)


def command_line(main):
    """Run a script's main; what goes wrong becomes one line on standard error: exit status 2 for a wrong
    argument (ValueError), 1 for anything else that a user can mend, 130 and 143 for SIGINT and SIGTERM.
    TRACEBACK=1 shows where it came from."""
    name = Path(sys.argv[0]).name
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Signals.handle)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be any bytes
    sys.stderr.reconfigure(errors="backslashreplace")
    try:
        main()
    except Stopped as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        text = f"stopped by {signal.Signals(stop.args[0]).name}: the same command goes on from the last whole epoch"
        print(f"{name}: {text}", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: error: {text}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def new_parser(doc):
    """A parser whose help begins with a script's docstring, and whose errors are ValueErrors."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def error(message):
        raise ValueError(f"{message} (--help lists what there is)")

    parser.error = error
    return parser


def main():
    parser = new_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    print(describe(load(args.data, args.root, args.fraction, args.classes)))


if __name__ == "__main__":
    command_line(main)
