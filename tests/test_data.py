import http.server
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
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5
from pathlib import Path
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


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith(".") or "unfinished" in name)


def batches(split, size, seed, dataset, streams):
    """The first epoch, as `train.train` requests it."""
    plan = data.make_plan(len(split.labels) * len(streams), size, seed, 1)
    return data.batches(split, dataset, torch.device("cpu"), plan, streams, (seed, 1))


def test_synthetic_is_balanced_and_not_separable_by_colour():
    dataset = data.synthetic()
    for name, count in zip(data.SPLITS, (2000, 500, 1000), strict=True):
        images, labels = getattr(dataset, name)
        assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
        assert torch.bincount(labels).tolist() == [count // 10] * 10
    assert not torch.equal(dataset.train.images[:500], dataset.valid.images)
    # classifying by the nearest mean colour is hardly better than chance
    train, test = (split.images.float().mean((2, 3)) for split in (dataset.train, dataset.test))
    centres = torch.stack([train[dataset.train.labels == label].mean(0) for label in range(10)])
    assert (torch.cdist(test, centres).argmin(1) == dataset.test.labels).float().mean() < 0.25


def test_folder_equals_torchvisions_image_folder(image_folder, tmp_path):
    """Also with classes of any name, images in folders of theirs, and an image of another size."""
    folder = image_folder(("b", "a b", "ü'\"x"), (("train", 12), ("valid", 2), ("test", 3)))
    for number, below in enumerate(("0", "a", "a/deeper", "C")):
        (folder / "train" / "b" / below).mkdir(parents=True)
        for file in (2 * number, 2 * number + 1):
            os.rename(folder / f"train/b/{file}.png", folder / f"train/b/{below}/{9 - file}.PNG")
    Image.effect_noise((170, 141), 90).convert("RGB").save(folder / "train/b/large.png")
    dataset = data.load(str(folder), tmp_path / "root")
    resized = transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()])
    reference = datasets.ImageFolder(folder / "train", resized)
    assert dataset.classes == tuple(reference.classes)
    assert torch.equal(dataset.train.images, torch.stack([image for image, _ in reference]))
    assert dataset.train.labels.tolist() == reference.targets
    pixels = dataset.train.images.double() / 255
    assert torch.allclose(torch.tensor(dataset.mean), pixels.mean((0, 2, 3)).float())
    assert torch.allclose(torch.tensor(dataset.std), pixels.std((0, 2, 3), correction=0).float())


def test_a_second_start_reads_the_cache_and_a_changed_folder_is_decoded(image_folder, tmp_path, monkeypatch):
    """A second start writes nothing, not even a lock: the folder may be read-only."""
    folder, root = image_folder(), tmp_path / "root"
    for path in (folder / "train" / "dog").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    first = data.load(folder, root)
    monkeypatch.setattr(data, "read_image", lambda path: pytest.fail("decoded again"))
    monkeypatch.setattr(runs, "exclusive", lambda path: pytest.fail("a lock is a file"))
    second = data.load(folder, root)
    assert torch.equal(first.train.images, second.train.images) and second.mean == first.mean
    monkeypatch.undo()
    changed = folder / "train" / "cat" / "0.png"
    size = changed.stat().st_size
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    os.truncate(changed, size)  # now only its content and modification time differ
    third = data.load(folder, root)
    assert third.train.images[0, :, 4, 4].tolist() == [1, 2, 3]
    assert third.cache == first.cache and third.name != first.name
    os.rename(folder / "train" / "dog" / "x0.png", folder / "train" / "cat" / "x0.png")  # in the same place
    assert data.load(folder, root).train.labels.tolist() == [0] * 7 + [1] * 5


