import ctypes
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HOUSE
from scipy import stats
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import functional as oracle

import augment
import data

MANY = 20_000


@pytest.fixture(params=["32x32", "20x33", "channels_last"])
def images(request):
    """Synthetic images and noise, square or not, in both layouts."""
    height, width = (20, 33) if request.param == "20x33" else (32, 32)
    drawn = data.synthetic((40, 10, 10)).train.images[:, :, :height]
    drawn = torch.nn.functional.pad(drawn, (0, width - 32))
    noise = torch.randint(0, 256, (40, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()
    both = torch.cat([drawn, noise])
    return both.contiguous(memory_format=torch.channels_last) if request.param == "channels_last" else both


def uniform(low, high, count=80):
    return torch.rand(count, generator=torch.Generator().manual_seed(1)) * (high - low) + low


def levels(values, signed, count=80):
    generator = torch.Generator().manual_seed(2)
    values = values[torch.randint(len(values), (count,), generator=generator)].float()
    return values * (torch.randint(2, (count,), generator=generator) * 2 - 1) if signed else values


def assert_equal(ours, theirs, within=0, share=0.0):
    """At most `within` of 255 apart, except for a share of the values."""
    theirs = torch.stack(theirs)
    assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
    assert ((ours.int() - theirs.int()).abs() > within).float().mean() <= share


# With given parameters: against torchvision's functional API, image by image


def test_flip_equals_torchvision(images):
    flipped = uniform(0, 1) < 0.5
    theirs = [oracle.hflip(image) if f else image for image, f in zip(images, flipped, strict=True)]
    assert_equal(augment.flip(images, flipped), theirs)


def test_rotation_equals_torchvision_image_by_image(images):
    for degrees in (uniform(-15, 15), uniform(-180, 180), levels(torch.linspace(0, 30, 10), True)):
        theirs = [oracle.rotate(image, d.item()) for image, d in zip(images, degrees, strict=True)]
        assert_equal(augment.rotate(images, degrees), theirs, share=0.001)


def test_shear_equals_torchvision_image_by_image(images):
    """Also at AutoAugment's magnitudes, where many pixels are rounding ties."""
    for level in (uniform(-0.5, 0.5), levels(torch.linspace(0, 0.3, 10), True)):
        for x, y in ((level, level * 0), (level * 0, level)):
            theirs = [
                oracle.affine(
                    image, 0.0, [0, 0], 1.0, [math.degrees(math.atan(v)) for v in pair], center=[0, 0]
                )
                for image, *pair in zip(images, x.tolist(), y.tolist(), strict=True)
            ]
            assert_equal(augment.shear(images, x, y), theirs, share=0.001)


def test_translation_equals_torchvision_image_by_image(images):
    x, y = uniform(-14, 14).round(), uniform(-14, 14).flip(0).round()
    theirs = [
        oracle.affine(image, 0.0, [int(a), int(b)], 1.0, [0.0, 0.0])
        for image, a, b in zip(images, x, y, strict=True)
    ]
    assert_equal(augment.translate(images, x, y), theirs, share=0.001)


@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.05, 0.3)])
def test_crop_is_within_1_of_torchvision(images, scale):
    boxes = augment.draw_crop(len(images), *images.shape[2:], torch.Generator().manual_seed(3), scale)
    theirs = [
        oracle.resized_crop(image, *map(int, box), list(images.shape[2:]), antialias=True)
        for image, *box in zip(images, *boxes, strict=True)
    ]
    assert_equal(augment.crop(images, *boxes), theirs, within=1)


