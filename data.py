"""Image data sets as uint8 tensors: decoded once, cached, memory-mapped, batched on any device.

    python data.py --data cinic10         # download (688 MB), decode, cache, describe
    python data.py --data path/to/folder  # train/<class>/*, valid/<class>/*, test/<class>/*, or <class>/*

A data set has three splits; a split is `images`, uint8 (N, 3, 32, 32), and `labels`, int64 (N,).
"""

import collections
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import tarfile
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps  # comes with torchvision, whose own import would take over a second

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
SPELLINGS = {  # in any case; for train and test, only the first as it is, the others are taken for mistakes
    "train": ("train", "training", "trainset"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "testing", "testset"),
}
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
LAYOUT = "a data set needs train/<class>/* and test/<class>/*, or <class>/*"
CACHE_VERSION = 5  # increment it when decoding or the cache's layout changes

# Darlow et al., 2018, arXiv:1810.03505, CC BY 4.0. The host has moved its files before: URLs to try in turn.
CINIC10_MD5 = "6ee4d0c996905fe93221de577967a372"
CINIC10_URLS = (
    "https://datashare.ed.ac.uk/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/download",
    "https://datashare.ed.ac.uk/server/api/core/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/content",
    "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
)
TIMEOUT = 60  # seconds without data after which a download is abandoned


class Split(NamedTuple):
    images: torch.Tensor  # uint8 (N, 3, 32, 32)
    labels: torch.Tensor  # int64 (N,)


class Dataset(NamedTuple):
    name: str  # a built-in's, or a folder's and 8 digits of its content
    only: str | None  # the names that --classes selected, as `spec` writes them; None: all of them
    classes: tuple  # of str, in label order
    train: Split
    valid: Split
    test: Split
    mean: tuple  # of 3 floats: per-channel mean of the train split, pixels in [0, 1]
    std: tuple
    cache: Path | None  # the file from which a later start memory-maps it
    fingerprint: str  # of the whole set, before --fraction and --classes: 16 hexadecimal digits


def load(data="cinic10", root="data", fraction=1.0, classes=None):
    """Load the data set `data` (a name in NAMES or a folder), decoding it first if it is not cached.

    fraction: part of the train split to keep, with the same number of images per class, at least one.
    classes: `vehicles`, `animals` or names joined by commas; labels are renumbered.
    Raises ValueError for an invalid argument, OSError or RuntimeError for data that cannot be loaded.
    """
    root, folder = Path(os.path.expanduser(root)), Path(os.path.expanduser(data))
    if data == "synthetic":
        dataset = synthetic()
    elif data == "synthetic-small":
        dataset = synthetic((400, 100, 200))._replace(name=data)
    elif data == "cinic10":
        dataset = _load_cinic10(root)
    elif data == "cifar10":
        dataset = _load_cached(root, data, "torchvision", lambda: _cifar10(root))
    elif data and folder.is_dir():
        dataset = _load_folder(folder, root)
    else:
        raise ValueError(f"--data {data}: not a folder, and not one of {', '.join(NAMES)}")
    if classes is not None:
        dataset = _select_classes(dataset, classes)
    if fraction < 1:
        dataset = dataset._replace(train=_subset(dataset.train, fraction))
    if dataset.only or fraction < 1:  # a subset has its own mean and std
        mean, std = _mean_and_std(dataset.train.images)
        dataset = dataset._replace(mean=mean, std=std)
    if len(dataset.classes) == 1 or len(dataset.train.labels) == len(dataset.classes):
        few = "one class" if len(dataset.classes) == 1 else "one training image a class"
        print(f"warning: {dataset.name} has {few}: its accuracies say nothing")
    return dataset


def to_device(split, device):
    """The split on the device if it fits in half of the free memory, else unchanged; `batches` takes both."""
    if device.type == "cuda" and 2 * split.images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return split
    return Split(split.images.to(device), split.labels.to(device))


