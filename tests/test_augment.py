import inspect
import math
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import HOUSE
from scipy import stats
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import functional as oracle
from torchvision.transforms.autoaugment import _apply_op

import augment
import data

MANY = 20_000


@pytest.fixture(params=["32x32", "20x33", "channels_last"])
def images(request):
    """Synthetic images and noise, square or not, in both layouts."""
    images = data.synthetic((40, 10, 10)).train.images
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0)).byte()
    images = torch.cat([images, noise])
    if request.param == "20x33":
        return torch.nn.functional.pad(images[:, :, :20], (0, 1))
    return (
        images.contiguous(memory_format=torch.channels_last) if request.param == "channels_last" else images
    )


def uniform(low, high):
    return torch.rand(80, generator=torch.Generator().manual_seed(1)) * (high - low) + low


def each(function, images, *parameters):
    """A function of one image at a time, with that image's own parameters."""
    rows = zip(images, *(parameter.tolist() for parameter in parameters), strict=True)
    return torch.stack([function(image, *row) for image, *row in rows])


def assert_equal(ours, theirs, within=0, share=0.0):
    """At most `within` of 255 apart, except for a share of the values."""
    assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
    assert ((ours.int() - theirs.int()).abs() > within).float().mean() <= share


def apply(stream, images, device="cpu"):
    generator = torch.Generator(device).manual_seed(1)
    for function in stream:
        images = function(images, generator)
    return images


# With given parameters: against torchvision's functional API, image by image


def shear(image, x, y):
    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return oracle.affine(image, 0.0, [0, 0], 1.0, angles, center=[0, 0])


def jitter(image, order, factors):
    steps = (oracle.adjust_brightness, oracle.adjust_contrast, oracle.adjust_saturation, oracle.adjust_hue)
    for step in order:
        image = steps[step](image, factors[step])
    return image


def autoaugment(image, operations, magnitudes):
    """What torchvision's AutoAugment calls."""
    names, nearest = list(augment.OPERATIONS), transforms.InterpolationMode.NEAREST
    for operation, magnitude in zip(operations, magnitudes, strict=True):
        if operation >= 0:
            image = _apply_op(image, names[operation], magnitude, interpolation=nearest, fill=None)
    return image


COLOURS = ("brightness", "contrast", "saturation", "sharpness", "hue")
ROUNDED = {name: 1 for name in ("crop", *COLOURS, "autoaugment")} | {"jitter": 2}
TIES = ("rotate", "shear", "translate", "autoaugment")  # a pixel half-way between two may be either
ORACLES = {
    "flip": lambda image, flipped: oracle.hflip(image) if flipped else image,
    "rotate": oracle.rotate,
    "shear": shear,
    "translate": lambda image, *move: oracle.affine(image, 0.0, move, 1.0, [0.0, 0.0]),
    "crop": lambda image, *box: oracle.resized_crop(image, *map(int, box), image.shape[1:], antialias=True),
    **{name: getattr(oracle, f"adjust_{name}") for name in COLOURS},
    "jitter": jitter,
    "posterize": lambda image, bits: oracle.posterize(image, int(bits)),
    "solarize": oracle.solarize,
    "autoaugment": autoaugment,
}


def parameters(name, size):
    """Lists of parameters for 80 images, among them AutoAugment's magnitudes, where many pixels are ties."""
    generator, steps = torch.Generator().manual_seed(3), torch.linspace(-0.3, 0.3, 19).repeat(5)[:80]
    return {
        "flip": [[uniform(0, 1) < 0.5]],
        "rotate": [[uniform(-15, 15)], [uniform(-180, 180)], [100 * steps]],
        "shear": [part for x in (uniform(-0.5, 0.5), steps) for part in ([x, 0 * x], [0 * x, x])],
        "translate": [[uniform(-14, 14).round(), uniform(-14, 14).flip(0).round()]],
        "crop": [augment.draw_crop(80, *size, generator, scale) for scale in ((0.8, 1.0), (0.05, 0.3))],
        "hue": [[uniform(-0.5, 0.5)]],
        "jitter": [augment.draw_jitter(80, generator)],
        "posterize": [[torch.arange(80) % 9]],
        "solarize": [[torch.linspace(255, 0, 10).repeat(8)], [uniform(0, 255)]],
        "autoaugment": [augment.draw_autoaugment(80, *size, generator)],
    }.get(name, [[uniform(0, 2)]])


