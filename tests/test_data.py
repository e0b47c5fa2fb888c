import hashlib
import http.server
import io
import itertools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HOUSE
from PIL import Image
from torchvision import datasets, transforms

import augment
import data
import runs

CPU = torch.device("cpu")
PLAIN = SimpleNamespace(mean=(0, 0, 0), std=(1, 1, 1))  # only divides images by 255


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith(".") or "unfinished" in name)


def batches(split, size, seed=None, epoch=0, dataset=PLAIN, streams=((),)):
    """One epoch, as `train.train` requests it."""
    plan = data.make_plan(len(split.labels) * len(streams), size, seed, epoch)
    return data.batches(split, dataset, CPU, plan, streams, (seed, epoch))


def test_synthetic_is_always_the_same_balanced_and_not_separable_by_colour():
    first, second = data.synthetic(), data.synthetic()
    assert first.classes == data.CLASSES
    for name, count in zip(data.SPLITS, (2000, 500, 1000), strict=True):
        split = getattr(first, name)
        assert split.images.shape == (count, 3, 32, 32) and split.images.dtype == torch.uint8
        assert torch.equal(split.images, getattr(second, name).images)
        assert torch.bincount(split.labels).tolist() == [count // 10] * 10
    assert not torch.equal(first.train.images[:500], first.valid.images)
    # classifying by the nearest mean colour is hardly better than chance
    train, test = (s.images.float().mean((2, 3)) for s in (first.train, first.test))
    centres = torch.stack([train[first.train.labels == c].mean(0) for c in range(10)])
    assert (torch.cdist(test, centres).argmin(1) == first.test.labels).float().mean() < 0.25


def test_folder_equals_torchvisions_image_folder(image_folder, tmp_path):
    folder = image_folder(("b", "a b", "ü'\"x"), size=32)
    dataset = data.load(str(folder), tmp_path / "root")
    reference = datasets.ImageFolder(folder / "train", transforms.PILToTensor())
    assert dataset.classes == tuple(reference.classes)
    assert torch.equal(dataset.train.images, torch.stack([image for image, _ in reference]))
    assert dataset.train.labels.tolist() == reference.targets
    assert [len(getattr(dataset, s).labels) for s in data.SPLITS] == [18, 6, 9]
    pixels = dataset.train.images.double() / 255
    assert torch.allclose(torch.tensor(dataset.mean), pixels.mean((0, 2, 3)).float())
    assert torch.allclose(torch.tensor(dataset.std), pixels.std((0, 2, 3), correction=0).float())


def test_a_second_start_reads_the_cache_and_a_changed_folder_is_decoded_again(
    image_folder, tmp_path, monkeypatch
):
    folder = image_folder()
    for path in (folder / "train" / "dog").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    first = data.load(str(folder), tmp_path / "root")
    monkeypatch.setattr(data, "read_image", lambda path: pytest.fail("decoded again"))
    second = data.load(str(folder), tmp_path / "root")
    assert torch.equal(first.train.images, second.train.images) and second.mean == first.mean
    monkeypatch.undo()
    changed = folder / "train" / "cat" / "0.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    third = data.load(str(folder), tmp_path / "root")
    assert third.train.images[0, :, 4, 4].tolist() == [1, 2, 3]
    assert third.cache == first.cache and third.name != first.name
    os.rename(folder / "train" / "dog" / "x0.png", folder / "train" / "cat" / "x0.png")  # in the same place
    assert data.load(str(folder), tmp_path / "root").train.labels.tolist() == [0] * 7 + [1] * 5


@pytest.mark.parametrize("how", ["cut", "header", "empty", "other", "older"])
def test_a_damaged_or_older_cache_is_reported_and_decoded_again(
    how, image_folder, tmp_path, monkeypatch, capsys
):
    folder = image_folder()
    dataset = data.load(folder, tmp_path / "root")
    images, path = dataset.train.images.clone(), dataset.cache
    content = path.read_bytes()
    path.unlink()  # `dataset` maps it
    path.write_bytes({"cut": content[: len(content) // 2], "header": b"?" + content[1:]}.get(how, content))
    if how == "empty":
        path.write_bytes(b"")
    if how == "other":
        torch.save([1, 2], path)
    if how == "older":
        monkeypatch.setattr(data, "CACHE_VERSION", data.CACHE_VERSION + 1)
    again = data.load(folder, tmp_path / "root")
    assert f"{path} is damaged or out of date: decoding the images" in capsys.readouterr().out
    assert torch.equal(again.train.images, images)
    data.load(folder, tmp_path / "root")
    assert capsys.readouterr().out == ""


def test_a_finished_cache_is_read_from_a_read_only_folder(image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    first = data.load(folder, tmp_path / "root")
    monkeypatch.setattr(runs, "exclusive", lambda path: pytest.fail("a lock is a file"))
    assert torch.equal(data.load(folder, tmp_path / "root").test.images, first.test.images)


@pytest.mark.parametrize("name", ["val", "validation", "Valid", "VAL"])
def test_valid_may_be_spelled_otherwise(name, image_folder, tmp_path):
    folder = image_folder()
    valid = data.load(folder, tmp_path / "root").valid.images.clone()
    os.rename(folder / "valid", folder / name)
    assert torch.equal(data.load(folder, tmp_path / "root").valid.images, valid)


def test_images_in_subfolders_are_found_in_the_order_of_image_folder(image_folder, tmp_path):
    folder = image_folder(splits=(("train", 12), ("valid", 1), ("test", 1)))
    cat = folder / "train" / "cat"
    for number, below in enumerate(("b", "a", "a/deeper", "C")):
        (cat / below).mkdir(parents=True)
        for file in (2 * number, 2 * number + 1):
            os.rename(cat / f"{file}.png", cat / below / f"{9 - file}.PNG")
    train = data.load(folder, tmp_path / "root").train
    reference = datasets.ImageFolder(folder / "train", transforms.PILToTensor())
    assert torch.equal(train.images, torch.stack([image for image, _ in reference]))
    assert train.labels.tolist() == reference.targets


def test_what_is_ignored_is_named_or_counted_in_one_line(image_folder, tmp_path, capsys):
    folder = image_folder()
    data.load(folder, tmp_path / "root")
    assert capsys.readouterr().out == ""
    for number in range(28):
        (folder / "train" / "cat" / f"{number}.heic").write_text("")
    (folder / "test" / "notes.TXT").write_text("")
    (folder / "labels.csv").write_text("")
    for name in ("dev", "validate"):
        shutil.copytree(folder / "valid", folder / name)
    (folder / "test" / "dog" / "below").mkdir()
    (folder / "test" / "dog" / "below" / "notes.txt").write_text("")
    (folder / "test" / "dog" / ".hidden.txt").write_text("")
    (folder / "test" / "dog" / "link.png").symlink_to("nowhere")
    os.mkfifo(folder / "test" / "dog" / "pipe.png")
    data.load(folder, tmp_path / "root")
    kinds = "28 .heic, 2 broken link or special file, 1 dev/, 1 labels.csv, 1 validate/, 1 .txt, 1 notes.TXT"
    assert sorted(kinds.split(", ")) == sorted(capsys.readouterr().out.partition(": ")[2].strip().split(", "))


@pytest.mark.parametrize("count", [3, 300])
def test_all_unreadable_images_are_counted_and_ten_are_named(count, image_folder, tmp_path):
    folder = image_folder(splits=(("train", 6), ("valid", 2), ("test", 3)))
    for number in range(count):
        (folder / "train" / "cat" / f"bad{number:04}.png").write_bytes(b"no image")
    (folder / "valid" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match="cannot be read, fix or remove them") as caught:
        data.load(folder, tmp_path / "root")
    assert not list((tmp_path / "root" / "cache").glob("*.pt"))
    text = str(caught.value)
    assert text.startswith(f"{count + 1:,} of {count + 22:,} images")
    names = text.split("remove them: ")[1].split(" (the first")[0].split(", ")
    bad = folder.resolve() / "train" / "cat"
    assert names[:3] == [str(bad / f"bad{number:04}.png") for number in range(3)]
    if count == 3:
        assert len(names) == 4 and names[3].endswith("valid/dog/1.png")
    else:
        assert len(names) == 11 and names[10] == "..."


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
def test_formats_and_modes_become_rgb(mode, suffix, tmp_path):
    pixels = np.full((32, 32, 3), (204, 204, 204), np.uint8)
    image = Image.fromarray(pixels).convert(mode) if mode != "I;16" else Image.fromarray(
        np.full((32, 32), 204 * 256 + 17, np.uint16))  # fmt: skip
    if mode == "I;16" and suffix not in ("png", "tif"):
        pytest.skip(f"{suffix} has no 16-bit grey")
    try:
        image.save(tmp_path / f"x.{suffix}")
    except (OSError, ValueError):
        pytest.skip(f"{suffix} has no {mode}")
    read = data.read_image(tmp_path / f"x.{suffix}").astype(int)
    assert read.shape == (3, 32, 32)
    wanted = {"1": (0, 255)}.get(mode, (200, 208))  # one bit is dithered
    assert read.min() >= wanted[0] and read.max() <= wanted[1]


@pytest.mark.parametrize("how", ["RGBA", "LA", "P", "L with a colour", "RGB with a colour", "GIF"])
def test_transparent_pixels_are_white_and_opaque_ones_unchanged(how, tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(1, 255, (32, 32, 4), np.uint8)
    pixels[..., 3] = generator.choice([0, 255], (32, 32))
    image, options = Image.fromarray(pixels), {}
    if "colour" in how:
        image = image.convert(how.split()[0])
        options["transparency"] = image.getpixel((3, 4))
    elif how in ("P", "GIF"):
        image, options = image.convert("RGB").quantize(64), {"transparency": 5}
    else:
        image = image.convert(how)
    suffix = "gif" if how == "GIF" else "png"
    image.save(tmp_path / f"x.{suffix}", **options)
    with Image.open(tmp_path / f"x.{suffix}") as saved:
        colour, alpha = np.split(np.asarray(saved.convert("RGBA")), [3], 2)
    assert set(np.unique(alpha)) == {0, 255}
    wanted = np.where(alpha, colour, 255).transpose(2, 0, 1)
    assert np.array_equal(data.read_image(tmp_path / f"x.{suffix}"), wanted)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8])
def test_images_are_turned_upright(orientation, suffix, tmp_path):
    """An image of four colours, saved as a camera that is held otherwise does."""
    corners = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]]], np.uint8)
    upright = Image.fromarray(corners.repeat(16, 0).repeat(16, 1))
    turn = {2: 0, 3: 3, 5: 5, 6: 2, 8: 4}  # of Image.Transpose: what undoes the orientation's own
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(turn[orientation])
    try:
        stored.save(tmp_path / f"x.{suffix}", exif=exif)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {suffix}")
    read = data.read_image(tmp_path / f"x.{suffix}").astype(int)
    assert np.abs(read - np.asarray(upright).transpose(2, 0, 1)).mean() < 12