def batches(split, dataset, device, plan, streams=((),), seeds=()):
    """Yield an epoch of (images, labels): float32 (B, 3, H, W), normalised; int64 (B,).

    plan: from `make_plan` for len(streams) * N images. streams: lists of functions (uint8 images, generator)
    -> uint8 images; every image passes through each stream once. seeds: (seed, epoch), on which
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

    seed: None keeps images in order. steps: number of full batches, drawn from as many passes as needed, with
    a seed only.
    """
    count = steps * batch_size if steps else total
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    if seed is None:
        return torch.arange(total), sizes
    if len(sizes) > 1 and sizes[-1] == 1:  # batch norm cannot train on one 1x1 map
        sizes[-2:] = [sizes[-2] + 1]
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
    """Of images and networks: channels_last, except on MPS, where backward passes of batch norm and pooling
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


# Subsets


def spec(names):
    """Class names as --classes takes them, in one spelling: sorted, joined by commas."""
    return ",".join(sorted(names))


def pick(dataset, option, text):
    """The classes, a tuple, that `text` names, separated by commas: names of classes (without a comma) or, where
    no class is called so, of GROUPS. Blanks that belong to no name are dropped. Raises ValueError for others."""
    names = []
    for name in text.split(","):
        name = name if name in dataset.classes else name.strip()
        names += [name] if name in dataset.classes else GROUPS.get(name, [name])
    for name in names:
        if name not in dataset.classes:
            known = ", ".join(dataset.classes)
            known += " (one with a comma cannot be selected)" * any("," in name for name in dataset.classes)
            raise ValueError(f"{option} {text}: {dataset.name} has no class {name!r}; it has {known}")
    return tuple(dict.fromkeys(names))


def _select_classes(dataset, chosen):
    names = pick(dataset, "--classes", chosen)
    if len(names) == len(dataset.classes):
        return dataset
    classes = tuple(name for name in dataset.classes if name in names)
    renumbered = torch.tensor([classes.index(name) if name in names else -1 for name in dataset.classes])
    splits = {}
    for split in SPLITS:
        images, labels = getattr(dataset, split)
        labels = renumbered[labels]
        splits[split] = Split(images[labels >= 0], labels[labels >= 0])
    return dataset._replace(only=spec(names), classes=classes, **splits)


def _subset(split, fraction):
    """The same number of images per class, at least one: the first of each class in a fixed random order, so
    that a smaller fraction is a subset of a larger one."""
    counts = torch.bincount(split.labels)
    asked = round(fraction * len(split.labels) / len(counts))
    per_class = max(1, min(asked, int(counts.min())))
    if per_class != asked:
        why = f"one has {counts.min():,}" if asked > per_class else "the least"
        print(f"--fraction {fraction:g}: {per_class:,} images a class, not {asked:,}: {why}")
    rows = (_place_in_class(split.labels) < per_class).nonzero()[:, 0]
    return Split(split.images[rows], split.labels[rows])


def _place_in_class(labels):
    """Each image's place, from 0, in a random but fixed order of its class's images. labels: int64 (N,)."""
    generator = torch.Generator().manual_seed(0)
    places = torch.empty_like(labels)
    for label, count in enumerate(torch.bincount(labels).tolist()):
        rows = (labels == label).nonzero()[:, 0]
        places[rows[torch.randperm(count, generator=generator)]] = torch.arange(count)
    return places


def _tenths(labels):
    """How many tenths of its class lie before each image, in a fixed random order: a tenth has at least one
    image, and those with 0, int64, are the first that is held out. labels: int64 (N,)."""
    tenth = torch.tensor([max(1, round(count / 10)) for count in torch.bincount(labels).tolist()])
    return _place_in_class(labels) // tenth[labels]


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


# Cache: a file for each data set


def _load_cached(root, name, source, decode):
    """The data set from its cache, decoded into it first if that is missing, damaged or of another source.

    name: of the file. source: identifies what is decoded. decode(): returns class names and three splits.
    """
    file = root / "cache" / f"{name}.pt"
    dataset = _open_cache(file, source)
    if dataset:
        return dataset
    with runs.exclusive(file.with_name(f".{name}.lock")):
        dataset = _open_cache(file, source)  # another process may have written it meanwhile
        if dataset:
            return dataset
        if file.exists():
            print(f"{file} is damaged or out of date: decoding the images again", flush=True)
        classes, splits = decode()
        mean, std = _mean_and_std(splits[0].images)
        dataset = Dataset(name, None, tuple(classes), *splits, mean, std, file, _fingerprint(splits))
        kept = {field: getattr(dataset, field) for field in ("classes", "mean", "std", "fingerprint")}
        kept |= {split: tuple(tensors) for split, tensors in zip(SPLITS, splits, strict=True)}
        runs.write_atomically(file, {"version": CACHE_VERSION, "source": source, "dataset": kept})
    return _open_cache(file, source) or dataset  # which others may have replaced, or cannot be mapped


def _open_cache(file, source=None):
    """The data set in a cache, memory-mapped; None if the file is missing, damaged or of another source."""
    try:
        saved = torch.load(file, mmap=True, weights_only=True)
        if saved["version"] == CACHE_VERSION and source in (None, saved["source"]):
            splits = {split: Split(*saved["dataset"].pop(split)) for split in SPLITS}
            return Dataset(name=file.stem, only=None, cache=file, **splits, **saved["dataset"])
    except Exception:  # noqa: BLE001 (a damaged file can raise nearly anything)
        return None


# A folder of images


def _load_folder(folder, root):
    folder = folder.resolve()
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", folder.name)[:40]
    dataset = _load_images(root, f"{safe}-{_digits(str(folder))}", *_list_images(folder))
    return dataset._replace(name=f"{safe}-{_digits(dataset.fingerprint, *dataset.classes)}")


def _digits(*texts):
    """8 hexadecimal digits that stand for the texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]


