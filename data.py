"""Image data sets as uint8 tensors: decoded once, cached, memory-mapped, batched on any device.

    python data.py --data cinic10         # download (688 MB), decode, cache, describe
    python data.py --data path/to/folder  # train/<class>/*, test/<class>/*, optionally valid/<class>/*

A data set has three splits; a split is `images`, uint8 (N, 3, 32, 32), and `labels`, int64 (N,).
"""

import collections
import contextlib
import csv
import hashlib
import http.client
import io
import itertools
import json
import mmap
import os
import re
import shutil
import signal
import socket
import stat
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image  # installed with torchvision, whose slow import (over a second) only downloads need

import runs

SIZE = 32  # pixels per side
CHUNK = 4096  # images prepared at a time, 50 MB as floats; other values give augmentation other bits
SPLITS = ("train", "valid", "test")
NAMES = ("cinic10", "cifar10", "synthetic", "synthetic-small")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GROUPS = {
    "vehicles": ("airplane", "automobile", "ship", "truck"),
    "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000  # larger images are treated as decompression bombs
CACHE_VERSION = 4  # increment it when decoding or the cache layout changes

# Darlow et al., 2018, arXiv:1810.03505, CC BY 4.0. The host has moved its files before: URLs to try in turn.
CINIC10_MD5 = "6ee4d0c996905fe93221de577967a372"
CINIC10_URLS = (
    "https://datashare.ed.ac.uk/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/download",
    "https://datashare.ed.ac.uk/server/api/core/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/content",
    "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
)
TIMEOUT = 60  # seconds without data after which a download is abandoned
OTHERWISE = "or use --data PATH (your own folder) or --data synthetic (no download)"


class Split(NamedTuple):
    images: torch.Tensor  # uint8 (N, 3, 32, 32)
    labels: torch.Tensor  # int64 (N,)


class Dataset(NamedTuple):
    name: str
    only: str | None  # the selected classes, as in `spec`; None if all
    classes: tuple  # of str, in label order
    train: Split
    valid: Split
    test: Split
    mean: tuple  # of 3 floats: per-channel mean of the train split, pixels in [0, 1]
    std: tuple
    cache: Path | None  # the folder from which it is memory-mapped
    fingerprint: str  # of the whole set, before --fraction and --classes: 16 hexadecimal digits


def load(data="cinic10", root="data", fraction=1.0, classes=None):
    """Load the data set `data` (a name in NAMES or a folder), decoding it first if it is not cached.

    fraction: part of the train split to keep, with the same number of images per class, at least one.
    classes: `vehicles`, `animals` or names joined by commas; labels are renumbered.
    Raises ValueError for an invalid argument, OSError or RuntimeError for data that cannot be loaded.
    """
    root = Path(root)
    if data == "synthetic":
        dataset = synthetic()
    elif data == "synthetic-small":
        dataset = synthetic((400, 100, 200))._replace(name=data)
    elif data == "cinic10":
        dataset = _load_cinic10(root)
    elif data == "cifar10":
        dataset = _load_cached(root, data, data, "torchvision", lambda: _cifar10(root))
    elif data and Path(data).is_dir():
        dataset = _load_folder(Path(data), root, key(data), key(data))
    else:
        raise ValueError(f"--data {data}: not a folder, and not one of {', '.join(NAMES)}")
    if classes:
        dataset = _select_classes(dataset, classes)
    if fraction < 1:
        dataset = dataset._replace(train=_subset(dataset.train, fraction))
    if classes or fraction < 1:  # a subset has its own mean and std
        mean, std = _mean_and_std(dataset.train.images)
        dataset = dataset._replace(mean=mean, std=std)
    return dataset


def to_device(split, device):
    """The split on the device if it fits in half of the free memory, else unchanged; `batches` takes both."""
    if device.type == "cuda" and 2 * split.images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return split
    return Split(split.images.to(device), split.labels.to(device))


def batches(split, dataset, device, plan, streams=((),), seeds=()):
    """Yield an epoch of (images, labels): float32 (B, 3, H, W), normalised; int64 (B,).

    plan: (order, sizes) from `make_plan` for len(streams) * N images. streams: lists of functions (uint8 images,
    generator) -> uint8 images; every image passes through each stream once. seeds: (seed, epoch), on which
    augmentation depends. dataset: provides the mean and std for normalisation.
    """
    order, sizes = plan
    chunks = _chunks(split, order, dataset, device, streams, seeds)
    images = labels = ()  # of the chunks so far, what has not been yielded
    for size in sizes:
        while len(labels) < size:
            new = next(chunks)
            images, labels = map(torch.cat, zip((images, labels), new, strict=True)) if len(labels) else new
        yield images[:size], labels[:size]
        images, labels = images[size:], labels[size:]


def _chunks(split, order, dataset, device, streams, seeds):
    """Yield (images, labels) for CHUNK entries of `order` at a time, augmented and normalised.

    Random numbers are drawn on the CPU and depend only on seeds and chunk, not on batch size or device.
    """
    count = len(split.labels)
    chunks = upload(order % count, split.images.device).split(CHUNK)
    for number, (rows, passes) in enumerate(zip(chunks, (order // count).split(CHUNK), strict=True)):
        images, labels = (upload(tensor.index_select(0, rows), device) for tensor in split)
        if any(streams):
            images = _augment(images, passes, streams, seed_from(*seeds, number))
        yield normalise(images, dataset), labels


def make_plan(total, batch_size, seed=None, epoch=0, steps=None):
    """An epoch's order, int64 (N,), and its batch sizes, a list. Depends only on seed and epoch.

    seed: None keeps images in order. steps: number of full batches, drawn from as many passes as needed; needs
    a seed.
    """
    count = steps * batch_size if steps else total
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    if seed is None:
        return torch.arange(total), sizes
    if len(sizes) > 1 and sizes[-1] == 1:
        # Batch norm cannot train on one 1x1 map: merge a last batch of one image
        sizes[-2:] = [sum(sizes[-2:])]
    generator = torch.Generator().manual_seed(seed_from(seed, epoch))
    passes = [torch.randperm(total, generator=generator) for _ in range(0, count, total)]
    return torch.cat(passes)[:count], sizes


def normalise(images, dataset):
    """uint8 (N, 3, H, W) to float32, in memory_format, with mean 0 and standard deviation 1 per channel."""
    factors = [(1 / (255 * std), -mean / std) for mean, std in zip(dataset.mean, dataset.std, strict=True)]
    scale, shift = upload(torch.tensor(factors).T.contiguous(), images.device)[:, :, None, None]
    images = images.contiguous(memory_format=memory_format(images.device))
    return images.float().mul_(scale).add_(shift)


def memory_format(device):
    """Of images and networks: channels_last, except on MPS, where the backward passes of batch norm and pooling
    are then wrong or abort the process (github.com/pytorch/pytorch/issues/175189 and 175190)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def upload(tensor, device):
    """The tensor on the device, without device synchronization."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _augment(images, passes, streams, seed):
    """Pass each image through its stream. passes: int64 (N,) on the CPU, each image's stream index."""
    generator = torch.Generator().manual_seed(seed)
    order = passes.argsort(stable=True)
    rows, inverse = upload(torch.stack([order, order.argsort()]), images.device)
    counts = torch.bincount(passes, minlength=len(streams)).tolist()
    parts = []
    for group, stream in zip(images.index_select(0, rows).split(counts), streams, strict=True):
        for augmentation in stream if len(group) else ():
            group = augmentation(group, generator)
        parts.append(group)
    return torch.cat(parts).index_select(0, inverse)


def seed_from(*parts):
    """A 32-bit seed from whatever identifies a use of randomness, so that no two uses share a sequence."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def named(args):
    """The arguments as {name: value}, with --data as it appears in a run's name."""
    return {**vars(args), "data": key(args.data)}


# Subsets


def spec(names):
    """Class names as a --classes value: sorted, one CSV row."""
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow(sorted(names))
    return row.getvalue()


def class_names(spec):
    """The class names in a --classes value: a group's, or a comma-separated list."""
    return GROUPS.get(spec) or tuple(name.strip() for name in spec.split(","))


def check_classes(dataset, option, spec):
    """The class names in a --classes value; raises ValueError for one that is not in the data set."""
    names = class_names(spec)
    for name in names:
        if name not in dataset.classes:
            raise ValueError(
                f"{option}: {dataset.name} has no class {name!r}; it has {', '.join(dataset.classes)}"
            )
    return names


def _select_classes(dataset, text):
    names = check_classes(dataset, f"--classes {text}", text)
    kept = [label for label, name in enumerate(dataset.classes) if name in names]
    renumbered = torch.full((len(dataset.classes),), -1)
    renumbered[kept] = torch.arange(len(kept))

    def part(split):
        rows = (renumbered[split.labels] >= 0).nonzero()[:, 0]
        return Split(split.images[rows], renumbered[split.labels[rows]])

    return dataset._replace(
        only=None if len(kept) == len(dataset.classes) else spec(dataset.classes[label] for label in kept),
        classes=tuple(dataset.classes[label] for label in kept),
        **{name: part(getattr(dataset, name)) for name in SPLITS},
    )


def _subset(split, fraction):
    """The same number of images per class, at least one: the first of each class in a fixed random order, so
    that a smaller fraction is a subset of a larger one."""
    counts = torch.bincount(split.labels)
    per_class = max(1, min(round(fraction * len(split.labels) / len(counts)), int(counts.min())))
    rows = _per_class_shuffled(split.labels, [per_class] * len(counts))
    return Split(split.images[rows], split.labels[rows])


def _per_class_shuffled(labels, counts):
    """Rows, int64, ascending, of counts[c] images of each class c, chosen with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for label, count in enumerate(counts):
        rows = (labels == label).nonzero()[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def _held_out(labels):
    """A mask, bool (N,), of a tenth of each class, at least one image, with a fixed seed. labels: (N,)."""
    counts = [max(1, round(count / 10)) for count in np.bincount(labels)]
    mask = np.zeros(len(labels), bool)
    mask[_per_class_shuffled(torch.from_numpy(labels), counts).numpy()] = True
    return mask


def _mean_and_std(images):
    """Exact per-channel mean and standard deviation of images, uint8 (N, 3, H, W), with pixels in [0, 1]: two
    tuples of 3 floats. The std of a constant channel is 1."""
    histogram = torch.zeros(3, 256, dtype=torch.int64)
    for part in images.split(CHUNK):
        histogram += torch.stack([part[:, c].reshape(-1).bincount(minlength=256) for c in range(3)])
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = histogram.double() / histogram.sum(1, keepdim=True)
    mean = weights @ values
    std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())


def _fingerprint(splits):
    """16 hexadecimal digits of the SHA-256 of each split's images and labels, in order."""
    digest = hashlib.sha256()
    for tensor in itertools.chain(*splits):
        digest.update(tensor.numpy())
    return digest.hexdigest()[:16]


# Cache: one folder per data set, with each split's images and labels as .npy files, and meta.json


def _load_cached(root, cache_key, name, source, decode):
    """The data set from the cache, decoded into it first if it is missing.

    source: text that identifies the input: a cache with the same key and a different source is replaced.
    decode(): returns the arguments of _write_cache after the folder.
    """
    digest = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:16]
    folder = root / "cache" / f"{cache_key}-{digest}"
    dataset = _open_cache(folder, name)
    if dataset:
        return dataset
    with runs.exclusive(root / "cache" / f".{folder.name}.lock"):
        dataset = _open_cache(folder, name)  # another process may have written it meanwhile
        if dataset:
            return dataset
        if folder.exists():
            print(f"{folder} is damaged or out of date: decoding the images again")
            shutil.rmtree(folder)
        with _new_folder(folder) as temporary:
            _write_cache(temporary, *decode())
        for old in folder.parent.glob(f"{cache_key}-{'?' * 16}"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    return _open_cache(folder, name)


def _open_cache(folder, name):
    """The data set in a cache; None if a file is missing or truncated."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        fields = {field: meta[field] for field in ("mean", "std", "fingerprint")}
        if meta["version"] == CACHE_VERSION:
            return Dataset(name, None, tuple(meta["classes"]), *_open_splits(folder), **fields, cache=folder)
    except (OSError, ValueError, EOFError, LookupError, TypeError):  # from numpy, json or a missing field
        pass


def _open_splits(folder, shuffled=True):
    files = [[folder / f"{split}-{part}.npy" for part in Split._fields] for split in SPLITS]
    return [Split(*(mapped(file, shuffled) for file in pair)) for pair in files]


def _write_cache(folder, classes, splits):
    """Write the files of a cache.

    splits: {name: (labels, blocks)}; labels: array (N,); blocks: iterator of (images, unreadable), uint8
    (n, 3, 32, 32) and list of (path, reason). Raises RuntimeError naming the unreadable files of all splits.
    """
    unreadable = []
    for split, (labels, blocks) in splits.items():
        blocks = runs.progress(blocks, f"decoding {split}", len(labels), lambda block: len(block[0]))
        with open(folder / f"{split}-images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), 3, SIZE, SIZE)}
            np.lib.format.write_array_header_1_0(file, header)
            for images, failures in blocks:
                file.write(np.ascontiguousarray(images))
                unreadable += failures
            file.flush()
            os.fsync(file.fileno())
        np.save(folder / f"{split}-labels.npy", labels.astype(np.int64))
    if unreadable:
        names = ", ".join([str(path) for path, _ in unreadable[:10]] + ["..."] * (len(unreadable) > 10))
        total = sum(len(labels) for labels, _ in splits.values())
        text = f"{len(unreadable):,} of {total:,} images cannot be read, fix or remove them: {names}"
        raise RuntimeError(f"{text} (the first: {unreadable[0][1]})")
    splits = _open_splits(folder, shuffled=False)
    mean, std = _mean_and_std(splits[0].images)
    meta = {"version": CACHE_VERSION, "classes": list(classes), "mean": mean, "std": std}
    (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": _fingerprint(splits)}))


def mapped(path, shuffled=True):
    """The array of an .npy file as a read-only, memory-mapped tensor. shuffled: for random access; disables
    read-ahead, which would evict pages in use, in a file larger than half of the memory."""
    array = np.load(path, mmap_mode="r")  # writable mode c would have to fit in memory
    if shuffled and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if array.nbytes > memory / 2:
            array.base.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has no read-only tensors
        return torch.from_numpy(array)


@contextlib.contextmanager
def _new_folder(final):
    """A temporary folder, renamed to `final` at the end of the block, or removed if the block fails."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".unfinished-*"):  # of a process killed at least a day ago
        if time.time() - leftover.stat().st_mtime > 86_400:
            shutil.rmtree(leftover, ignore_errors=True)
    unfinished = {"prefix": ".unfinished-", "dir": final.parent, "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**unfinished) as temporary:
        yield Path(temporary)
        os.chmod(temporary, 0o755)
        if not final.is_dir():  # where locks do not work, another process may have been faster
            os.rename(temporary, final)


def key(data):
    """`--data` as part of a file name: short, safe and unique. A folder inside the current one is identified
    by its relative path, so that names survive moving the project."""
    if data in NAMES:
        return data
    path = Path(data).resolve()
    place = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)[:40]}-{digest}"


# A folder of images


def _load_folder(folder, root, cache_key, name):
    classes, files = _list_images(folder.resolve())
    return _load_cached(root, cache_key, name, repr((classes, files)), lambda: _decode_folder(classes, files))


def _list_images(folder):
    """Sorted class names, and {split: [[(path, bytes, modification time), ...] for each class]}.

    Prints how many files are ignored. Raises OSError for a folder that is not a data set.
    """
    places = {split: folder / split for split in SPLITS}
    if (folder / "val").is_dir():
        if places["valid"].is_dir():
            raise FileExistsError(f"{folder} has both valid/ and val/: rename or remove one of them")
        places["valid"] = folder / "val"
    for split in ("train", "test"):
        if not places[split].is_dir():
            needs = "it needs train/<class>/* and test/<class>/*, and may have valid/<class>/*"
            raise FileNotFoundError(f"{folder} has no folder {split}/: {needs}")
    ignored = collections.Counter()
    found = {split: _list_split(place, ignored) for split, place in places.items() if place.is_dir()}
    if ignored:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common())
        print(f"{ignored.total():,} files ignored: {kinds}")
    classes = sorted(set().union(*found.values()))
    if not classes:
        raise FileNotFoundError(f"{places['train']} has no class folders: it needs train/<class>/*")
    for split, name in itertools.product(found, classes):
        if not found[split].get(name):
            needs = f"every class needs an image ({' '.join(IMAGE_SUFFIXES)}) in each split"
            raise FileNotFoundError(f"{places[split] / name} is missing or has no images: {needs}")
    return classes, {split: [by_class[name] for name in classes] for split, by_class in found.items()}


def _list_split(split, ignored):
    """{class: [(path, bytes, modification time), ...]} of the images in and below a split's class folders, in
    ImageFolder's order. Hidden files are skipped, others counted in `ignored`, a Counter, by kind."""

    def fail(error):
        raise error

    found = {}
    for place, folders, files in os.walk(split, onerror=fail, followlinks=True):
        for names in (folders, files):
            names[:] = sorted(name for name in names if not name.startswith("."))
        inside = Path(place).relative_to(split).parts  # class folder, its subfolder, ...
        images = found.setdefault(inside[0], []) if inside else None
        for file in (os.path.join(place, name) for name in files):
            suffix = os.path.splitext(file)[1].lower()
            try:
                info = os.stat(file)
            except OSError:  # a broken link
                info = None
            if info is None or not stat.S_ISREG(info.st_mode):
                ignored["broken link or special file"] += 1
            elif inside and suffix in IMAGE_SUFFIXES:
                images.append((file, info.st_size, info.st_mtime_ns))
            else:
                ignored[suffix or "without suffix"] += 1
    return found


def _decode_folder(classes, files):
    """Arguments of _write_cache. Without valid/, a tenth of train becomes the valid split."""
    paths = {split: [path for found in files[split] for path, *_ in found] for split in files}
    labels = {split: np.repeat(np.arange(len(classes)), list(map(len, files[split]))) for split in files}
    if "valid" not in files:
        for name, found in zip(classes, files["train"], strict=True):
            if len(found) < 2:
                raise RuntimeError(f"class {name!r} has one image in train/: too few to split off valid/")
        held = _held_out(labels["train"])
        for split, mask in (("valid", held), ("train", ~held)):
            paths[split] = list(itertools.compress(paths["train"], mask))
            labels[split] = labels["train"][mask]
    return classes, {split: (labels[split], _decode(paths[split])) for split in SPLITS}


def _decode(paths, block=500):
    """Decode files on all cores: yield (images, unreadable) for _write_cache, `block` files at a time."""
    blocks = [paths[start : start + block] for start in range(0, len(paths), block)]
    # Fewer blocks are decoded sooner than processes start. Forked processes need semaphores, which Linux keeps
    # in /dev/shm; some containers have none
    parallel = len(blocks) >= 4 and os.access("/dev/shm", os.W_OK)
    workers = min(len(os.sched_getaffinity(0)), len(blocks)) if parallel else 0
    yield from torch.utils.data.DataLoader(
        blocks, batch_size=None, collate_fn=_decode_block, num_workers=workers,
        multiprocessing_context="fork" if workers else None, worker_init_fn=_leave_signals_to_the_parent,
    )  # fmt: skip


def _leave_signals_to_the_parent(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _decode_block(paths):
    images, unreadable = np.zeros((len(paths), 3, SIZE, SIZE), np.uint8), []
    for row, path in enumerate(paths):
        try:
            images[row] = read_image(path)
        except RuntimeError as error:
            unreadable.append((path, str(error)))
    return images, unreadable


def read_image(path):
    """Any image file as RGB, uint8 array (3, 32, 32): transparency is dropped, 16-bit grey keeps its upper 8
    bits, other sizes are resized (bilinear, antialiased). Raises RuntimeError naming the file."""
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
        raise RuntimeError(f"{path} cannot be read as an image ({error})") from None


# CINIC-10 and CIFAR-10


def _load_cinic10(root):
    """From an unpacked folder, the cache, an archive, or the network, whichever is found first."""
    folders = [root / "cinic10", root / "CINIC-10", root]
    folder = next((f for f in folders if all((f / split).is_dir() for split in SPLITS)), None)
    if folder is None:
        for cache in (root / "cache").glob("cinic10-*"):  # whose images were removed after decoding
            dataset = _open_cache(cache, "cinic10")
            if dataset:
                return dataset
        folder = folders[0]
        with runs.exclusive(root / ".cinic10.lock"):
            if not folder.is_dir():  # else another process has unpacked it meanwhile
                with _new_folder(folder) as temporary:
                    _unpack_cinic10(root, temporary)
    return _load_folder(folder, root, "cinic10", "cinic10")


def _unpack_cinic10(root, folder):
    """Unpack root/CINIC-10.tar.gz into a folder, downloading it first if it is missing.

    Raises RuntimeError for a damaged archive, and for a member that would escape the folder.
    """
    from torchvision.datasets import utils

    archive = root / "CINIC-10.tar.gz"
    if not archive.exists():
        _download_cinic10(folder / archive.name)
        (folder / archive.name).rename(archive)
    elif not utils.check_integrity(archive, CINIC10_MD5):
        raise RuntimeError(f"{archive} is damaged or a different file (wrong MD5): remove it and try again")
    print(f"unpacking {archive}", flush=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # some torchvision versions do not filter
    except (tarfile.TarError, EOFError, OSError) as error:
        raise RuntimeError(f"{archive} cannot be unpacked ({error})") from error


def _download_cinic10(archive):
    from torchvision.datasets import utils

    for url in CINIC10_URLS:
        print(f"downloading {url}", flush=True)
        try:
            with _download_settings():
                utils.download_url(url, archive.parent, archive.name, CINIC10_MD5)
            return
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            print(f"failed: {reason}")
    raise RuntimeError(
        f"CINIC-10 cannot be downloaded ({reason}): connect to the network, put {archive.name} from "
        f"{CINIC10_URLS[0]} into the folder of --root, use --data cifar10, {OTHERWISE}"
    )


@contextlib.contextmanager
def _download_settings():
    """In the block, stalled connections fail after TIMEOUT, and progress bars appear only on a terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            yield
    finally:
        socket.setdefaulttimeout(before)


def _cifar10(root):
    """Arguments of _write_cache. 5,000 of 50,000 training images, 500 per class, become the valid split."""
    from torchvision.datasets import CIFAR10

    try:
        with _download_settings():
            train, test = (CIFAR10(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise RuntimeError(
            f"CIFAR-10 cannot be downloaded ({error}): connect to the network, put {CIFAR10.filename} from "
            f"{CIFAR10.url} into {root}, {OTHERWISE}"
        ) from error
    held = _held_out(np.array(train.targets))
    parts = {"train": (train, ~held), "valid": (train, held), "test": (test, slice(None))}
    return train.classes, {
        split: (np.array(part.targets)[rows], [(part.data[rows].transpose(0, 3, 1, 2), [])])
        for split, (part, rows) in parts.items()
    }


# Generated images


def synthetic(counts=(2000, 500, 1000)):
    """Ten generated classes: vehicles with straight edges, animals with round ones, at random position, size,
    rotation and colour on noise, so that colour does not reveal the class. Always the same bits.

    counts: images in train, valid and test.
    """
    splits = []
    for split, count in enumerate(counts):
        generator = torch.Generator().manual_seed(seed_from("synthetic", split))
        labels = torch.arange(count) % len(CLASSES)
        splits.append(Split(_draw(labels, generator), labels))
    mean, std = _mean_and_std(splits[0].images)
    return Dataset(
        "synthetic", None, CLASSES, *splits, mean, std, cache=None, fingerprint=_fingerprint(splits)
    )


def _draw(labels, generator):
    """One image for each label, uint8 (N, 3, 32, 32). Only with operations that every CPU rounds alike: sqrt,
    cos and randn differ between processors."""

    def uniform(low, high, *shape):
        return torch.rand(len(labels), *shape, generator=generator) * (high - low) + low

    half, radius = uniform(-0.2, 0.2, 1, 1), uniform(10, 14, 1, 1)  # tangent of half the angle; pixels
    cx, cy = uniform(-3, 3, 1, 1), uniform(-3, 3, 1, 1)
    across = torch.arange(SIZE) - (SIZE - 1) / 2
    dx, dy = across.view(1, 1, -1) - cx, across.view(1, -1, 1) - cy
    cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    x = (cos * dx + sin * dy) / radius  # the shape spans [-1, 1]
    y = (cos * dy - sin * dx) / radius

    def box(x0, y0, half_width, half_height):  # signed distances: negative inside, in units of the radius
        return torch.maximum((x - x0).abs() - half_width, (y - y0).abs() - half_height)

    def disc(x0, y0, r):  # exact at the edge only
        return ((x - x0) * (x - x0) + (y - y0) * (y - y0) - r * r) / (2 * r)

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
    inside = (0.5 - distance * radius).clamp(0, 1)[:, None]  # (N, 1, 32, 32), edges blurred over a pixel
    ground, ink = uniform(0, 140, 3, 1, 1), uniform(115, 255, 3, 1, 1)  # dark ground, bright shape
    noise = torch.randint(-35, 36, (len(labels), 3, SIZE, SIZE), generator=generator, dtype=torch.int8)
    return (ground + (ink - ground) * inside + noise).clamp(0, 255).round().to(torch.uint8)


def describe(dataset):
    """Describe a data set in a few lines of text."""
    splits = {name: getattr(dataset, name) for name in SPLITS}
    bytes_used = sum(split.images.nbytes + split.labels.nbytes for split in splits.values())
    lines = [
        f"{dataset.name}: {len(dataset.classes)} classes: {', '.join(dataset.classes)}",
        "images:  " + ", ".join(f"{name} {len(split.labels):,}" for name, split in splits.items()),
        "mean:    " + ", ".join(f"{value:.4f}" for value in dataset.mean),
        "std:     " + ", ".join(f"{value:.4f}" for value in dataset.std),
        f"bytes:   {bytes_used:,}",
        f"cache:   {dataset.cache or 'none, generated at every start'}",
    ]
    return "\n".join(lines)


def add_arguments(parser, classes=True):
    """The arguments of `load`, shared by every script. classes: whether --classes is one of them."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    choices = f"{', '.join(NAMES)}, or a folder with train/<class>/* and test/<class>/*"
    add("--data", default="cinic10", help=f"{choices} (default: %(default)s)")
    add("--root", default="data", help="folder for downloads and decoded images (default: %(default)s)")
    part = "part of the train split to use, in (0, 1], with the same number of images per class"
    add("--fraction", type=runs.number(float, 0, 1, (1,)), default=1.0, help=f"{part} (default: all)")
    parser.set_defaults(classes=None)
    if classes:
        add("--classes", help="use only these classes: vehicles, animals, or names such as cat,dog")


def main():
    parser = runs.new_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    print(describe(load(args.data, args.root, args.fraction, args.classes)))


if __name__ == "__main__":
    runs.command_line(main)