@pytest.mark.parametrize(
    ("pixels", "suffix", "value"),
    [
        (np.full((32, 32), 0.5, np.float32), "tif", "mode F"),
        (np.full((32, 32), 40_000, np.float32), "tif", "mode F"),
        (np.full((32, 32), 0.5, np.float32), "pfm", "mode F"),
        (np.full((32, 32), 40_000, np.int32), "tif", "mode I"),
        (np.full((32, 32), 200 * 256 + 9, np.uint16), "png", 200),
        (np.full((32, 32), 200 * 256 + 9, np.int32), "png", 200),  # which Pillow stores with 16 bits
        (np.full((32, 32), 200 * 256 + 9, np.uint16), "pgm", 200),
        (np.full((32, 32), 200 * 256 + 9, np.uint16), "jp2", 200),
    ],
)
def test_16_bits_are_read_and_pixels_without_a_range_are_unreadable(pixels, suffix, value, tmp_path):
    path = tmp_path / f"x.{suffix}"
    try:
        Image.fromarray(pixels).save(path, format="PPM" if suffix == "pfm" else None)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow does not write these pixels as {suffix}")
    if isinstance(value, int):
        assert (data.read_image(path) == value).all()
    else:
        with pytest.raises(RuntimeError, match=rf"x\.{suffix} cannot be read .*{value}.*no defined range"):
            data.read_image(path)