def _load_images(root, name, classes, files):
    """The data set of files listed by _list_images. name: of its cache."""
    listed = itertools.chain.from_iterable(files.values())
    text = "\n".join(f"{path} {size} {modified}" for _, path, size, modified in listed)
    source = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return _load_cached(root, name, source, lambda: (classes, _decode_splits(classes, files)))


def _list_images(folder):
    """Sorted class names, and {split: [(class, path, bytes, modification time), ...]}.

    Prints what is ignored, and what is split off train. Raises OSError for a folder that is not a data set.
    """
    ignored = collections.Counter()
    places = _find_splits(folder, ignored)
    files = {split: _list_split(place, ignored) for split, place in places.items()}
    if ignored:
        kinds = [f"{count:,} {kind}" for kind, count in ignored.most_common(20)]
        print(f"ignored in {folder}: {', '.join(kinds + ['...'] * (len(ignored) > 20))}")
    for one, other in itertools.combinations(places, 2):
        if places[one].samefile(places[other]):
            print(f"warning: {one} and {other} are the same images: {places[other].resolve()}")
    entries = itertools.chain.from_iterable(map(_visible, places.values()))
    classes = sorted({entry.name for entry in entries if entry.is_dir()})
    if not classes:
        raise FileNotFoundError(f"{places['train']} has no class folders: {LAYOUT}")
    missing = [split for split in SPLITS if split not in places]
    for split, place in places.items():
        counts = collections.Counter(name for name, *_ in files[split])
        needed = 1 + len(missing) if split == "train" else 1
        for name in classes:
            if not (place / name).is_dir():
                raise FileNotFoundError(f"{place} has no class folder {name}/, but another split has")
            if counts[name] < needed:
                where = f"{place / name} ({' '.join(IMAGE_SUFFIXES)})"
                raise FileNotFoundError(f"too few images in {where}: {counts[name]} found, {needed} needed")
    if missing:
        tenths = "a tenth of each class, with a fixed seed"
        print(f"{' and '.join(missing)} split off {places['train']}: {tenths}")
    return classes, files


def _visible(folder):
    """A folder's entries, by name, without hidden ones."""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return sorted(entries, key=lambda entry: entry.name)


def _find_splits(folder, ignored):
    """{split: its folder} for the splits there are, {"train": folder} for class folders alone. Adds the rest
    to `ignored`. Raises OSError for a misspelt split, and for a part of a data set."""
    places, entries = {}, _visible(folder)
    for split, spellings in SPELLINGS.items():
        found = [entry.name for entry in entries if entry.is_dir() and entry.name.lower() in spellings]
        if len(found) > 1:
            raise FileExistsError(f"{folder} has both {found[0]}/ and {found[1]}/: rename or remove one")
        if found and split != "valid" and found[0] != split:
            raise FileNotFoundError(f"{folder} has no folder {split}/: did you mean {found[0]}/? Rename it")
        if found:
            places[split] = folder / found[0]
    if "train" in places:
        others = [entry for entry in entries if folder / entry.name not in places.values()]
        ignored.update(f"{entry.name}/" if entry.is_dir() else entry.name for entry in others)
        return places
    if places:
        raise FileNotFoundError(f"{folder} has no folder train/: {LAYOUT}")
    names = ("train", "test", *SPELLINGS["valid"])
    if folder.name.lower() in names and sum((folder.parent / name).is_dir() for name in names) > 1:
        raise FileNotFoundError(f"{folder} is one split of a data set: use its parent, {folder.parent}")
    for inner in folder.glob("*/train"):
        raise FileNotFoundError(f"{folder} has no folder train/: did you mean {inner.parent}?")
    return {"train": folder}