@pytest.mark.parametrize("name", ORACLES)
def test_every_function_equals_torchvisions_image_by_image(name, images):
    for given in parameters(name, images.shape[2:]):
        ours, theirs = getattr(augment, name)(images, *given), each(ORACLES[name], images, *given)
        assert_equal(ours, theirs, ROUNDED.get(name, 0), 0.001 if name in TIES else 0)


def test_cutout_equals_torchvisions_erase(images):
    boxes = augment.draw_cutout(len(images), *images.shape[2:], torch.Generator().manual_seed(3))
    fill, whole = torch.tensor([10, 20, 30], dtype=torch.uint8), [side.int() for side in boxes]
    theirs = each(lambda image, *box: oracle.erase(image, *box, fill.view(3, 1, 1)), images, *whole)
    assert_equal(augment.erase(images, *boxes, fill), theirs)


def test_hue_of_every_colour_is_within_1_of_torchvision():
    steps = torch.tensor([*range(0, 256, 5), 1, 2, 127, 128, 254], dtype=torch.uint8)
    colours = torch.cartesian_prod(steps, steps, steps).T.view(1, 3, -1, len(steps))
    for shift in (-0.1, 0.0, 1 / 6):
        theirs = oracle.adjust_hue(colours, shift)
        assert_equal(augment.hue(colours, torch.tensor([shift])), theirs, within=1)


def test_equalize_autocontrast_and_invert_equal_torchvisions(images):
    two_values = (images > 200).byte() * 5
    for drawn in (images, torch.full_like(images, 7), two_values, images // 9 + 50, images // 80):
        for name in ("equalize", "autocontrast", "invert"):
            assert_equal(getattr(augment, name)(drawn), each(getattr(oracle, name), drawn))


# By name, in distribution: 20,000 images against 20,000 of torchvision's draws with the study's parameters

MEAN = (0.5, 0.25, 1.0)


@pytest.fixture
def drawn(monkeypatch):
    """drawn("rotation", "rotate") -> what a name hands to a function of augment for 20,000 images."""
    torch.manual_seed(6)  # torchvision's draws

    def drawn(name, function, size=(32, 32)):
        images, seen = torch.zeros(1, 3, *size, dtype=torch.uint8).expand(MANY, -1, -1, -1), []
        monkeypatch.setattr(augment, function, lambda images, *drawn: seen.append(drawn))
        *_, (*_, last) = augment.parse(name, MEAN)
        last(images, torch.Generator().manual_seed(7))
        return seen[0]

    return drawn


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


def same_boxes(ours, theirs):
    """Of boxes (top, left, height, width): each position, and the sizes together."""
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    return all(same_discrete(ours[:, part].tolist(), theirs[:, part].tolist()) for part in ([0], [1], [2, 3]))


def test_flip_draws_as_torchvision_does(drawn):
    flip, image = transforms.RandomHorizontalFlip(), torch.arange(2).view(1, 1, 2)
    theirs = [flip(image).flatten().tolist() for _ in range(MANY)]
    assert same_discrete([(1, 0) if flipped else (0, 1) for flipped in drawn("flip", "flip")[0]], theirs)


def test_rotation_draws_as_torchvision_does(drawn):
    rotation = transforms.RandomRotation(15)
    theirs = [rotation.get_params(rotation.degrees) for _ in range(MANY)]
    assert same_continuous(drawn("rotation", "rotate")[0], theirs)


def test_translate_draws_torchvisions_padded_crops(drawn):
    x, y = drawn("translate", "translate", (12, 9))
    padded = torch.zeros(3, 12 + 2 * 4, 9 + 2 * 4)
    theirs = [transforms.RandomCrop.get_params(padded, (12, 9)) for _ in range(MANY)]
    assert same_discrete(torch.stack([4 - y, 4 - x], 1).tolist(), [(top, left) for top, left, *_ in theirs])


@pytest.mark.parametrize(("size", "count"), [((32, 32), MANY), ((20, 33), MANY), ((8, 40), 9), ((40, 8), 9)])
def test_crop_draws_as_torchvision_does(size, count, drawn):
    """With its retries: the last two sizes never fit and take the fallback, which is not random."""
    ours = torch.stack(drawn("crop", "crop", size), 1).long().tolist()
    crop, image = transforms.RandomResizedCrop(32, scale=(0.8, 1.0)), torch.zeros(3, *size)
    theirs = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(count)]
    assert same_boxes(ours, theirs) if count == MANY else ours[:count] == list(map(list, theirs))