def test_warnings_from_pillow_are_shown_with_the_file(image_folder, tmp_path, capsys):
    folder = image_folder()
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a description that is cut"
    Image.new("RGB", (32, 32)).save(content, "JPEG", exif=exif)
    for name in ("a", "b"):
        cut = content.getvalue().replace(b"\x00\x00\x00\x1a", b"\x00\x00\x0f\xff")
        (folder / "test" / "cat" / f"{name}.jpg").write_bytes(cut)
    data.load(folder, tmp_path / "root")
    (line,) = capsys.readouterr().out.splitlines()
    assert "2 warnings from Pillow" in line and "test/cat/a.jpg: " in line


def test_other_sizes_are_resized_as_pil_does(tmp_path):
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (70, 41, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    wanted = transforms.PILToTensor()(transforms.Resize((32, 32))(image))
    assert np.array_equal(data.read_image(tmp_path / "x.png"), wanted.numpy())


@pytest.mark.parametrize("content", [b"", b"text", "cut", "bomb"])
def test_unreadable_images_are_reported(content, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(buffer, "PNG")
    if content == "cut":
        content = buffer.getvalue()[:-60]
    if content == "bomb":  # a header that promises 60,000 x 60,000 pixels
        content = buffer.getvalue()[:16] + (60_000).to_bytes(4, "big") * 2 + buffer.getvalue()[24:]
    (tmp_path / "bad one.png").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"bad one\.png cannot be read as an image"):
        data.read_image(tmp_path / "bad one.png")


@pytest.mark.parametrize(
    ("splits", "counts"),
    [
        ("train test", (18, 2, 3)),
        ("train valid", (18, 3, 2)),
        ("train", (16, 2, 2)),
        ("", (16, 2, 2)),  # class folders alone
    ],
)
def test_splits_that_are_missing_are_a_tenth_of_train_each(splits, counts, image_folder, tmp_path, capsys):
    folder = image_folder(("a", "b"), [(split, 20 if split == "train" else 3) for split in splits.split()])
    if not splits:
        folder = image_folder(("a", "b"), [("train", 20)]) / "train"
    dataset = data.load(folder, tmp_path / "root")
    for split, count in zip(data.SPLITS, counts, strict=True):
        assert torch.bincount(getattr(dataset, split).labels).tolist() == [count] * 2
    missing = [split for split in data.SPLITS if split not in splits.split() and split != "train"]
    assert f"{' and '.join(missing)} split off {folder}" in capsys.readouterr().out
    together = torch.cat([getattr(dataset, split).images for split in data.SPLITS]).flatten(1)
    assert len(together.unique(dim=0)) == 2 * sum(counts)
    again = data.load(folder, tmp_path / "other")
    assert all(torch.equal(*images) for images in zip(dataset.test, again.test, strict=True))


@pytest.mark.parametrize(
    ("data_set", "words"),
    [
        ("images/train", ["images/train is one split", "its parent, ", "images\n"]),
        ("images/test/", ["images/test is one split"]),
        (".", ["no folder train/", "did you mean", "images?"]),
        ("images/test/cat", ["no class folders", "<class>/*"]),
    ],
)
def test_a_part_of_a_data_set_or_what_is_around_it_is_one_line(data_set, words, image_folder, run, one_line):
    image_folder()
    one_line(run("data.py", "--data", data_set), 1, *words)


@pytest.mark.parametrize(
    ("link", "target", "counts"),
    [
        ("a/up", "..", [8, 8]),
        ("a/up", "../..", [8, 8]),
        ("a/up", "../b", [8, 8]),
        ("b/up", "../a", [8, 8]),
        ("a/self", ".", [8, 8]),
        ("a/0again.png", "1.png", [8, 8]),
        ("a/0again.png", "../b/1.png", [8, 8]),
        ("a/loop", "loop", [8, 8]),
        ("a/more", "../../pool", [10, 8]),
        ("a/more.png", "../../pool/0.png", [9, 8]),
        ("a/more.png", "../.hidden/0.png", [9, 8]),
    ],
)
def test_links_are_followed_but_nothing_is_reached_twice(
    link, target, counts, image_folder, tmp_path, capsys
):
    folder = image_folder(("a", "b"), (("train", 8), ("valid", 1), ("test", 1)))
    for pool in (folder / "pool", folder / "train" / ".hidden"):
        pool.mkdir()
        for number in range(2):
            Image.new("RGB", (32, 32), (number, 1, 2)).save(pool / f"{number}.png")
    (folder / "train" / link).symlink_to(target)
    (folder / "train" / "b" / "pool").symlink_to("../../pool") if target == "../../pool" else None
    dataset = data.load(folder, tmp_path / "root")
    assert torch.bincount(dataset.train.labels).tolist() == counts
    assert dataset.train.images.flatten(1).unique(dim=0).shape[0] == sum(counts)
    said = "1 reached again through a link" in capsys.readouterr().out
    assert said == (counts == [8, 8] and "loop" not in link or target == "../../pool")


def test_a_data_set_is_its_content_however_it_is_spelled(image_folder, run, tmp_path):
    folder = image_folder(name="im")
    (tmp_path / "link").symlink_to("im")
    (tmp_path / "home").mkdir()
    shutil.copytree(folder, tmp_path / "home" / "im")
    shutil.copytree(folder, tmp_path / "changed" / "im", copy_function=shutil.copy)
    os.rename(tmp_path / "changed" / "im" / "test" / "dog", tmp_path / "changed" / "im" / "test" / "cow")
    for split in ("train", "valid"):
        os.rename(tmp_path / "changed" / "im" / split / "dog", tmp_path / "changed" / "im" / split / "cow")
    root = ("--root", tmp_path / "root")

    def shown(name, **options):
        process = run("data.py", "--data", name, *root, **options)
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()

    first = shown("im")
    assert re.fullmatch("im-[0-9a-f]{8}: 2 classes: cat, dog", first[0])
    for spelled in ("im/", folder, f"{folder}/", "link", "./im", "changed/../im"):
        assert shown(spelled) == first
    assert (
        shown("im", cwd=tmp_path) == shown(".", cwd=folder) == shown("../im", cwd=tmp_path / "home") == first
    )
    copy = shown("~/im", HOME=str(tmp_path / "home"))
    assert copy[:-1] == first[:-1] and copy[-1] != first[-1]  # its cache is another
    other = shown("changed/im")
    assert other[0].split(":")[0] != first[0].split(":")[0] and "cow" in other[0]
    assert len(list((tmp_path / "root" / "cache").glob("*.pt"))) == 3
    assert run("data.py", "--data", "im", "--root", "~/r", HOME=str(tmp_path / "home")).returncode == 0
    assert (tmp_path / "home" / "r" / "cache").is_dir()


def test_no_folder_passes_for_cinic10(image_folder, run, one_line):
    image_folder(name="sets/cinic10-mini")
    image_folder(name="cinic10")
    assert "cinic10-mini-" in run("data.py", "--data", "sets/cinic10-mini").stdout
    assert run("data.py", "--data", "./cinic10").stdout.startswith("cinic10-")
    nowhere = "import data; data.CINIC10_URLS = ['http://127.0.0.1:9/x']"
    one_line(run("data.py", "--data", "cinic10", code=nowhere), 1, "CINIC-10.tar.gz cannot be downloaded")
    one_line(run("data.py", "--data", "cinic10", "--root", "."), 1, "is not CINIC-10", "cat, dog")


@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.1, 0.5])
def test_fraction_keeps_the_same_number_of_every_class(fraction):
    whole, part = data.load("synthetic"), data.load("synthetic", fraction=fraction)
    assert torch.bincount(part.train.labels).tolist() == [max(1, round(200 * fraction))] * 10
    assert len(part.valid.labels) == 500 and len(part.test.labels) == 1000
    smaller = data.load("synthetic", fraction=fraction / 2).train.images.flatten(1).tolist()
    assert set(map(tuple, smaller)) <= set(map(tuple, part.train.images.flatten(1).tolist()))
    assert part.mean != whole.mean
    assert part.mean[0] == pytest.approx((part.train.images[:, 0].double() / 255).mean().item(), abs=1e-9)