def test_cutout_equals_torchvisions_erase_and_zero_after_normalisation(images):
    boxes = augment.draw_cutout(len(images), *images.shape[2:], torch.Generator().manual_seed(3))
    fill = torch.tensor([10, 20, 30], dtype=torch.uint8)
    theirs = [
        oracle.erase(image, *map(int, box), fill.view(3, 1, 1))
        for image, *box in zip(images, *boxes, strict=True)
    ]
    erased = augment.erase(images, *boxes, fill)
    assert_equal(erased, theirs)
    mean = [value / 255 for value in (10, 20, 30)]
    normalised = oracle.normalize(erased / 255, mean, [0.2] * 3)
    zeros = [
        oracle.erase(image, *map(int, box), torch.zeros(3, 1, 1))
        for image, *box in zip(oracle.normalize(images / 255, mean, [0.2] * 3), *boxes, strict=True)
    ]
    assert torch.allclose(normalised, torch.stack(zeros), atol=1e-5)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_colour_is_within_1_of_torchvision(images, name):
    factor = uniform(0, 2)
    theirs = [
        getattr(oracle, f"adjust_{name}")(image, f.item()) for image, f in zip(images, factor, strict=True)
    ]
    assert_equal(getattr(augment, name)(images, factor), theirs, within=1)


def test_hue_is_within_1_of_torchvision(images):
    shift = uniform(-0.5, 0.5)
    theirs = [oracle.adjust_hue(image, s.item()) for image, s in zip(images, shift, strict=True)]
    assert_equal(augment.hue(images, shift), theirs, within=1)


def test_hue_of_every_colour_is_within_1_of_torchvision():
    steps = torch.tensor([*range(0, 256, 5), 1, 2, 127, 128, 254], dtype=torch.uint8)
    colours = torch.cartesian_prod(steps, steps, steps).T.view(1, 3, -1, len(steps))
    for shift in (-0.1, -0.05, 0.0, 1 / 6, 0.1):
        theirs = oracle.adjust_hue(colours[0], shift)
        assert_equal(augment.hue(colours, torch.tensor([shift])), [theirs], within=1)


def test_jitter_in_a_given_order_is_within_2_of_torchvision(images):
    order, factors = augment.draw_jitter(len(images), torch.Generator().manual_seed(4))
    steps = (oracle.adjust_brightness, oracle.adjust_contrast, oracle.adjust_saturation, oracle.adjust_hue)
    theirs = []
    for image, turn, factor in zip(images, order, factors, strict=True):
        for step in turn:
            image = steps[step](image, factor[step].item())
        theirs.append(image)
    assert_equal(augment.jitter(images, order, factors), theirs, within=2)


def test_posterize_solarize_invert_equal_torchvision(images):
    bits = levels(torch.arange(9), False)
    theirs = [oracle.posterize(image, int(b)) for image, b in zip(images, bits, strict=True)]
    assert_equal(augment.posterize(images, bits), theirs)
    for threshold in (levels(torch.linspace(255, 0, 10), False), uniform(0, 255)):
        theirs = [oracle.solarize(image, t.item()) for image, t in zip(images, threshold, strict=True)]
        assert_equal(augment.solarize(images, threshold), theirs)
    assert_equal(augment.invert(images), [oracle.invert(image) for image in images])


@pytest.mark.parametrize("kind", ["as it is", "flat", "two values", "narrow", "dark"])
def test_equalize_and_autocontrast_equal_torchvision(images, kind):
    images = {
        "as it is": images,
        "flat": torch.full_like(images, 7),
        "two values": (images > 200).byte() * 5,
        "narrow": images // 9 + 50,
        "dark": images // 80,
    }[kind]
    assert_equal(augment.equalize(images), [oracle.equalize(image) for image in images])
    assert_equal(augment.autocontrast(images), [oracle.autocontrast(image) for image in images])


def test_autoaugment_equals_torchvisions_own_steps(images):
    """Two drawn operations on each image, against the function that torchvision's AutoAugment calls."""
    from torchvision.transforms.autoaugment import _apply_op

    height, width = images.shape[2:]
    operations, magnitudes = augment.draw_autoaugment(
        len(images), height, width, torch.Generator().manual_seed(5)
    )
    names, theirs = list(augment.OPERATIONS), []
    for image, pair, levels in zip(images, operations.tolist(), magnitudes.tolist(), strict=True):
        for operation, magnitude in zip(pair, levels, strict=True):
            if operation >= 0:
                nearest = transforms.InterpolationMode.NEAREST
                image = _apply_op(image, names[operation], magnitude, interpolation=nearest, fill=None)
        theirs.append(image)
    assert_equal(augment.autoaugment(images, operations, magnitudes), theirs, within=1, share=0.001)