@pytest.mark.parametrize("how", ["cut", "other", "older"])
def test_a_damaged_or_older_cache_is_reported_and_decoded_again(how, image_folder, tmp_path, capsys):
    folder = image_folder()
    dataset = data.load(folder, tmp_path / "root")
    images, path = dataset.train.images.clone(), dataset.cache
    saved = torch.load(path, weights_only=True)
    path.unlink()  # `dataset` maps it
    torch.save([1, 2] if how == "other" else {**saved, "version": saved["version"] - (how == "older")}, path)
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    again = data.load(folder, tmp_path / "root")
    assert f"{path} is damaged or out of date: decoding the images" in capsys.readouterr().out
    assert torch.equal(again.train.images, images)
    data.load(folder, tmp_path / "root")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("valid", ["Val", "validation"])
def test_valid_may_be_spelled_otherwise_and_what_is_ignored_is_said(valid, image_folder, tmp_path, capsys):
    folder = image_folder()
    os.rename(folder / "valid", folder / valid)
    data.load(folder, tmp_path / "root")
    assert capsys.readouterr().out == ""
    shutil.copytree(folder / valid, folder / "dev")
    (folder / "test" / "dog" / "below").mkdir()
    for name in ["cat/a.heic", "notes.TXT", "dog/below/notes.txt", "dog/.hidden.txt", "../labels.csv"]:
        (folder / "test" / name).write_text("")
    (folder / "test" / "dog" / "link.png").symlink_to("nowhere")
    os.mkfifo(folder / "test" / "dog" / "pipe.png")
    data.load(folder, tmp_path / "root")
    (line,) = capsys.readouterr().out.splitlines()
    kinds = "1 .heic, 1 .png, 1 broken link, 1 dev/, 1 labels.csv, 2 .txt"
    assert ", ".join(sorted(line.partition(": ")[2].split(", "))) == kinds


def test_unreadable_images_are_counted_and_ten_are_named_in_order(image_folder, tmp_path):
    """Empty, text, cut, and one that promises 60,000 x 60,000 pixels."""
    folder = image_folder()
    content = (folder / "train" / "cat" / "0.png").read_bytes()
    bomb = content[:16] + (60_000).to_bytes(4, "big") * 2 + content[24:]
    bad = [*(folder / f"train/cat/bad {number:02}.png" for number in range(30)), folder / "valid/dog/1.png"]
    for number, path in enumerate(bad):
        path.write_bytes([b"", b"text", content[:-60], bomb][number % 4])
    names = ", ".join(map(str, bad[:10]))
    start = f"31 of 52 images cannot be read, fix or remove them: {names}, ... (the first: {bad[0]} cannot be"
    with pytest.raises(RuntimeError, match=re.escape(start)):
        data.load(folder, tmp_path / "root")
    assert not list((tmp_path / "root" / "cache").glob("*.pt"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
def test_formats_and_modes_become_rgb(mode, suffix, tmp_path):
    more = {"save_all": True, "append_images": [Image.new(mode, (32, 32))]} if suffix[1:] == "if" else {}
    try:
        Image.new("RGB", (32, 32), (204, 204, 204)).convert(mode).save(tmp_path / f"x.{suffix}", **more)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} has no {mode}")
    read = data.read_image(tmp_path / f"x.{suffix}").astype(int)
    assert read.shape == (3, 32, 32)
    low, high = (0, 255) if mode == "1" else (200, 208)  # one bit is dithered
    assert read.min() >= low and read.max() <= high


@pytest.mark.parametrize("kind", ["RGBA png", "LA png", "P png", "L png", "RGB png", "P gif"])
def test_transparent_pixels_are_white_and_opaque_ones_unchanged(kind, tmp_path):
    """By their own alpha or, in a mode without it, as the file's one transparent colour."""
    generator, (mode, suffix) = np.random.default_rng(0), kind.split()
    pixels = generator.integers(1, 255, (32, 32, 4), np.uint8)
    pixels[..., 3] = generator.choice([0, 255], (32, 32))
    image = Image.fromarray(pixels)
    image = image.convert("RGB").quantize(64) if mode == "P" else image.convert(mode)
    image.save(tmp_path / f"x.{suffix}", **({} if "A" in mode else {"transparency": image.getpixel((3, 4))}))
    with Image.open(tmp_path / f"x.{suffix}") as saved:
        colour, alpha = np.split(np.asarray(saved.convert("RGBA")), [3], 2)
    assert set(np.unique(alpha)) == {0, 255}
    wanted = np.where(alpha, colour, 255).transpose(2, 0, 1)
    assert np.array_equal(data.read_image(tmp_path / f"x.{suffix}"), wanted)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "undo"), [(2, 0), (3, 3), (5, 5), (6, 2), (8, 4)])