def _list_split(split, ignored):
    """[(class, path, bytes, modification time), ...] of the images in and below a split's class folders: in
    each folder first its files, then its folders, by name. Adds other files to `ignored`.

    Links are followed last and nothing is taken twice, so that a link does not move images to another class.
    """
    top, files = split.resolve(), []
    seen = set(map(str, top.parents))  # real paths
    todo = collections.deque([(split, str(top), None, "")])
    while todo:
        entry, real, name, order = todo.popleft()
        real = real or os.path.realpath(entry)
        is_image = name and entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()
        if not is_image and not entry.is_dir():
            ignored[Path(entry).suffix.lower() or "without suffix"] += 1
            continue
        if real in seen:
            ignored["reached again through a link"] += 1
            continue
        seen.add(real)
        if is_image:
            info = entry.stat()
            files.append((order, entry.name, (name, os.fspath(entry), info.st_size, info.st_mtime_ns)))
        else:
            order = os.fspath(entry).replace(os.sep, "\0")  # "\0": a folder before its neighbour "folder 2"
            for inner in reversed(_visible(entry)):
                kind = name or (inner.name if inner.is_dir() else None)  # None: no class yet
                if not inner.is_symlink():
                    todo.appendleft((inner, f"{real}{os.sep}{inner.name}", kind, order))
                elif os.path.exists(inner):
                    todo.append((inner, None, kind, order))
                else:
                    ignored["broken link"] += 1
    return [file for *_, file in sorted(files)]


def _decode_splits(classes, files):
    """The three splits of the files. A split without files becomes a tenth of train."""
    number = {name: label for label, name in enumerate(classes)}
    missing = [split for split in SPLITS if split not in files]
    tenths = _tenths(torch.tensor([number[name] for name, *_ in files["train"]])).tolist()
    parts = {split: [] for split in SPLITS} | {**files, "train": []}
    for file, tenth in zip(files["train"], tenths, strict=True):
        parts[missing[tenth] if tenth < len(missing) else "train"].append(file)
    listed = [file for split in SPLITS for file in parts[split]]
    images = torch.from_numpy(_decode([path for _, path, *_ in listed]))
    labels = torch.tensor([number[name] for name, *_ in listed])
    counts = [len(parts[split]) for split in SPLITS]
    return [*map(Split, images.split(counts), labels.split(counts))]


def _decode(paths):
    """Decode files into an array, uint8 (N, 3, 32, 32). Raises RuntimeError naming unreadable ones."""
    images, unreadable = np.empty((len(paths), 3, SIZE, SIZE), np.uint8), []
    rows = range(len(paths))
    blocks = [rows[start : start + 8] for start in rows[::8]]  # a task for each image would take longer

    def read(block):
        for row in block:
            try:
                images[row] = read_image(paths[row])
            except RuntimeError as error:
                unreadable.append((row, error))
        return len(block)

    pool = ThreadPoolExecutor(torch.get_num_threads())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for _ in runs.progress(pool.map(read, blocks), "decoding", len(paths), int):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    if unreadable:
        unreadable.sort()
        names = ", ".join([paths[row] for row, _ in unreadable[:10]] + ["..."] * (len(unreadable) > 10))
        text = f"{len(unreadable):,} of {len(paths):,} images cannot be read, fix or remove them: {names}"
        raise RuntimeError(f"{text} (the first: {unreadable[0][1]})")
    if warned:
        print(
            f"{len(warned):,} warnings from Pillow on images that it did read; the first: {warned[0].message}"
        )
    return images