def erased(image, scale, ratio):
    top, left, height, width, _ = transforms.RandomErasing.get_params(image, scale, ratio, [0.0])
    return (top, left, height, width) if (height, width) != image.shape[1:] else (0, 0, 0, 0)


@pytest.mark.parametrize(("name", "p", "fill"), [("cutout", 0.5, [128, 64, 255]), ("hybrid", 1.0, [0, 0, 0])])
def test_cutout_draws_as_torchvision_does(name, p, fill, drawn):
    """In the mean colour for half of the images, and on hybrid in black for all."""
    *boxes, colour = drawn(name, "erase")
    assert colour.tolist() == fill
    ours = [box for box in torch.stack(boxes, 1).long().tolist() if box[2]]
    assert stats.binomtest(len(ours), MANY, p).pvalue > 1e-3
    erasing, image = transforms.RandomErasing(scale=(0.02, 0.2)), torch.zeros(3, 32, 32)
    assert same_boxes(ours, [erased(image, erasing.scale, erasing.ratio) for _ in range(MANY)])


@pytest.mark.parametrize(("size", "scale", "count"), [((6, 30), (0.2, 0.9), MANY), ((4, 4), (0.95, 1.0), 99)])
def test_cutouts_retries_are_torchvisions(size, scale, count):
    """The last case never fits: nothing is erased."""
    boxes = augment.draw_cutout(count, *size, torch.Generator().manual_seed(7), p=1.0, scale=scale)
    ours = [box if box[2] else (0, 0, 0, 0) for box in torch.stack(boxes, 1).long().tolist()]
    assert same_boxes(ours, [erased(torch.zeros(3, *size), scale, (0.3, 3.3)) for _ in range(count)])


def test_jitter_draws_as_torchvision_does(drawn):
    (order, factors), jitter = drawn("jitter", "jitter"), transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    limits = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [jitter.get_params(*limits) for _ in range(MANY)]
    assert same_discrete(order.tolist(), [draw[0].tolist() for draw in theirs])
    for number in range(4):
        assert same_continuous(factors[:, number], [draw[number + 1] for draw in theirs])


def test_autoaugment_draws_as_torchvision_does(drawn):
    """Both operations with their magnitudes and signs, together."""
    operations, magnitudes = drawn("autoaugment", "autoaugment", (20, 33))
    ours = torch.cat([operations, magnitudes * (operations >= 0)], 1)
    policy, names = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10), list(augment.OPERATIONS)
    space, theirs = policy._augmentation_space(10, (20, 33)), []
    for _ in range(MANY):
        number, probabilities, signs = policy.get_params(len(policy.policies))
        row = [-1, -1, 0.0, 0.0]
        for half, (name, p, level) in enumerate(policy.policies[number]):
            if probabilities[half] <= p:
                values, signed = space[name]
                row[half], sign = names.index(name), -1 if signed and signs[half] == 0 else 1
                row[2 + half] = 0.0 if level is None else sign * values[level].item()
        theirs.append(row)
    assert same_discrete(*(part.round(decimals=4).tolist() for part in (ours, torch.tensor(theirs))))


def test_names_are_applied_in_order_and_hybrid_is_two_streams():
    images = data.synthetic((40, 10, 10)).train.images
    assert augment.parse("none") == [[]]
    (stream,), reverse = augment.parse("rotation+flip"), [augment.random_rotation, augment.random_flip]
    assert torch.equal(apply(stream, images), apply(reverse, images))
    (basic,), (first, second) = augment.parse("flip+rotation+crop"), augment.parse("hybrid", MEAN)
    wanted, cut = apply(basic, images), apply(second, images)
    assert torch.equal(apply(first, images), wanted) and torch.equal(apply(second[:-1], images), wanted)
    assert len(second) == 4 and ((cut == wanted) | (cut == 0)).all() and not torch.equal(cut, wanted)


def test_names_that_cannot_be_used_are_rejected():
    unknown = "^unknown augmentation '[a-zA-Z, ]+': choose none or hybrid, each alone"
    for name in ("zoom", "flip+zoom", "flip,crop", "Flip", "flip+ crop", "hybrid+zoom"):
        with pytest.raises(ValueError, match=unknown):
            augment.parse(name)
    for name in ("hybrid+flip", "none+flip", "", "flip+", "+flip", "flip++crop", "flip+flip"):
        with pytest.raises(
            ValueError, match=f"^augmentation '{re.escape(name)}': choose none or hybrid, each"
        ):
            augment.parse(name)