def test_images_are_turned_upright(orientation, undo, suffix, tmp_path):
    """An image of four colours, saved as a camera that is held otherwise does. undo: an Image.Transpose."""
    corners = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]]], np.uint8)
    upright = Image.fromarray(corners.repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(undo).save(tmp_path / f"x.{suffix}", exif=exif)
    read = data.read_image(tmp_path / f"x.{suffix}").astype(int)
    assert np.abs(read - np.asarray(upright).transpose(2, 0, 1)).mean() < 12


@pytest.mark.parametrize("name", ["float32.tif", "int32.tif", "uint16.tif", "uint16.png", "uint16.pgm"])
def test_16_bits_are_read_and_pixels_without_a_range_are_unreadable(name, tmp_path):
    Image.fromarray(np.full((32, 32), 200 * 256 + 9, name.split(".")[0])).save(tmp_path / name)
    if name.startswith("uint16"):
        assert (data.read_image(tmp_path / name) == 200).all()
    else:
        with pytest.raises(RuntimeError, match=rf"{name} cannot be read .*mode [FI].*no defined range"):
            data.read_image(tmp_path / name)


def test_warnings_from_pillow_are_counted_and_the_first_is_shown(image_folder, tmp_path, capsys):
    folder, path = image_folder(), tmp_path / "images" / "test" / "cat" / "a.jpg"
    exif = Image.Exif()
    exif[0x010E] = "a description that is cut"
    Image.new("RGB", (32, 32)).save(path, exif=exif)
    path.write_bytes(path.read_bytes().replace(b"\x00\x00\x00\x1a", b"\x00\x00\x0f\xff"))
    shutil.copy(path, path.with_name("b.jpg"))
    data.load(folder, tmp_path / "root")
    (line,) = capsys.readouterr().out.splitlines()
    assert "2 warnings from Pillow" in line and "Tag data" in line


@pytest.mark.parametrize("given", ["train test", "train valid", "train", ""])
def test_splits_that_are_missing_are_a_tenth_of_train_each(given, image_folder, tmp_path, capsys):
    sizes = {"train": 20, "valid": 3, "test": 3}
    names = ("text", "trains")  # classes, though they resemble names of splits
    folder = image_folder(names, [(split, sizes[split]) for split in given.split() or ["train"]])
    if not given:  # class folders alone
        folder /= "train"
    missing = [split for split in ("valid", "test") if split not in given]
    counts = [20 - 2 * len(missing), *(2 if split in missing else 3 for split in ("valid", "test"))]
    dataset, again = (data.load(folder, tmp_path / root) for root in ("root", "other"))
    splits = [getattr(dataset, split) for split in data.SPLITS]
    assert [torch.bincount(split.labels).tolist() for split in splits] == [[count] * 2 for count in counts]
    assert f"{' and '.join(missing)} split off {folder}" in capsys.readouterr().out
    assert len(torch.cat([split.images for split in splits]).flatten(1).unique(dim=0)) == 2 * sum(counts)
    assert all(torch.equal(*images) for images in zip(dataset.test, again.test, strict=True))


@pytest.mark.parametrize(("link", "target", "counts"), [
    ("a/up", "..", [8, 8]), ("a/up", "../..", [8, 8]), ("a/up", "../b", [8, 8]), ("b/up", "../a", [8, 8]),
    ("a/0again.png", "1.png", [8, 8]), ("a/0again.png", "../b/1.png", [8, 8]), ("a/loop", "loop", [8, 8]),
    ("a/more", "../../pool", [16, 8]), ("a/more.png", "../../pool/0.png", [9, 8]),
    ("a/more.png", "../.hidden/0.png", [9, 8]), ("a/more.png", "../stray.png", [9, 8]),
])  # fmt: skip
def test_links_are_followed_but_nothing_is_taken_twice(link, target, counts, image_folder, tmp_path, capsys):
    folder = image_folder(("a", "b", ".hidden"), (("train", 8), ("valid", 1), ("test", 1)))
    shutil.copytree(folder / "train" / ".hidden", folder / "pool")
    shutil.copy(folder / "pool" / "1.png", folder / "train" / "stray.png")  # of no class
    (folder / "train" / link).symlink_to(target)
    if link == "a/more":
        (folder / "train" / "b" / "pool").symlink_to(target)
    dataset = data.load(folder, tmp_path / "root")
    assert torch.bincount(dataset.train.labels).tolist() == counts
    assert len(dataset.train.images.flatten(1).unique(dim=0)) == sum(counts)
    said = "1 reached again through a link" in capsys.readouterr().out
    assert said == (link == "a/more" or counts == [8, 8] and link != "a/loop")


def test_two_splits_that_are_one_folder_are_said(image_folder, tmp_path, capsys):
    folder = image_folder(splits=(("train", 2), ("test", 2)))
    (folder / "valid").symlink_to("test")
    data.load(folder, tmp_path / "root")
    assert f"warning: valid and test are the same images: {folder / 'test'}" in capsys.readouterr().out


def test_a_data_set_is_described_by_its_content_however_it_is_spelled(image_folder, run, tmp_path):
    folder, home = image_folder(name="im"), tmp_path / "home"
    (tmp_path / "link").symlink_to("im")
    for place in (home, tmp_path / "changed"):
        shutil.copytree(folder, place / "im", copy_function=shutil.copy)
    for split in data.SPLITS:
        os.rename(tmp_path / f"changed/im/{split}/dog", tmp_path / f"changed/im/{split}/cow")

    def shown(name, cwd=tmp_path):
        process = run("data.py", "--data", name, "--root", "~/root", cwd=cwd, HOME=str(home))
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()

    first = shown("im")
    assert re.fullmatch("im-[0-9a-f]{8}: 2 classes: cat, dog", first[0])
    assert first[1:3] == ["images:  train 12, valid 4, test 6", "per class: 6 to 6 training images"]
    assert ": 1 classes: dog\n" in run("data.py", "--data", "im", "--classes", "dog").stdout
    for spelled in ("im/", folder, "link", "changed/../im"):
        assert shown(spelled) == first
    assert shown(".", cwd=folder) == shown("../im", cwd=home) == first
    copy, other = shown("~/im"), shown("changed/im")
    assert copy[:-1] == first[:-1] and copy[-1] != first[-1]  # its cache is another
    assert other[0].split(":")[0] != first[0].split(":")[0] and "cow" in other[0]
    assert len(list((home / "root" / "cache").glob("*.pt"))) == 3


def test_no_folder_passes_for_cinic10(image_folder, run, one_line):
    image_folder(name="sets/cinic10-mini")
    image_folder(name="cinic10")
    assert "cinic10-mini-" in run("data.py", "--data", "sets/cinic10-mini").stdout
    assert run("data.py", "--data", "./cinic10").stdout.startswith("cinic10-")
    nowhere = "import data; data.CINIC10_URLS = ['http://127.0.0.1:9/x']"
    one_line(run("data.py", "--data", "cinic10", code=nowhere), 1, "CINIC-10.tar.gz cannot be downloaded")
    one_line(run("data.py", "--data", "cinic10", "--root", "."), 1, "is not CINIC-10", "cat, dog")


@pytest.mark.parametrize("fraction", [0.0001, 0.1, 0.5])
def test_fraction_keeps_the_same_number_of_every_class(fraction):
    part, half = (data.load("synthetic-small", fraction=f) for f in (fraction, fraction / 2))
    assert torch.bincount(part.train.labels).tolist() == [max(1, round(40 * fraction))] * 10
    assert len(part.valid.labels) == 100 and len(part.test.labels) == 200
    larger, smaller = (set(map(tuple, subset.train.images.flatten(1).tolist())) for subset in (part, half))
    assert smaller <= larger
    assert data._tenths(torch.zeros(16).long()).tolist() == [5, 7, 4, 6, 6, 3, 1, 7, 2, 1, 0, 2, 0, 3, 4, 5]
    assert part.mean[0] == pytest.approx((part.train.images[:, 0].double() / 255).mean().item(), abs=1e-9)


def test_fraction_of_unbalanced_classes_is_balanced_and_says_so(capsys):
    split = data.Split(torch.arange(104), torch.tensor([0] * 100 + [1] * 4))
    assert torch.bincount(data._subset(split, 0.5).labels).tolist() == [4, 4]
    assert "4 images a class, not 26: one has 4" in capsys.readouterr().out
    assert len(data._subset(split, 0.05).labels) == 6 and not capsys.readouterr().out


@pytest.mark.parametrize(("options", "words"), [
    ({"classes": "cat"}, "one class"), ({"fraction": 0.001}, "one training image a class"), ({}, ""),
])  # fmt: skip
def test_what_cannot_be_learned_is_said(options, words, capsys):
    data.load("synthetic-small", **options)
    assert (f"warning: synthetic-small has {words}" in capsys.readouterr().out) == bool(words)


def test_classes_of_any_name_can_be_selected():
    names = ("a b", " cat", "cat ", "animals", 'the "x"', "bird", "l\nm")
    dataset = SimpleNamespace(name="zoo", classes=names)
    for name in names:
        assert data.pick(dataset, "--classes", data.spec([name])) == (name,)
    assert data.spec(names[::-1]) == data.spec(names)
    assert set(data.pick(dataset, "--classes", data.spec(names))) == set(names)
    assert data.pick(dataset, "--classes", "bird, animals ,bird") == ("bird", "animals")
    with pytest.raises(ValueError, match="--classes vehicles: zoo has no class 'airplane'; it has a b,"):
        data.pick(dataset, "--classes", "vehicles")
    for text in ("", "bird,", "a\nb", "cat"):
        with pytest.raises(ValueError, match="--experts"):
            data.pick(dataset, "--experts", text)


def test_a_selection_has_one_spelling_renumbered_labels_and_a_mean_of_its_own():
    whole = data.load("synthetic-small")
    for text in ("truck, cat", "cat,truck,cat", "cat,truck"):
        part = data.load("synthetic-small", classes=text)
        assert part.only == "cat,truck" and part.classes == ("cat", "truck")
        assert part.mean == data._mean_and_std(part.train.images)[0] != whole.mean
        for name in data.SPLITS:
            (images, labels), (found, numbers) = getattr(whole, name), getattr(part, name)
            chosen = (labels == 3) | (labels == 9)
            assert torch.equal(found, images[chosen]) and torch.equal(numbers, labels[chosen] // 9)
    few = data.load("synthetic-small", fraction=0.1, classes="cat,truck").train  # a tenth of theirs
    assert torch.equal(few.images, data._subset(part.train, 0.1).images)
    every = data.load("synthetic-small", classes="animals,vehicles")
    assert every.only is None and every.mean == whole.mean


def test_the_bits_of_synthetic_do_not_change_nor_depend_on_the_processor(run):
    code = "import data; print(data.load('synthetic').fingerprint); raise SystemExit"
    for instructions in ("default", "avx2"):  # of x86: SSE only, and AVX2
        process = run("data.py", code=code, ATEN_CPU_CAPABILITY=instructions)
        assert process.stdout == "70ccbe6be2f87822\n"
    assert data.load("synthetic").fingerprint == "70ccbe6be2f87822"


def test_steps_are_full_batches_from_as_many_passes_as_needed():
    """And a shuffled last batch of one, on which batch norm cannot train, joins the previous one."""
    order, sizes = data.make_plan(50, 16, seed=1, epoch=1, steps=7)
    assert sizes == [16] * 7 and len(order) == 112
    assert torch.bincount(order, minlength=50).tolist().count(2) == 38  # the others occur three times
    first, second, _ = order.split(50)
    assert torch.equal(first.sort().values, torch.arange(50)) and not torch.equal(first, second)
    order, sizes = data.make_plan(33, 16)
    assert order.tolist() == list(range(33)) and sizes == [16, 16, 1]
    assert data.make_plan(33, 16, seed=1)[1] == [16, 17]


@pytest.mark.parametrize("name", ["hybrid", "flip+rotation+crop+jitter+autoaugment+cutout"])
def test_augmentation_depends_only_on_seed_and_epoch(name, monkeypatch, tmp_path):
    """Not on the batch size, or where the images are stored."""
    dataset = data.synthetic((500, 10, 10))
    torch.save(dataset.train.images, tmp_path / "images.pt")
    in_file = data.Split(torch.load(tmp_path / "images.pt", mmap=True), dataset.train.labels)
    streams = augment.parse(name, dataset.mean)
    monkeypatch.setattr(data, "CHUNK", 100)

    def epoch(split, size):
        return torch.cat([images for images, _ in batches(split, size, 1, dataset, streams)])

    whole = epoch(dataset.train, 64)
    for split, size in ((dataset.train, 7), (dataset.train, 450), (in_file, 64)):
        assert torch.equal(whole, epoch(split, size)), size


def test_images_are_channels_last_but_not_on_mps(monkeypatch):
    cpu, mps = (data.memory_format(torch.device(kind)) for kind in ("cpu", "mps"))
    assert cpu == torch.channels_last and mps == torch.contiguous_format
    dataset = data.synthetic((20, 10, 10))
    wanted = data.normalise(dataset.test.images, dataset)
    assert wanted.is_contiguous(memory_format=torch.channels_last) and wanted.dtype == torch.float32
    monkeypatch.setattr(data, "memory_format", lambda device: mps)
    images = data.normalise(dataset.test.images, dataset)
    assert images.is_contiguous() and torch.equal(images, wanted)


def test_each_image_goes_once_through_every_stream():
    pixels = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1)
    split = data.Split(pixels.expand(-1, 3, 2, 2), torch.arange(50))
    streams = [[lambda images, _: images + 1], [lambda images, _: images + 2, lambda images, _: images + 3]]
    unscaled = SimpleNamespace(mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    seen = []
    for images, labels in batches(split, 7, 3, unscaled, streams):
        seen += zip(labels.tolist(), images[:, 0, 0, 0].round().int().tolist(), strict=True)
    assert sorted(seen) == sorted([(i, i + 1) for i in range(50)] + [(i, i + 5) for i in range(50)])


# Downloads from a real server on this machine


@pytest.fixture
def server(tmp_path):
    """Serves `files` (name -> bytes); cut closes half-way, stall stalls half-way, garbage is not HTTP."""
    files, requested = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/")
            requested.append(name)
            if name == "garbage":
                self.wfile.write(b"hello\r\n\r\n")
            elif name not in files:
                self.send_error(500 if name == "broken" else 404)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(files[name])))
                self.end_headers()
                self.wfile.write(files[name][: len(files[name]) // (2 if name in ("cut", "stall") else 1)])
                time.sleep(2 if name == "stall" else 0)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield files, requested, f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


@pytest.fixture
def cinic10(server, image_folder, tmp_path, monkeypatch):
    """links("good", ...) sets the URLs; what the server was asked for; the archive, bytes."""
    files, requested, address = server
    folder = image_folder(data.CLASSES, (("train", 2), ("valid", 1), ("test", 1)), name="tree")
    archive = Path(shutil.make_archive(tmp_path / "tree", "gztar", folder)).read_bytes()
    files.update(dict.fromkeys(("good", "cut", "stall"), archive), other=b"x" * len(archive))
    monkeypatch.setattr(data, "CINIC10_MD5", md5(archive).hexdigest())
    monkeypatch.setattr(data, "TIMEOUT", 0.5)

    def links(*names):
        monkeypatch.setattr(data, "CINIC10_URLS", [f"{address}/{name}" for name in names])

    links("good")
    return links, requested, archive


def test_cinic10_is_downloaded_once_whatever_the_first_links_do(cinic10, tmp_path, capsys):
    links, requested, _ = cinic10
    names = ["missing", "broken", "garbage", "cut", "other", "stall", "good"]
    links(*names)
    for _ in range(2):
        dataset = data.load("cinic10", tmp_path / "root")
        assert dataset.name == "cinic10" and dataset.classes == data.CLASSES
        assert [len(getattr(dataset, s).labels) for s in data.SPLITS] == [20, 10, 10]
        assert requested == names
    assert "timed out" in capsys.readouterr().out
    assert visible(tmp_path / "root") == ["CINIC-10.tar.gz", "cache", "cinic10"]


def test_existing_cinic10_files_are_used_as_they_are_unless_the_archive_is_damaged(cinic10, tmp_path):
    _, requested, archive = cinic10
    for name, content in (("packed", archive), ("damaged", archive[:-1] + b"x"), ("unpacked", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "CINIC-10.tar.gz").write_bytes(content)
    os.rename(tmp_path / "tree", tmp_path / "unpacked" / "CINIC-10")
    for name in ("packed", "unpacked"):
        assert len(data.load("cinic10", tmp_path / name).train.labels) == 20
    os.rename(tmp_path / "unpacked" / "CINIC-10", tmp_path / "elsewhere")  # the cache is enough
    assert len(data.load("cinic10", tmp_path / "unpacked").train.labels) == 20
    with pytest.raises(RuntimeError, match=r"CINIC-10\.tar\.gz is damaged"):
        data.load("cinic10", tmp_path / "damaged")
    assert visible(tmp_path / "damaged") == ["CINIC-10.tar.gz"] and requested == []


def test_an_interrupted_download_is_never_taken_for_complete(cinic10, tmp_path):
    links, _, archive = cinic10
    links("cut", "missing")
    remedies = "CINIC-10.tar.gz from http.*--data cifar10.*--data PATH.*--data synthetic"
    with pytest.raises(RuntimeError, match=f"cannot be downloaded .*404.*put {remedies}"):
        data.load("cinic10", tmp_path / "root")
    assert visible(tmp_path / "root") == []
    leftover = tmp_path / "root" / ".cinic10-unfinished"  # as a killed process leaves it
    leftover.mkdir()
    (leftover / "CINIC-10.tar.gz").write_bytes(archive[:1000])
    links("good")
    assert len(data.load("cinic10", tmp_path / "root").train.labels) == 20
    assert not leftover.exists()


@pytest.mark.parametrize(("name", "kind"), [
    ("../escaped", tarfile.REGTYPE), ("train/x", tarfile.SYMTYPE), ("train/x", tarfile.CHRTYPE),
])  # fmt: skip
def test_a_tar_member_that_would_escape_its_folder_is_rejected(name, kind, tmp_path, monkeypatch):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc"
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "CINIC-10.tar.gz", "w:gz") as tar:
        tar.addfile(member)
    monkeypatch.setattr(data, "CINIC10_MD5", md5((root / "CINIC-10.tar.gz").read_bytes()).hexdigest())
    with pytest.raises(RuntimeError, match="cannot be unpacked"):
        data.load("cinic10", root)
    assert visible(root) == ["CINIC-10.tar.gz"]
    assert os.listdir(tmp_path) == ["root"]


def test_cifar10_comes_through_torchvision_and_500_per_class_are_held_out(server, tmp_path, monkeypatch):
    """An archive laid out like cifar-10-python.tar.gz, with a hundredth of its images."""
    files, _, address = server
    CIFAR10, folder = datasets.CIFAR10, tmp_path / "packed" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(data.CLASSES)}))
    generator = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        pixels = generator.integers(0, 256, (100, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(100)]}))
    files["cifar"] = Path(shutil.make_archive(tmp_path / "packed", "gztar", folder.parent)).read_bytes()
    monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(files["cifar"]).hexdigest())
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)  # of single files
    dataset = data.load("cifar10", tmp_path)
    assert dataset.classes == data.CLASSES
    assert torch.bincount(dataset.train.labels).tolist() == [45] * 10
    assert torch.bincount(dataset.valid.labels).tolist() == [5] * 10
    train, test = (CIFAR10(tmp_path / "cifar10", train=train) for train in (True, False))
    assert np.array_equal(dataset.test.images.numpy(), test.data.transpose(0, 3, 1, 2))
    assert dataset.test.labels.tolist() == test.targets
    every = torch.cat([dataset.train.images, dataset.valid.images]).flatten(1)
    original = torch.from_numpy(train.data.transpose(0, 3, 1, 2).reshape(500, -1))
    assert torch.equal(every.unique(dim=0), original.unique(dim=0))