def test_fraction_of_unbalanced_classes_is_balanced_and_says_so(capsys):
    labels = torch.tensor([0] * 100 + [1] * 4)
    images = torch.arange(104, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    part = data._subset(data.Split(images, labels), 0.5)
    assert torch.bincount(part.labels).tolist() == [4, 4]
    assert "4 images a class, not 26: one has 4" in capsys.readouterr().out
    assert len(data._subset(data.Split(images, labels), 0.05).labels) == 6 and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [({"classes": "cat"}, "one class"), ({"fraction": 0.001}, "one training image a class"), ({}, "")],
)
def test_what_cannot_be_learned_is_said(options, words, capsys):
    data.load("synthetic-small", **options)
    assert (f"warning: synthetic-small has {words}" in capsys.readouterr().out) == bool(words)


def test_classes_of_any_name_can_be_selected():
    names = ("a, b", " cat", "cat ", "animals", 'the "x"', "bird", "l\nm")
    dataset = SimpleNamespace(name="zoo", classes=names)
    for name in names:
        assert data.pick(dataset, "--classes", data.spec([name])) == (name,)
    assert data.spec(names[::-1]) == data.spec(names)
    assert set(data.pick(dataset, "--classes", data.spec(names))) == set(names)
    assert data.pick(dataset, "--classes", "bird, animals ,bird") == ("bird", "animals")
    with pytest.raises(ValueError, match="--classes vehicles: zoo has no class 'airplane'; it has a, b,"):
        data.pick(dataset, "--classes", "vehicles")
    for text in ("", "bird,", "a\nb", "cat"):
        with pytest.raises(ValueError, match="--experts"):
            data.pick(dataset, "--experts", text)