def read_image(path):
    """Any image file as RGB, uint8 array (3, 32, 32): upright by its EXIF tag, transparent over white,
    16-bit grey by its upper 8 bits, the first of several frames, resized (bilinear, antialiased).

    Raises RuntimeError naming the file, also where pixels have no defined range (float, 32-bit integer).
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F" or (image.mode == "I" and file.format not in ("PNG", "PPM")):
                raise ValueError(f"pixels of mode {image.mode}, 32 bits, have no defined range")
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
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
    if not folder:
        dataset = _open_cache(root / "cache" / "cinic10.pt")  # whose images were removed after decoding
        if dataset:
            return dataset
        folder = _unpack(root, "cinic10", "CINIC-10.tar.gz", CINIC10_URLS, CINIC10_MD5)
    classes, files = _list_images(folder.resolve())
    if tuple(classes) != CLASSES:
        raise RuntimeError(f"{folder} is not CINIC-10: it has the classes {', '.join(classes)}")
    return _load_images(root, "cinic10", classes, files)


def _cifar10(root):
    """Class names and splits. 5,000 of 50,000 training images, 500 per class, become the valid split."""
    from torchvision.datasets import CIFAR10

    folder = root  # where torchvision unpacks it
    if not (folder / CIFAR10.base_folder).is_dir():
        folder = _unpack(root, "cifar10", CIFAR10.filename, [CIFAR10.url], CIFAR10.tgz_md5)
    try:
        parts = [CIFAR10(folder, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise RuntimeError(f"{folder / CIFAR10.base_folder} is damaged: remove it and try again") from error
    images = [torch.from_numpy(part.data.transpose(0, 3, 1, 2).copy()) for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    train, test = (Split(*pair) for pair in zip(images, labels, strict=True))
    held = _tenths(train.labels) == 0
    train, valid = (Split(train.images[mask], train.labels[mask]) for mask in (~held, held))
    return parts[0].classes, (train, valid, test)


def _unpack(root, name, filename, urls, md5):
    """The folder root/name, unpacked from root/filename, which is downloaded first, if they are missing.

    Raises RuntimeError for an archive that is damaged, not to be had, or would write outside the folder.
    """
    folder, archive, unfinished = root / name, root / filename, root / f".{name}-unfinished"
    with runs.exclusive(root / f".{name}.lock"):
        if folder.is_dir():  # another process has unpacked it meanwhile
            return folder
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
            unfinished.mkdir()
            _download(urls, archive, unfinished / filename, md5)
            print(f"unpacking {archive}", flush=True)
            with tarfile.open(archive) as tar:
                tar.extractall(unfinished, filter="data")
            os.rename(unfinished, folder)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise RuntimeError(f"{archive} cannot be unpacked ({error})") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _download(urls, archive, unfinished, md5):
    """Download an archive, unless it is there, from the first of several URLs that has it."""
    from torchvision.datasets.utils import check_integrity

    if archive.exists():
        if check_integrity(archive, md5):
            return
        raise RuntimeError(f"{archive} is damaged or another file (wrong MD5): remove it and try again")
    for url in urls:
        print(f"downloading {url}", flush=True)
        request = urllib.request.Request(url, headers={"User-Agent": "pytorch/vision"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(unfinished, "wb") as file:
                blocks = iter(lambda: response.read(2**16), b"")
                file.writelines(runs.progress(blocks, archive.name, response.length or 0, len))
            if check_integrity(unfinished, md5):
                return os.rename(unfinished, archive)
            reason = "cut off, or another file (wrong MD5)"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        print(f"failed: {reason}")
    raise RuntimeError(
        f"{archive.name} cannot be downloaded ({reason}): connect to the network, put {archive.name} from "
        f"{urls[0]} into the folder of --root, or use --data cifar10, --data PATH (your own folder) or "
        "--data synthetic"
    )


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
        splits.append(Split(_paint(labels, generator), labels))
    mean, std = _mean_and_std(splits[0].images)
    return Dataset("synthetic", None, CLASSES, *splits, mean, std, None, _fingerprint(splits))


def _paint(labels, generator):
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
    counts = torch.bincount(dataset.train.labels)
    return "\n".join([
        f"{dataset.name}: {len(dataset.classes)} classes: {', '.join(dataset.classes)}",
        "images:  " + ", ".join(f"{split} {len(getattr(dataset, split).labels):,}" for split in SPLITS),
        f"per class: {counts.min():,} to {counts.max():,} training images",
        "mean:    " + ", ".join(f"{value:.4f}" for value in dataset.mean),
        "std:     " + ", ".join(f"{value:.4f}" for value in dataset.std),
        f"cache:   {dataset.cache or 'none, generated at every start'}",
    ])  # fmt: skip


def add_arguments(parser, classes=True):
    """The arguments of `load`, shared by every script. classes: whether --classes is one of them."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    choices = f"{', '.join(NAMES)}, or a folder with train/<class>/* and test/<class>/*"
    add("--data", default="cinic10", help=f"{choices} (default: %(default)s)")
    add("--root", default="data", help="folder for downloads and decoded images (default: %(default)s)")
    part = "part of the train split to use, in (0, 1], with the same number of images per class"
    add("--fraction", type=runs.number(float, "(0, 1]"), default=1.0, help=f"{part} (default: all)")
    parser.set_defaults(classes=None)
    if classes:
        add("--classes", help="use only these: vehicles, animals, or names such as cat,dog")


def main():
    parser = runs.new_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    print(describe(load(args.data, args.root, args.fraction, args.classes)))


if __name__ == "__main__":
    runs.command_line(main)