def test_the_operations_and_magnitudes_are_torchvisions():
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    for height, width in ((32, 32), (20, 33)):
        space = policy._augmentation_space(10, (height, width))
        for name, (_, magnitudes, signed) in augment.OPERATIONS.items():
            theirs, their_sign = space[name]
            assert signed == their_sign
            assert torch.allclose(magnitudes(height, width).float(), theirs.float().expand(10))
    assert {name for sub_policy in policy.policies for name, *_ in sub_policy} == {*augment.OPERATIONS} - {
        "ShearX"
    }


# In distribution: 20,000 images against 20,000 of torchvision's draws


def same_continuous(ours, theirs):
    return stats.ks_2samp(ours.numpy(), torch.as_tensor(theirs).numpy()).pvalue > 1e-3


def same_discrete(ours, theirs):
    """Chi-squared test on two lists of tuples; values seen fewer than ten times are pooled."""
    ours, theirs = (list(map(tuple, part)) for part in (ours, theirs))
    kinds = {kind: number for number, kind in enumerate(sorted(set(ours) | set(theirs)))}
    table = torch.stack([torch.bincount(torch.tensor([kinds[k] for k in part]), minlength=len(kinds)).double()
                         for part in (ours, theirs)])  # fmt: skip
    rare = table.sum(0) < 10
    table = torch.cat([table[:, ~rare], table[:, rare].sum(1, keepdim=True)], 1)
    return stats.chi2_contingency(table[:, table.sum(0) > 0].numpy()).pvalue > 1e-3


@pytest.fixture
def generator():
    torch.manual_seed(6)  # torchvision's draws
    return torch.Generator().manual_seed(7)


def test_flips_are_drawn_as_torchvision_does(generator):
    image = torch.arange(2, dtype=torch.uint8).expand(MANY, 3, 1, 2)
    flipped = augment.random_flip(image, generator)[:, 0, 0, :1].tolist()
    flip = transforms.RandomHorizontalFlip()
    assert same_discrete(flipped, [flip(image[0])[0, 0, :1].tolist() for _ in range(MANY)])


def test_angles_are_drawn_as_torchvision_does(generator, monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "rotate", lambda images, degrees: seen.append(degrees))
    augment.random_rotation(torch.zeros(MANY, 3, 1, 1), generator)
    assert same_continuous(
        seen[0], [transforms.RandomRotation.get_params([-15.0, 15.0]) for _ in range(MANY)]
    )


def test_translations_are_torchvisions_padded_crops(generator, monkeypatch):
    images = torch.randint(1, 256, (MANY, 3, 12, 9), dtype=torch.uint8, generator=generator)
    seen, padded = [], torch.nn.functional.pad(images, (4, 4, 4, 4))
    real = augment.translate
    monkeypatch.setattr(
        augment, "translate", lambda images, x, y: (seen.append((x, y)), real(images, x, y))[1]
    )
    moved = augment.random_translation(images, generator)
    places = [(4 - int(y), 4 - int(x)) for x, y in zip(*seen[0], strict=True)]  # top and left of the crop
    for number, (top, left) in enumerate(places[:200]):
        assert torch.equal(moved[number], padded[number, :, top : top + 12, left : left + 9])
    image = torch.zeros(3, 20, 17)
    assert same_discrete(places, [transforms.RandomCrop.get_params(image, (12, 9))[:2] for _ in range(MANY)])


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((32, 32), (0.8, 1.0), (3 / 4, 4 / 3)),
        ((20, 33), (0.5, 1.0), (3 / 4, 4 / 3)),
        ((8, 40), (0.9, 1.0), (0.5, 0.9)),
    ],
)
def test_crops_are_drawn_as_torchvision_does_with_its_retries(size, scale, ratio, generator):
    """The last case never fits and always takes the fallback."""
    ours = torch.stack(augment.draw_crop(MANY, *size, generator, scale, ratio), 1).long().tolist()
    image = torch.zeros(3, *size)
    theirs = [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(MANY)]
    for part in ((0,), (1,), (2, 3)):  # position and size of the box
        assert same_discrete([[b[i] for i in part] for b in ours], [[b[i] for i in part] for b in theirs])


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), (0.02, 0.2)), ((6, 30), (0.2, 0.9)), ((4, 4), (0.95, 1.0))]
)
def test_cutouts_are_drawn_as_torchvision_does_with_its_retries(size, scale, generator):
    """The last case never fits: nothing is erased."""
    ours = torch.stack(augment.draw_cutout(MANY, *size, generator, p=1.0, scale=scale), 1).long().tolist()
    image = torch.zeros(3, *size)
    theirs = []
    for _ in range(MANY):
        top, left, height, width, _ = transforms.RandomErasing.get_params(image, scale, (0.3, 3.3), [0.0])
        theirs.append((top, left, height, width) if (height, width) != size else (0, 0, 0, 0))
    ours = [box if box[2] else (0, 0, 0, 0) for box in ours]
    for part in ((0,), (1,), (2, 3)):
        assert same_discrete([[b[i] for i in part] for b in ours], [[b[i] for i in part] for b in theirs])