def test_only_is_the_selection_in_one_spelling():
    loaded = [data.load("synthetic-small", classes=text) for text in ("dog, cat", "cat,dog,cat", "cat,dog")]
    assert [dataset.only for dataset in loaded] == ["cat,dog"] * 3
    every = data.load("synthetic-small", classes="animals,vehicles")
    assert every.only is None and every.mean == data.load("synthetic-small").mean


def test_classes_are_renumbered_and_keep_their_names():
    whole = data.load("synthetic")
    vehicles = data.load("synthetic", classes="vehicles")
    assert vehicles.classes == ("airplane", "automobile", "ship", "truck")
    assert torch.bincount(vehicles.train.labels).tolist() == [200] * 4
    assert vehicles.mean == data._mean_and_std(vehicles.train.images)[0] != whole.mean
    assert torch.equal(
        vehicles.test.images[vehicles.test.labels == 3], whole.test.images[whole.test.labels == 9]
    )
    assert data.load("synthetic", classes="dog, cat").classes == ("cat", "dog")
    with pytest.raises(ValueError, match="no class 'cow'; it has airplane"):
        data.load("synthetic", classes="cat,cow")


def test_the_bits_of_synthetic_do_not_change_nor_depend_on_the_processor(run):
    code = "import data; print(data.load('synthetic').fingerprint); raise SystemExit"
    for instructions in ("default", "avx2"):  # of x86: SSE only, and AVX2
        process = run("data.py", code=code, ATEN_CPU_CAPABILITY=instructions)
        assert process.stdout == "70ccbe6be2f87822\n"
    assert data.load("synthetic").fingerprint == "70ccbe6be2f87822"


def test_a_fingerprint_counts_every_image_and_label_of_every_split_in_order(image_folder, tmp_path):
    dataset = data.load(str(image_folder()), tmp_path / "root")
    splits = [getattr(dataset, name) for name in data.SPLITS]
    content = b"".join(tensor.numpy().tobytes() for split in splits for tensor in split)
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()[:16] == data._fingerprint(splits)
    seen = {dataset.fingerprint}
    for number, part in itertools.product(range(3), range(2)):
        changed = [data.Split(*(tensor.clone() for tensor in split)) for split in splits]
        changed[number][part].view(-1)[-1] ^= 1
        seen.add(data._fingerprint(changed))
    seen.add(data._fingerprint([data.Split(split.images.flip(0), split.labels) for split in splits]))
    assert len(seen) == 8


def test_batches_hold_every_image_once_in_an_order_of_seed_and_epoch_only(monkeypatch):
    split = data.Split(
        torch.arange(210, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), torch.arange(210)
    )

    def labels(**options):
        return [labels.tolist() for _, labels in batches(split, 16, **options)]

    order = labels(seed=1, epoch=1)
    assert [len(batch) for batch in order] == [16] * 13 + [2]
    assert sorted(itertools.chain(*order)) == list(range(210))
    assert order == labels(seed=1, epoch=1)
    assert order != labels(seed=1, epoch=2) != labels(seed=2, epoch=1) != order
    assert list(itertools.chain(*labels())) == list(range(210))
    monkeypatch.setattr(data, "CHUNK", 40)
    assert order == labels(seed=1, epoch=1)