# What a user sees


def test_no_network_is_one_line_with_remedies(run, one_line):
    nowhere = "from torchvision import datasets; datasets.CIFAR10.url = 'http://127.0.0.1:9/x'"
    process = run("train.py", "--data", "cifar10", code=nowhere)
    remedy = "put cifar-10-python.tar.gz from http://127.0.0.1:9/x"
    one_line(process, 1, "cannot be downloaded", remedy, "--data PATH", "--data synthetic")


@pytest.mark.parametrize(("change", "data_set", "words"), [
    ("mv train training", "", ["no folder train/", "did you mean training/?"]),
    ("mv test Test", "", ["no folder test/", "did you mean Test/?"]),
    ("rm -r train test", "", ["no folder train/", "train/<class>/*"]),
    ("mv valid/dog dog", "", ["images/valid has no class folder dog/"]),
    ("rm valid/dog/*", "", ["too few images in", "valid/dog (", ".png", "0 found, 1 needed"]),
    ("rm -r valid train/dog/[1-5]*", "", ["too few images in", "train/dog (", "1 found, 2 needed"]),
    ("cp -r valid VAL", "", ["has both VAL/ and valid/", "remove one"]),
    ("true", "train", ["images/train is one split", "its parent, ", "images\n"]),
    ("true", "..", ["no folder train/", "did you mean", "images?"]),
    ("true", "test/cat", ["no class folders", "<class>/*"]),
])  # fmt: skip
def test_what_is_no_data_set_is_one_line(change, data_set, words, image_folder, run, one_line):
    folder = image_folder()
    subprocess.run(change, shell=True, cwd=folder, check=True)
    one_line(run("data.py", "--data", f"{folder}/{data_set}"), 1, *words)