def test_half_of_the_images_get_a_cutout(generator):
    height = augment.draw_cutout(MANY, 32, 32, generator)[2]
    assert stats.binomtest(int((height > 0).sum()), MANY, 0.5).pvalue > 1e-3


def test_jitter_is_drawn_as_torchvision_does(generator):
    order, factors = augment.draw_jitter(MANY, generator)
    limits = [[0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1]]
    theirs = [transforms.ColorJitter.get_params(*limits) for _ in range(MANY)]
    assert same_discrete(order.tolist(), [draw[0].tolist() for draw in theirs])
    for number in range(4):
        assert same_continuous(factors[:, number], [draw[number + 1] for draw in theirs])


def test_autoaugment_is_drawn_as_torchvision_does(generator):
    """Both operations with their magnitudes and signs, as pairs."""
    operations, magnitudes = augment.draw_autoaugment(MANY, 32, 32, generator)
    names = [*augment.OPERATIONS, "none"]
    ours = [
        tuple((names[o], round(m, 4) if o >= 0 else 0.0) for o, m in zip(*pair, strict=True))
        for pair in zip(operations.tolist(), magnitudes.tolist(), strict=True)
    ]
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    space = policy._augmentation_space(10, (32, 32))
    theirs = []
    for _ in range(MANY):
        number, probabilities, signs = policy.get_params(len(policy.policies))
        pair = []
        for half, (name, p, level) in enumerate(policy.policies[number]):
            if probabilities[half] <= p:
                magnitudes, signed = space[name]
                magnitude = magnitudes[level].item() if level is not None else 0.0
                pair.append((name, round(-magnitude if signed and signs[half] == 0 else magnitude, 4)))
            else:
                pair.append(("none", 0.0))
        theirs.append(tuple(pair))
    assert same_discrete(ours, theirs)