# All of them


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_every_image_and_every_call_is_drawn_anew_and_a_seed_repeats(name):
    function = augment.AUGMENTATIONS[name]
    images = data.synthetic((10, 10, 10)).train.images[3].expand(256, -1, -1, -1)
    generator = torch.Generator().manual_seed(1)
    first, second = function(images, generator), function(images, generator)
    assert len(first.flatten(1).unique(dim=0)) > (1 if name == "flip" else 5)
    assert not torch.equal(first, second) and not torch.equal(first[:128], first[128:])  # of two blocks
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


# Devices: no float64, which MPS lacks, and no device synchronization


class Watch(TorchDispatchMode):
    """Counts copies from the CPU to "meta", a device without data: reading it raises, as does float64."""

    copies = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        leaves = _pytree.tree_leaves((arguments, options, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if tensor.is_meta]
        assert not any(tensor.dtype == torch.float64 for tensor in there), function
        self.copies += bool(there) and len(there) < len(tensors)
        return result


UPLOADS = {"flip": 1, "rotation": 1, "crop": 1, "jitter": 2, "autoaugment": 2, "cutout": 1, "translate": 1}
STREAMS = [*UPLOADS, "hybrid", "translate+autoaugment", "+".join(UPLOADS)]


@pytest.mark.parametrize("name", STREAMS)
def test_on_a_device_there_is_no_float64_no_read_and_few_copies_of_parameters(name, monkeypatch):
    tensor = torch.tensor

    def as_on_cuda(*values, device="cpu", **options):  # on "meta" nothing would be copied
        return tensor(*values, **options).to(device)

    monkeypatch.setattr(torch, "tensor", as_on_cuda)
    bound = sum(UPLOADS[part] for part in name.replace("hybrid", "flip+rotation+crop+cutout").split("+"))
    for stream in augment.parse(name, MEAN):
        images = torch.empty(300, 3, 20, 33, dtype=torch.uint8, device="meta")
        with Watch() as watch, mock.patch.object(augment, "_upload", wraps=augment._upload) as upload:
            images = apply(stream, images)
        uploads = [call for call in upload.call_args_list if call.args[0].device != call.args[1]]
        assert images.is_meta and images.dtype == torch.uint8
        assert 1 <= watch.copies <= bound
        assert watch.copies == len(uploads)  # each by _upload, which pins memory for CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("name", STREAMS)
def test_a_gpu_gives_the_same_images_without_device_synchronization(name):
    images = data.synthetic((3000, 10, 10)).train.images
    there = images.cuda()
    for stream in augment.parse(name, MEAN):
        try:
            for mode in ("default", "error"):  # the first round fills the pool of pinned memory
                torch.cuda.set_sync_debug_mode(mode)
                augmented = apply(stream, there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if name in UPLOADS:  # a pixel moved by one augmentation may differ more after the next
            assert ((apply(stream, images).int() - augmented.cpu().int()).abs() > 2).float().mean() < 0.001
        apply(stream, there, "cuda")  # parameters that were drawn there


# Invalid images


FUNCTIONS = [function for name, function in inspect.getmembers(augment, inspect.isfunction) if name[0] != "_"]


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if "images" in inspect.signature(f).parameters])
def test_one_image_grey_images_and_floats_are_rejected_by_every_augmentation(function):
    _, *others = inspect.signature(function).parameters.values()
    needed = [other for other in others if other.default is other.empty]
    arguments = [torch.Generator() if other.name == "generator" else torch.ones(4) for other in needed]
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for wrong in (image, image.expand(4, -1, -1, -1)[:, :1], torch.rand(4, 3, 32, 32)):
        shown = re.escape(f"images must be uint8 (N, 3, H, W), not {wrong.dtype} {tuple(wrong.shape)}")
        with pytest.raises(TypeError, match=shown):
            function(wrong, *arguments)


def test_file_and_readmes_example_work_alone_in_another_project(tmp_path):
    shutil.copy(HOUSE / "augment.py", tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (HOUSE / "README.md").read_text(), re.DOTALL)
    (snippet,) = (text for text in snippets if "augment.random_crop" in text)
    (tmp_path / "theirs.py").write_text(snippet)
    code = """import torch
loader, model = [(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4))], torch.nn.Flatten()
normalize = torch.nn.Identity()
exec(open("theirs.py").read())
assert logits.shape == (4, 3072)
x, g = torch.zeros(9, 3, 16, 20, dtype=torch.uint8), torch.Generator()
for f in augment.AUGMENTATIONS.values(): assert f(x, g).shape == x.shape"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