def test_steps_are_full_batches_from_as_many_passes_as_needed():
    """And a shuffled last batch of one, on which batch norm cannot train, joins the previous one."""
    order, sizes = data.make_plan(50, 16, seed=1, epoch=1, steps=7)
    assert sizes == [16] * 7 and len(order) == 112
    assert torch.bincount(order, minlength=50).tolist().count(2) == 38  # the others occur three times
    first, second, _ = order.split(50)
    assert torch.equal(first.sort().values, torch.arange(50)) and not torch.equal(first, second)
    assert data.make_plan(33, 16, seed=1)[1] == [16, 17] and data.make_plan(33, 16)[1] == [16, 16, 1]


@pytest.mark.parametrize("name", ["hybrid", "flip+rotation+crop+jitter+autoaugment+cutout"])
def test_augmentation_depends_only_on_seed_and_epoch(name, monkeypatch, tmp_path):
    """Not on the batch size, or where the images are stored."""
    dataset = data.load("synthetic", fraction=0.25)
    torch.save(dataset.train.images, tmp_path / "images.pt")
    in_file = data.Split(torch.load(tmp_path / "images.pt", mmap=True), dataset.train.labels)
    streams = augment.parse(name, dataset.mean)
    monkeypatch.setattr(data, "CHUNK", 100)

    def epoch(split=dataset.train, size=64, seed=1, epoch=1):
        return torch.cat([images for images, _ in batches(split, size, seed, epoch, dataset, streams)])

    whole = epoch()
    for other in ({"size": 7}, {"size": 450}, {"split": in_file}):
        assert torch.equal(whole, epoch(**other)), other
    for other in ({"seed": 2}, {"epoch": 2}):
        assert not torch.equal(whole, epoch(**other)), other


def test_images_are_channels_last_but_not_on_mps(monkeypatch):
    cpu, mps = (data.memory_format(torch.device(kind)) for kind in ("cpu", "mps"))
    assert cpu == torch.channels_last and mps == torch.contiguous_format
    dataset = data.synthetic((20, 10, 10))
    wanted = data.normalise(dataset.test.images, dataset)
    monkeypatch.setattr(data, "memory_format", lambda device: mps)
    images = data.normalise(dataset.test.images, dataset)
    assert images.is_contiguous() and torch.equal(images, wanted)