# All of them


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_every_image_and_every_call_is_drawn_anew_and_a_seed_repeats(name):
    function = augment.AUGMENTATIONS[name]
    image = data.synthetic((10, 10, 10)).train.images[3]
    images = image.expand(64, -1, -1, -1)
    generator = torch.Generator().manual_seed(1)
    first, second = function(images, generator), function(images, generator)
    assert len(first.flatten(1).unique(dim=0)) > (1 if name == "flip" else 5)
    assert not torch.equal(first, second)
    assert torch.equal(first, function(images, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_any_size_and_layout_is_accepted_and_kept(name, layout):
    function = augment.AUGMENTATIONS[name]
    for shape in ((0, 3, 32, 32), (1, 3, 1, 1), (3, 3, 2, 5), (300, 3, 17, 9), (2, 3, 64, 48)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=layout)
        before = images.clone()
        out = function(images, torch.Generator().manual_seed(1))
        assert out.shape == shape and out.dtype == torch.uint8 and torch.equal(images, before)
        if len(out):  # an empty tensor has no layout
            assert out.is_contiguous(memory_format=layout) and out.data_ptr() != images.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_a_generator_on_the_cpu_gives_the_same_augmentation_on_the_gpu(name):
    images = data.synthetic((500, 10, 10)).train.images
    here, there = (
        augment.AUGMENTATIONS[name](part, torch.Generator().manual_seed(1)).cpu()
        for part in (images, images.cuda())
    )
    assert ((here.int() - there.int()).abs() > 2).float().mean() < 0.001
    augment.AUGMENTATIONS[name](images.cuda(), torch.Generator("cuda").manual_seed(1))


def test_names_are_parsed_in_order_and_hybrid_has_two_streams():
    images = data.synthetic((40, 10, 10)).train.images

    def apply(stream, generator):
        result = images
        for function in stream:
            result = function(result, generator)
        return result

    def seeded():
        return torch.Generator().manual_seed(1)

    assert augment.parse("none") == [[]]
    (stream,) = augment.parse("rotation+flip")
    generator = seeded()
    wanted = augment.random_flip(augment.random_rotation(images, generator), generator)
    assert torch.equal(apply(stream, seeded()), wanted)
    (cutout,) = augment.parse("cutout", mean=(0.5, 0.25, 1.0))
    changed = (apply(cutout, seeded()) != images).any(1)
    colours = apply(cutout, seeded()).permute(0, 2, 3, 1)[changed].unique(dim=0)
    assert colours.tolist() == [[128, 64, 255]]
    first, second = augment.parse("hybrid")
    assert torch.equal(apply(first, seeded()), apply(augment.parse("flip+rotation+crop")[0], seeded()))
    black = (apply(second, seeded()) == 0).all(1).flatten(1).sum(1)
    assert (black >= 0.015 * 1024).all()  # on every image
    for unknown in ("zoom", "flip+zoom", "", "flip+", "flip+none", "flip+hybrid"):
        with pytest.raises(ValueError, match="unknown augmentation"):
            augment.parse(unknown)


# Devices: no float64, which MPS lacks, and no device synchronization


class Watch(TorchDispatchMode):
    """Counts copies from the CPU to "meta", a device without data: reading it raises, as does float64."""

    copies = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given, made = (
            [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            for tree in ((arguments, options), result)
        )
        assert not any(tensor.is_meta and tensor.dtype == torch.float64 for tensor in made), function
        if any(tensor.is_meta for tensor in [*given, *made]):
            from_python = function is torch.ops.aten.lift_fresh.default  # torch.tensor([...], device="meta")
            self.copies += from_python or not all(tensor.is_meta for tensor in given)
        return result


UPLOADS = {"flip": 1, "rotation": 1, "crop": 1, "jitter": 2, "autoaugment": 2, "cutout": 1, "translate": 1}
STREAMS = [*UPLOADS, "hybrid", "translate+autoaugment", "+".join(UPLOADS)]


@pytest.mark.parametrize("name", STREAMS)
def test_on_a_device_there_is_no_float64_no_read_and_few_copies_of_parameters(name, monkeypatch):
    uploaded, upload = [], augment._upload

    def counted(parameters, device):
        uploaded.append(parameters.device != device)
        return upload(parameters, device)

    monkeypatch.setattr(augment, "_upload", counted)
    bound = sum(UPLOADS[part] for part in name.replace("hybrid", "flip+rotation+crop+cutout").split("+"))
    for stream in augment.parse(name, (0.5, 0.25, 1.0)):
        images = torch.empty(2 * augment.GPU_BLOCK + 9, 3, 20, 33, dtype=torch.uint8, device="meta")
        uploaded.clear()
        with Watch() as watch:
            for function in stream:
                images = function(images, torch.Generator().manual_seed(1))
        assert images.is_meta and images.dtype == torch.uint8
        assert 1 <= watch.copies <= bound
        assert watch.copies == sum(uploaded)  # each by _upload, which pins memory for CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", STREAMS)
def test_on_a_gpu_there_is_no_device_synchronization(name):
    images = torch.randint(0, 256, (3000, 3, 32, 32), dtype=torch.uint8, device="cuda")
    try:
        for mode in ("default", "error"):  # the first round fills the pool of pinned memory
            torch.cuda.set_sync_debug_mode(mode)
            for stream in augment.parse(name, (0.5, 0.25, 1.0)):
                augmented = images
                for function in stream:
                    augmented = function(augmented, torch.Generator().manual_seed(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Invalid images


PUBLIC = [
    name
    for name, function in inspect.getmembers(augment, inspect.isfunction)
    if not name.startswith("_") and "images" in inspect.signature(function).parameters
]


@pytest.mark.parametrize("kind", ["one image", "grey", "float"])
@pytest.mark.parametrize("name", PUBLIC)
def test_one_image_grey_images_and_floats_are_rejected_by_every_augmentation(name, kind):
    function = getattr(augment, name)
    wrong = {
        "one image": torch.zeros(3, 32, 32, dtype=torch.uint8),
        "grey": torch.zeros(4, 1, 32, 32, dtype=torch.uint8),
        "float": torch.rand(4, 3, 32, 32),
    }[kind]
    _, *others = inspect.signature(function).parameters.values()
    needed = [other for other in others if other.default is other.empty]
    arguments = [torch.Generator() if other.name == "generator" else torch.ones(4) for other in needed]
    shown = re.escape(f"images must be uint8 (N, 3, H, W), not {wrong.dtype} {tuple(wrong.shape)}")
    with pytest.raises(TypeError, match=shown):
        function(wrong, *arguments)


def peak_memory():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="a process's peak can be reset on Linux only"
)
@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_memory_stays_under_12_times_the_inputs_bytes(name):
    images = torch.randint(0, 256, (16384, 3, 32, 32), dtype=torch.uint8)
    augment.AUGMENTATIONS[name](images[:256], torch.Generator())
    ctypes.CDLL(None).malloc_trim(0)  # reusing what earlier tests freed would not count
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    augment.AUGMENTATIONS[name](images, torch.Generator())
    assert 0.9 * images.nbytes < peak_memory() - before < 12 * images.nbytes  # at least the new images


def test_file_and_readmes_example_work_alone_in_another_project(tmp_path):
    shutil.copy(HOUSE / "augment.py", tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (HOUSE / "README.md").read_text(), re.DOTALL)
    (snippet,) = (text for text in snippets if "import augment" in text)
    (tmp_path / "theirs.py").write_text(snippet)
    code = "from torchvision import datasets\n"
    code += (
        "datasets.CIFAR10 = lambda root, transform, **_: datasets.FakeData(64, (3, 32, 32), 10, transform)\n"
    )
    code += "exec(open('theirs.py').read())\n"
    code += "x, g = torch.zeros(9, 3, 16, 20, dtype=torch.uint8), torch.Generator()\n"
    code += "for f in augment.AUGMENTATIONS.values(): assert f(x, g).shape == x.shape"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_pictures(run, tmp_path):
    pytest.importorskip("matplotlib")
    process = run(
        "augment.py", "--data", "synthetic", "--out", tmp_path / "a" / "x.png", "--index", 7, "--seed", 3
    )
    assert process.returncode == 0, process.stderr
    sheets = [tmp_path / "a" / "x.png", tmp_path / "a" / "x-all.png"]
    assert process.stdout.split() == list(map(str, sheets)) and all(s.stat().st_size > 20_000 for s in sheets)


def test_pictures_without_matplotlib_or_image_are_one_line(run, one_line):
    command = ("augment.py", "--data", "synthetic")
    process = run(*command, code="import sys; sys.modules['matplotlib'] = None")
    assert process.returncode == 1 and "pip install matplotlib" in process.stderr
    one_line(run(*command, "--index", 2000), 2, "--index 2000", "0 to 1999")


@pytest.mark.parametrize("folder", [True, False])
def test_pictures_by_a_lone_copy_are_one_line_even_beside_a_folder_named_data(folder, tmp_path, one_line):
    shutil.copy(HOUSE / "augment.py", tmp_path)
    if folder:
        (tmp_path / "data").mkdir()  # import data would take it for a package
    command = [sys.executable, "augment.py", "--data", "synthetic", "--out", "x.png"]
    process = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    one_line(process, 1, "augment.py: error: pictures need data.py")