def test_two_processes_decode_a_folder_once(image_folder, tmp_path, monkeypatch):
    """Threads stand for them: each has a lock of its own."""
    folder, decode, decoded = image_folder(), data._decode, []
    monkeypatch.setattr(data, "_decode", lambda paths: decoded.append(time.sleep(0.3)) or decode(paths))
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(data.load, [folder] * 2, [tmp_path / "root"] * 2)
    assert decoded == [None] and torch.equal(first.train.images, second.train.images)


def test_a_signal_ends_decoding_with_one_line_and_no_cache(image_folder, tmp_path):
    folder = image_folder(splits=(("train", 4),))
    Image.new("RGB", (3000, 3000)).save(folder / "train" / "cat" / "0.png")
    for number in range(100, 300):
        os.link(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / f"{number}.png")
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
    script = f"{sys.executable} {HOUSE}/data.py --data images"
    bare = f"mount -t tmpfs -o ro none /dev/shm && taskset -c 0 touch bare && exec taskset -c 0 {script}"
    environment = {**os.environ, "HOME": "/proc/nowhere", "LANG": "xx_XX", "PYTHONUTF8": "0"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    process = subprocess.run(["unshare", "-m", "sh", "-c", bare], check=False, **options)
    if not (tmp_path / "bare").exists():
        pytest.skip("no right to unmount /dev/shm here")
    assert process.returncode == 0 and process.stderr == "", process.stderr