def test_batches_are_normalised_channels_last_and_match_their_labels():
    dataset = data.load("synthetic", fraction=0.1)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (dataset.mean, dataset.std))
    for images, labels in batches(dataset.train, 64, seed=1, dataset=dataset):
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
        for image, label in zip(images[:3], labels[:3], strict=True):
            pixels = ((image * std + mean) * 255).round()
            found = (dataset.train.images == pixels).all(3).all(2).all(1).nonzero()[0, 0]
            assert dataset.train.labels[found] == label
    whole = torch.cat([images for images, _ in batches(dataset.train, 64, dataset=dataset)])
    assert whole.mean((0, 2, 3)).abs().max() < 1e-4 and (whole.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_each_image_goes_once_through_every_stream():
    split = data.Split(torch.zeros(50, 3, 2, 2, dtype=torch.uint8), torch.arange(50))
    streams = [[lambda images, _: images + 1], [lambda images, _: images + 2, lambda images, _: images + 3]]
    seen = [
        (label, int(image[0, 0, 0]))
        for images, labels in batches(
            split, 7, 3, dataset=SimpleNamespace(mean=(0,) * 3, std=(1 / 255,) * 3), streams=streams
        )
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    assert sorted(seen) == sorted([(i, 1) for i in range(50)] + [(i, 5) for i in range(50)])


# Downloads from a real server on this machine


@pytest.fixture
def server(tmp_path):
    """Serves `files` (path -> bytes); /cut closes half-way, /stall stalls half-way, /garbage is not HTTP."""
    files, requested = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            content = files.get(self.path)
            if "garbage" in self.path:
                self.wfile.write(b"hello\r\n\r\n")
                return
            if content is None:
                self.send_error(500 if "broken" in self.path else 404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = "cut" in self.path or "stall" in self.path
            try:
                self.wfile.write(content[: len(content) // 2] if half else content)
                if "stall" in self.path:
                    time.sleep(3)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield files, requested, f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


@pytest.fixture
def archive(image_folder):
    folder = image_folder(data.CLASSES, (("train", 2), ("valid", 1), ("test", 1)), name="tree")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for split in data.SPLITS:
            tar.add(folder / split, split)
    return buffer.getvalue()


@pytest.fixture
def cinic10(server, archive, monkeypatch):
    files, requested, address = server
    files["/good.tar.gz"] = files["/cut.tar.gz"] = files["/stall.tar.gz"] = archive
    files["/other.tar.gz"] = b"x" * len(archive)
    monkeypatch.setattr(data, "CINIC10_MD5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(data, "TIMEOUT", 0.5)

    def links(*names):
        monkeypatch.setattr(data, "CINIC10_URLS", [f"{address}/{name}.tar.gz" for name in names])

    links("good")
    return links, requested


def test_cinic10_is_downloaded_once_whatever_the_first_links_do(cinic10, tmp_path):
    links, requested = cinic10
    names = ("missing", "broken", "garbage", "cut", "other", "stall", "good")
    links(*names)
    dataset = data.load("cinic10", tmp_path / "root")
    assert dataset.name == "cinic10" and dataset.classes == data.CLASSES
    assert [len(getattr(dataset, s).labels) for s in data.SPLITS] == [20, 10, 10]
    assert set(requested) == {f"/{name}.tar.gz" for name in names}
    count = len(requested)
    data.load("cinic10", tmp_path / "root")
    assert len(requested) == count
    assert visible(tmp_path / "root") == ["CINIC-10.tar.gz", "cache", "cinic10"]


def test_existing_cinic10_files_are_used_as_they_are(cinic10, archive, tmp_path):
    _, requested = cinic10
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "CINIC-10.tar.gz").write_bytes(archive)
    assert len(data.load("cinic10", tmp_path / "packed").train.labels) == 20
    with tarfile.open(tmp_path / "packed" / "CINIC-10.tar.gz") as tar:
        tar.extractall(tmp_path / "unpacked" / "CINIC-10", filter="data")
    assert len(data.load("cinic10", tmp_path / "unpacked").train.labels) == 20
    os.rename(tmp_path / "unpacked" / "CINIC-10", tmp_path / "elsewhere")  # the cache is enough
    assert len(data.load("cinic10", tmp_path / "unpacked").train.labels) == 20
    assert requested == []


def test_an_interrupted_download_is_never_taken_for_complete(cinic10, archive, tmp_path):
    links, _ = cinic10
    links("cut", "missing")
    with pytest.raises(
        RuntimeError, match="cannot be downloaded .*404.*CINIC-10.tar.gz from http.*--data cifar10"
    ):
        data.load("cinic10", tmp_path / "root")
    assert visible(tmp_path / "root") == []
    leftover = tmp_path / "root" / ".cinic10-unfinished"  # as a killed process leaves it
    leftover.mkdir()
    (leftover / "CINIC-10.tar.gz").write_bytes(archive[:1000])
    links("good")
    assert len(data.load("cinic10", tmp_path / "root").train.labels) == 20
    assert not leftover.exists()


def test_a_damaged_archive_is_reported_and_kept(cinic10, archive, tmp_path):
    (tmp_path / "CINIC-10.tar.gz").write_bytes(archive[:-1] + b"x")
    with pytest.raises(RuntimeError, match=r"CINIC-10\.tar\.gz is damaged"):
        data.load("cinic10", tmp_path)
    assert (tmp_path / "CINIC-10.tar.gz").exists()


@pytest.mark.parametrize("kind", ["..", "link", "device"])
def test_a_tar_member_that_would_escape_its_folder_is_rejected(kind, tmp_path, monkeypatch):
    member = tarfile.TarInfo("../escaped" if kind == ".." else "train/x")
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
    if kind == "device":
        member.type = tarfile.CHRTYPE
    hostile_archive(tmp_path / "root", [member], monkeypatch)
    with pytest.raises(RuntimeError, match="cannot be unpacked"):
        data.load("cinic10", tmp_path / "root")
    assert visible(tmp_path / "root") == ["CINIC-10.tar.gz"]
    assert os.listdir(tmp_path) == ["root"]


def test_a_tar_member_with_an_absolute_path_stays_inside(tmp_path, monkeypatch):
    members = [tarfile.TarInfo(name) for name in (*data.SPLITS, str(tmp_path / "escaped"))]
    for member in members:
        member.type = tarfile.DIRTYPE
    hostile_archive(tmp_path / "root", members, monkeypatch)
    with pytest.raises(OSError, match="no class folders"):
        data.load("cinic10", tmp_path / "root")
    assert not (tmp_path / "escaped").exists()
    assert any(path.name == "escaped" for path in (tmp_path / "root" / "cinic10").rglob("*"))


def hostile_archive(root, members, monkeypatch):
    """A malicious archive with the expected MD5."""
    root.mkdir()
    with tarfile.open(root / "CINIC-10.tar.gz", "w:gz") as tar:
        for member in members:
            tar.addfile(member)
    digest = hashlib.md5((root / "CINIC-10.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CINIC10_MD5", digest)


def test_cifar10_comes_through_torchvision_and_500_per_class_are_held_out(server, tmp_path, monkeypatch):
    """An archive laid out like cifar-10-python.tar.gz, with a hundredth of its images."""
    files, _, address = server
    generator = np.random.default_rng(0)

    def batch(number):
        labels = [i % 10 for i in range(100)]
        return pickle.dumps(
            {"data": generator.integers(0, 256, (100, 3072), dtype=np.uint8), "labels": labels}
        )

    members = {
        name: batch(i) for i, (name, _) in enumerate(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list)
    }
    members["batches.meta"] = pickle.dumps({"label_names": list(data.CLASSES)})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    files["/cifar.tar.gz"] = buffer.getvalue()

    def md5(content):
        return hashlib.md5(content).hexdigest()

    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(buffer.getvalue()))
    for attribute in ("train_list", "test_list"):
        names = [[name, md5(members[name])] for name, _ in getattr(datasets.CIFAR10, attribute)]
        monkeypatch.setattr(datasets.CIFAR10, attribute, names)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(members["batches.meta"])}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)

    dataset = data.load("cifar10", tmp_path)
    assert dataset.classes == data.CLASSES
    assert torch.bincount(dataset.train.labels).tolist() == [45] * 10
    assert torch.bincount(dataset.valid.labels).tolist() == [5] * 10
    reference = datasets.CIFAR10(tmp_path / "cifar10", train=False)
    assert np.array_equal(dataset.test.images.numpy(), reference.data.transpose(0, 3, 1, 2))
    assert dataset.test.labels.tolist() == reference.targets
    every = torch.cat([dataset.train.images, dataset.valid.images]).flatten(1)
    original = torch.from_numpy(
        datasets.CIFAR10(tmp_path / "cifar10", train=True).data.transpose(0, 3, 1, 2).reshape(500, -1)
    )
    assert torch.equal(every[:, :50].unique(dim=0), original[:, :50].unique(dim=0))


# What a user sees


def test_script_describes_a_data_set(run):
    process = run("data.py", "--data", "synthetic", "--classes", "animals")
    assert process.returncode == 0 and process.stderr == ""
    wanted = (
        "6 classes: bird, cat",
        "train 1,200, valid 300, test 600",
        "train 200 to 200",
        "mean:",
        "std:",
        "cache:",
    )
    for part in wanted:
        assert part in process.stdout


def test_no_network_is_one_line_with_remedies(run, one_line):
    nowhere = "import data; data.CINIC10_URLS = ['http://127.0.0.1:9/x']"
    remedies = ("cannot be downloaded", "http://127.0.0.1:9/x", "--data PATH", "--data synthetic")
    one_line(run("train.py", code=nowhere), 1, "put CINIC-10.tar.gz from", "--data cifar10", *remedies)
    nowhere = "from torchvision import datasets; datasets.CIFAR10.url = 'http://127.0.0.1:9/x'"
    process = run("train.py", "--data", "cifar10", code=nowhere)
    one_line(process, 1, "put cifar-10-python.tar.gz from", *remedies)


def keep_one(folder):
    shutil.rmtree(folder / "valid")
    for number in range(1, 6):
        (folder / "train" / "dog" / f"{number}.png").unlink()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("no train", ["no folder train/", "did you mean training/?"]),
        ("no test", ["no folder test/", "did you mean Test/?"]),
        ("only valid", ["no folder train/", "train/<class>/*"]),
        ("empty class", ["valid/dog is missing or has no images", ".png"]),
        ("missing class", ["valid/dog is missing or has no images"]),
        ("bad image", ["1 of 22 images cannot be read", "fix or remove them", "train/cat/0.png"]),
        ("two valid", ["has both VAL/ and valid/", "remove one"]),
        ("one image", ["train/dog has too few images to split off valid"]),
    ],
)
def test_an_invalid_folder_is_one_line(broken, words, image_folder, run, one_line):
    folder = image_folder()
    {
        "no train": lambda: os.rename(folder / "train", folder / "training"),
        "no test": lambda: os.rename(folder / "test", folder / "Test"),
        "only valid": lambda: [shutil.rmtree(folder / split) for split in ("train", "test")],
        "empty class": lambda: [file.unlink() for file in (folder / "valid" / "dog").iterdir()],
        "missing class": lambda: os.rename(folder / "valid" / "dog", folder / "dog"),
        "bad image": lambda: (folder / "train" / "cat" / "0.png").write_text("no image"),
        "two valid": lambda: shutil.copytree(folder / "valid", folder / "VAL"),
        "one image": lambda: keep_one(folder),
    }[broken]()
    one_line(run("data.py", "--data", folder), 1, *words)


def test_two_processes_decode_a_folder_once(image_folder, tmp_path):
    folder = image_folder(splits=(("train", 700), ("valid", 2), ("test", 3)))
    command = [sys.executable, HOUSE / "data.py", "--data", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(2)]
    shown = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    assert len(list((tmp_path / "data" / "cache").glob("*.pt"))) == 1


def test_a_signal_ends_decoding_with_one_line_and_no_cache(image_folder, tmp_path):
    folder = image_folder(splits=(("train", 2),))
    Image.new("RGB", (6000, 6000)).save(folder / "train" / "cat" / "0.png")
    for number in range(2, 100):
        os.link(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / f"{number}.png")
    for number in range(2, 4):
        shutil.copy(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / f"{number}.png")
    command = [sys.executable, "-u", HOUSE / "data.py", "--data", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    assert "split off" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.count("\n") == 1, errors
    assert not list((tmp_path / "data" / "cache").glob("*.pt"))


def test_a_bare_machine_is_enough(image_folder, tmp_path):
    """One core, no /dev/shm, a read-only home folder, an unknown language."""
    image_folder()
    bare = "mount -t tmpfs -o ro none /dev/shm && exec taskset -c 0 "
    if subprocess.run(
        ["unshare", "-m", "sh", "-c", bare + "true"], check=False, capture_output=True
    ).returncode:
        pytest.skip("no right to unmount /dev/shm here")
    command = f"{sys.executable} {HOUSE}/data.py --data images"
    environment = {**os.environ, "HOME": "/proc/nowhere", "LANG": "xx_XX", "PYTHONUTF8": "0"}
    command = ["unshare", "-m", "sh", "-c", bare + command]
    pipes = {"capture_output": True, "text": True}
    process = subprocess.run(command, cwd=tmp_path, env=environment, check=False, **pipes)
    assert process.returncode == 0 and process.stderr == "", process.stderr
