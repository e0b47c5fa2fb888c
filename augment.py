"""Random augmentation of whole batches, every image with parameters of its own, on any device.

torchvision's augmentations, exact, but batched. Needs nothing but torch (AutoAugment reads its policy from
torchvision): copy this file into your own project.

    import torch, augment
    generator = torch.Generator().manual_seed(1)
    images = augment.random_rotation(images, generator)  # uint8 (N, 3, H, W) in, the same out

    python augment.py --data synthetic --out figures/augmentation.png  # see what each one does

Each augmentation has two halves: a pure function of images and per-image parameters (`rotate`), and a
wrapper that draws them as torchvision does (`random_rotation`). Images are uint8 (N, 3, H, W), any N, H and W,
contiguous or channels_last, and come out as new ones of the same layout. Parameters are drawn on the
generator's device: a generator on the CPU gives the same augmentation wherever the images are, and keeps
the GPU from waiting for the host; jitter and autoaugment sort the images by operation, on the CPU.
"""

import functools
import math

import torch
from torch.nn import functional as F

BLOCK = {"cpu": 128}  # images computed on in floats at a time: what a CPU's cache holds
GPU_BLOCK = 8192


# Geometry


def flip(images, flipped):
    """Mirror left-right the images where flipped, bool (N,), is true."""
    _check(images)
    return _change(images, images.flip(-1).bitwise_xor_(images), flipped.view(-1, 1, 1, 1))


def rotate(images, degrees):
    """Rotate counter-clockwise about the centre by degrees (N,); nearest pixel, black outside."""
    turn = -torch.deg2rad(degrees.double())
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    return _affine(images, (cos, sin, zero), (-sin, cos, zero))


def shear(images, x, y):
    """Shift each row by x (N,) times its height, each column by y (N,) times its place, from the top left
    corner; nearest pixel, black outside. The x of torchvision's affine is atan(x), in degrees."""
    x, y = x.double(), y.double()
    one = torch.ones_like(x)
    return _affine(images, (one, x, x * images.shape[2] / 2), (y, one, y * images.shape[3] / 2))


def translate(images, x, y):
    """Move by x, y (N,) pixels to the right and down; nearest pixel, black outside."""
    x, y = x.double(), y.double()
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _affine(images, (one, zero, -x), (zero, one, -y))


def _affine(images, x_row, y_row):
    """Take pixel (x, y) from (a x + b y + c, d x + e y + f), counted from the centre. rows: 3 times (N,).

    The arithmetic is torchvision's, down to its order: half of all ties in rounding hang on it.
    """
    height, width = images.shape[2:]
    pixel = {"dtype": torch.float32, "device": images.device}
    base = torch.ones(3, height, width, **pixel)
    base[0] = torch.linspace(-width * 0.5 + 0.5, width * 0.5 - 0.5, width, **pixel)
    base[1] = torch.linspace(-height * 0.5 + 0.5, height * 0.5 - 0.5, height, **pixel)[:, None]
    theta = torch.stack([torch.stack(x_row, 1), torch.stack(y_row, 1)], 1).to(**pixel)  # (N, 2, 3)
    theta = theta / torch.tensor([[0.5 * width], [0.5 * height]], **pixel)
    base = base.flatten(1)

    def sample(images, theta):
        grid = theta.bmm(base.expand(len(images), -1, -1)).view(-1, 2, height, width).permute(0, 2, 3, 1)
        pixels = F.grid_sample(
            images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False
        )
        return pixels.to(torch.int16)

    return _in_blocks(sample, images, theta)


def crop(images, top, left, height, width):
    """Cut a box out of each image, (N,) in pixels, and stretch it to the whole; bilinear."""

    across, down = _stretch(left, width, images.shape[3]), _stretch(top, height, images.shape[2])

    def sample(images, across, down):
        grid = torch.empty(len(images), 2, *images.shape[2:], device=images.device)
        grid[:, 0], grid[:, 1] = across[:, None], down[:, :, None]
        pixels = F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)
        return pixels.add_(0.5).to(torch.int16)

    return _in_blocks(sample, images, across, down)


def _stretch(start, length, size):
    """Where each pixel of an axis of `size` comes from when [start, start + length) is stretched over it: float
    (N, size) in grid_sample's units, from -1 to 1. No pixel outside that range counts."""
    places = torch.arange(size, device=start.device) + 0.5
    start, length = start[:, None].float(), length[:, None].float()
    source = (places * (length / size)).clamp(min=0.5).minimum(length - 0.5) + start
    return source * (2 / size) - 1


def erase(images, top, left, height, width, fill):
    """Fill one rectangle an image. top..width: (N,) in pixels; height = 0 leaves an image as it is; fill:
    uint8 (3,)."""
    _check(images)
    rows = torch.arange(images.shape[2], device=images.device)
    cols = torch.arange(images.shape[3], device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])  # (N, H)
    inside_cols = (cols >= left[:, None]) & (cols < (left + width)[:, None])  # (N, W)
    inside = inside_rows[:, None, :, None] & inside_cols[:, None, None, :]  # (N, 1, H, W)
    return _change(images, images ^ fill.view(1, -1, 1, 1), inside)


def _change(images, difference, chosen):
    """images ^ difference where chosen, bool, is true; overwrites difference. Bit by bit, since a CPU does a
    `where` on bytes three times as slowly."""
    mask = chosen.to(torch.uint8).neg_()  # minus 1 is 255: every bit
    return difference.bitwise_and_(mask).bitwise_xor_(images)


# Colour


def brightness(images, factor):
    """Scale by factor (N,): 0 is black, 1 the image itself."""
    return _blend(images, 0, factor)


def contrast(images, factor):
    """Away from the mean of the grey image by factor (N,): 0 is plain grey."""
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), factor)


def saturation(images, factor):
    """Away from the grey image by factor (N,): 0 is grey."""
    return _blend(images, _grey(images), factor)


def sharpness(images, factor):
    """Away from the image smoothed by a 3x3 kernel, factor (N,): 0 is smooth. Its border stays as it is."""
    if min(images.shape[2:]) <= 2:
        return images.clone()
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(smooth, kernel / 13, groups=3).round_()
    return _blend(images, smooth, factor)


def _blend(images, other, factor):
    factor = factor.float().view(-1, 1, 1, 1)
    return _bytes((images * factor).add_(other * (1 - factor)).clamp_(0, 255))


def _grey(images):
    """Luma in whole steps, float (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114).floor_()[:, None]


def hue(images, shift):
    """Turn the hue by shift (N,), in turns of the colour circle, in HSV (Smith, 1978)."""
    red, green, blue = images.float().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Sixths of the circle: 0 is red, 2 green, 4 blue. Masks by arithmetic, since a comparison or a `where` takes
    # a CPU four times as long: values are whole, so that the largest channel is the one less than 1 below.
    not_red = (value - red).clamp_(max=1)
    is_green = (1 - (value - green).clamp_(max=1)).mul_(not_red)
    is_blue = not_red - is_green
    sixths = (
        (green - blue).mul_(1 - not_red).add_((blue - red).mul_(is_green)).add_((red - green).mul_(is_blue))
    )
    sixths = sixths.div_(chroma.clamp(min=1)) + 2 * is_green + 4 * is_blue
    sixths = sixths.add_(6 * shift.float().view(-1, 1, 1))
    out = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        k = sixths + offset
        k -= 6 * (k / 6).floor_()
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        out[:, channel] = _bytes((value - chroma * k).mul_(255.999 / 255))  # torchvision's way back to bytes
    return out


def jitter(images, order, factors):
    """Brightness, contrast, saturation and hue of each image by factors, float (N, 4), in the order of its
    own permutation of these four, int64 (N, 4), on the CPU."""
    pixels = images.contiguous()
    for operations in order.unbind(1):
        pixels = _by_operation(pixels, operations, factors, JITTER)
    return torch.empty_like(images).copy_(pixels)


# The operations of AutoAugment that are not above


def posterize(images, bits):
    """Keep the upper bits (N,) of every value."""
    mask = 256 - 2 ** (8 - bits.int())
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images, threshold):
    """Invert the values from threshold (N,) on."""
    bright = images >= threshold.view(-1, 1, 1, 1)
    return images ^ bright.to(torch.uint8).neg_()


def invert(images):
    return 255 - images


def autocontrast(images):
    """Stretch each channel of each image to 0..255."""
    low, high = (bound((2, 3), keepdim=True).float() for bound in (images.amin, images.amax))
    flat = low == high
    scale = 255 / (high - low).masked_fill_(flat, 255)
    return _bytes((images - low.masked_fill_(flat, 0)).mul_(scale).clamp_(0, 255))


def equalize(images):
    """Flatten the histogram of each channel of each image."""
    values = images.flatten(2).long()  # (N, 3, H * W)
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    last = histogram.gather(2, values.amax(2, keepdim=True))  # how often the brightest value occurs
    step = (values.shape[2] - last) // 255
    below = histogram.cumsum(2) - histogram
    table = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    table[..., 0] = 0
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return torch.empty_like(images).copy_(table.gather(2, values).view(images.shape))


JITTER = (brightness, contrast, saturation, hue)

# name: (function of images and magnitude, the ten magnitudes for height and width, has a random sign)
# Cubuk et al., 2019, arXiv:1805.09501; the magnitudes are those of torchvision's AutoAugment.
OPERATIONS = {
    "ShearX": (
        lambda images, m: shear(images, m, torch.zeros_like(m)),
        lambda h, w: torch.linspace(0, 0.3, 10),
        True,
    ),
    "ShearY": (
        lambda images, m: shear(images, torch.zeros_like(m), m),
        lambda h, w: torch.linspace(0, 0.3, 10),
        True,
    ),
    "TranslateX": (
        lambda images, m: translate(images, m.trunc(), torch.zeros_like(m)),
        lambda h, w: torch.linspace(0, 150 / 331 * w, 10),
        True,
    ),
    "TranslateY": (
        lambda images, m: translate(images, torch.zeros_like(m), m.trunc()),
        lambda h, w: torch.linspace(0, 150 / 331 * h, 10),
        True,
    ),
    "Rotate": (rotate, lambda h, w: torch.linspace(0, 30, 10), True),
    "Brightness": (
        lambda images, m: brightness(images, 1 + m),
        lambda h, w: torch.linspace(0, 0.9, 10),
        True,
    ),
    "Color": (lambda images, m: saturation(images, 1 + m), lambda h, w: torch.linspace(0, 0.9, 10), True),
    "Contrast": (lambda images, m: contrast(images, 1 + m), lambda h, w: torch.linspace(0, 0.9, 10), True),
    "Sharpness": (lambda images, m: sharpness(images, 1 + m), lambda h, w: torch.linspace(0, 0.9, 10), True),
    "Posterize": (posterize, lambda h, w: 8 - (torch.arange(10) / 2.25).round(), False),
    "Solarize": (solarize, lambda h, w: torch.linspace(255, 0, 10), False),
    "AutoContrast": (lambda images, m: autocontrast(images), lambda h, w: torch.zeros(10), False),
    "Equalize": (lambda images, m: equalize(images), lambda h, w: torch.zeros(10), False),
    "Invert": (lambda images, m: invert(images), lambda h, w: torch.zeros(10), False),
}


def autoaugment(images, operations, magnitudes):
    """Two operations after each other. operations: int64 (N, 2) on the CPU, places in OPERATIONS, -1 is none;
    magnitudes: float (N, 2), signed."""
    pixels = images.contiguous()
    functions = [function for function, *_ in OPERATIONS.values()]
    for half in range(2):
        each = magnitudes[:, half : half + 1].expand(-1, len(functions))
        pixels = _by_operation(pixels, operations[:, half], each, functions)
    return torch.empty_like(images).copy_(pixels)


def _by_operation(images, operations, parameters, functions):
    """Pass each image through the one of functions that operations (N,) names, -1 for none; each function gets
    its column of parameters (N, len(functions)). Both on the CPU. Sorting the images by operation and back
    takes two copies; writing each group to its scattered rows takes a CPU ten times as long."""
    order = operations.argsort()
    counts = torch.bincount(operations + 1, minlength=len(functions) + 1).tolist()
    groups = images.index_select(0, order.to(images.device)).split(counts)
    rows = order.split(counts)
    done = [groups[0]]
    for number, function in enumerate(functions):
        if counts[number + 1]:
            parameter = parameters[rows[number + 1], number].to(images.device)
            done.append(_in_blocks(function, groups[number + 1], parameter))
    return torch.cat(done).index_select(0, order.argsort().to(images.device))


def _bytes(pixels):
    """Floats in 0..255 cut off to uint8; by way of int16, which a CPU does several times faster."""
    return pixels.to(torch.int16).to(torch.uint8)


def _check(images):
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise TypeError(f"images must be uint8 (N, 3, H, W), these are {images.dtype} {tuple(images.shape)}")


def _in_blocks(function, images, *parameters):
    """function(images, *parameters), uint8 or whole int16 in 0..255, as uint8 in the layout of images, computed on
    some of them at a time: floats take four times the memory, and a CPU's cache is small."""
    _check(images)
    out = torch.empty_like(images)
    size = BLOCK.get(images.device.type, GPU_BLOCK)
    for start in range(0, len(images), size):
        block = slice(start, start + size)
        out[block] = function(images[block], *(parameter[block] for parameter in parameters))
    return out


# Draws


def _uniform(generator, low, high, *shape):
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _randint(generator, high):
    """Whole numbers in [0, high), each with a bound of its own. high: float (N,)."""
    return (_uniform(generator, 0, 1, len(high)) * high).floor().minimum(high - 1)


def random_flip(images, generator, p=0.5):
    """torchvision's RandomHorizontalFlip(p)."""
    flipped = _uniform(generator, 0, 1, len(images)) < p
    return flip(images, flipped.to(images.device))


def random_rotation(images, generator, degrees=15):
    """torchvision's RandomRotation(degrees)."""
    return rotate(images, _uniform(generator, -degrees, degrees, len(images)).to(images.device))


def random_translation(images, generator, most=4):
    """torchvision's RandomCrop(size, padding=most), where size is that of the images: moved by up to `most` whole
    pixels each way, black outside."""
    x, y = _uniform(generator, 0, 2 * most + 1, 2, len(images)).floor() - most
    return translate(images, x.to(images.device), y.to(images.device))


def draw_crop(count, height, width, generator, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Boxes of RandomResizedCrop, (top, left, height, width), each float (N,): the first of ten tries that
    fits, else the largest box in the middle whose ratio is allowed."""
    area, aspect = _draw_shapes(generator, height * width, scale, ratio, count, tries)
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    box_height, box_width, found = _first(fits, heights, widths)
    middle_width = min(width, round(height * ratio[1])) if width > height * ratio[1] else width
    middle_height = min(height, round(width / ratio[0])) if width < height * ratio[0] else height
    box_height = torch.where(found, box_height, middle_height)
    box_width = torch.where(found, box_width, middle_width)
    top = _randint(generator, height - box_height + 1)
    left = _randint(generator, width - box_width + 1)
    top = torch.where(found, top, (height - middle_height) // 2)
    left = torch.where(found, left, (width - middle_width) // 2)
    return top, left, box_height, box_width


def _draw_shapes(generator, whole, scale, ratio, *shape):
    """Areas, a share of the whole in scale, and aspects, even on a logarithmic scale in ratio."""
    area = whole * _uniform(generator, *scale, *shape)
    return area, _uniform(generator, math.log(ratio[0]), math.log(ratio[1]), *shape).exp()


def _first(fits, *values):
    """Of values (N, tries) the first that fits, and whether there is one, each (N,)."""
    first = fits.int().argmax(1, keepdim=True)
    return *(value.gather(1, first)[:, 0] for value in values), fits.any(1)


def random_crop(images, generator, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop(size, scale, ratio), where size is that of the images."""
    boxes = draw_crop(len(images), *images.shape[2:], generator, scale, ratio)
    return crop(images, *(side.to(images.device) for side in boxes))


def draw_cutout(count, height, width, generator, p=0.5, scale=(0.02, 0.2), ratio=(0.3, 3.3), tries=10):
    """Boxes of RandomErasing, (top, left, height, width), each float (N,): the first of ten tries that is
    smaller than the image; else, and for a share 1 - p of the images, height 0."""
    area, aspect = _draw_shapes(generator, height * width, scale, ratio, count, tries)
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    box_height, box_width, found = _first((heights < height) & (widths < width), heights, widths)
    found &= _uniform(generator, 0, 1, count) < p
    top = _randint(generator, (height - box_height + 1).clamp(min=1))
    left = _randint(generator, (width - box_width + 1).clamp(min=1))
    return top, left, box_height * found, box_width


def random_cutout(images, generator, p=0.5, scale=(0.02, 0.2), ratio=(0.3, 3.3), fill=(0, 0, 0)):
    """torchvision's RandomErasing(p, scale, ratio), filled with one colour: three values in 0..255. The mean
    colour of the data is what RandomErasing(value=0) is after normalisation. Cutout: DeVries and Taylor, 2017,
    arXiv:1708.04552."""
    boxes = draw_cutout(len(images), *images.shape[2:], generator, p, scale, ratio)
    fill = torch.tensor(fill, dtype=torch.uint8, device=images.device)
    return erase(images, *(side.to(images.device) for side in boxes), fill)


def draw_jitter(count, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1):
    """Order, int64 (N, 4), and factors, float (N, 4), of ColorJitter."""
    order = _uniform(generator, 0, 1, count, 4).argsort(1)
    reach = torch.tensor([brightness, contrast, saturation, hue], device=generator.device)
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0], device=generator.device)
    return order, middle + reach * _uniform(generator, -1, 1, count, 4)


def random_jitter(images, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1):
    """torchvision's ColorJitter(brightness, contrast, saturation, hue), for strengths up to 1 (hue: 0.5)."""
    order, factors = draw_jitter(len(images), generator, brightness, contrast, saturation, hue)
    return jitter(images, order.cpu(), factors.cpu())


@functools.cache
def _policy(height, width):
    """The 25 sub-policies for CIFAR-10: of both halves the place in OPERATIONS, the probability, the magnitude
    and whether it has a sign, each (25, 2)."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    names, rows = list(OPERATIONS), []
    for sub_policy in AutoAugment(AutoAugmentPolicy.CIFAR10).policies:
        for name, probability, level in sub_policy:
            _, magnitudes, signed = OPERATIONS[name]
            magnitude = 0.0 if level is None else magnitudes(height, width)[level].item()
            rows.append((names.index(name), probability, magnitude, signed))
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 2, 4)
    return table[..., 0].long(), table[..., 1], table[..., 2].float(), table[..., 3].bool()


def draw_autoaugment(count, height, width, generator):
    """Operations, int64 (N, 2), -1 where one is not applied, and magnitudes, float (N, 2)."""
    operations, probabilities, magnitudes, signed = (t.to(generator.device) for t in _policy(height, width))
    chosen = (_uniform(generator, 0, 1, count) * len(operations)).long().clamp_(max=len(operations) - 1)
    applied = _uniform(generator, 0, 1, count, 2) <= probabilities[chosen]
    negative = (_uniform(generator, 0, 1, count, 2) < 0.5) & signed[chosen]
    operation = torch.where(applied, operations[chosen], -1)
    return operation, torch.where(negative, -magnitudes[chosen], magnitudes[chosen])


def random_autoaugment(images, generator):
    """torchvision's AutoAugment(AutoAugmentPolicy.CIFAR10), with its nearest pixels and black outside."""
    operations, magnitudes = draw_autoaugment(len(images), *images.shape[2:], generator)
    return autoaugment(images, operations.cpu(), magnitudes.cpu())


# By name

AUGMENTATIONS = {
    "flip": random_flip,
    "rotation": random_rotation,
    "crop": random_crop,
    "jitter": random_jitter,
    "autoaugment": random_autoaugment,
    "cutout": random_cutout,
    "translate": random_translation,
}
NAMES = ("none", *AUGMENTATIONS, "hybrid")


def parse(name, mean=(0.0, 0.0, 0.0)):
    """What a name out of NAMES, or several joined by +, does to an epoch: a list of streams.

    A stream is a list of functions (images, generator) -> images, applied in turn; every image goes once an
    epoch through each stream. mean: the data's mean colour, in [0, 1], with which cutout fills. Raises
    ValueError for an unknown name.
    """
    if name == "none":
        return [[]]
    if name == "hybrid":
        # Each image twice. The authors cut out before normalising: black, and on every image
        basic = [random_flip, random_rotation, random_crop]
        return [basic, [*basic, functools.partial(random_cutout, p=1.0)]]
    unknown = [part for part in name.split("+") if part not in AUGMENTATIONS]
    if unknown:
        known = f"{', '.join(NAMES)}, or join several of {', '.join(AUGMENTATIONS)} with +"
        raise ValueError(f"unknown augmentation {unknown[0]!r}: choose from {known}")
    fill = tuple(round(255 * value) for value in mean)
    return [
        [
            functools.partial(random_cutout, fill=fill) if part == "cutout" else AUGMENTATIONS[part]
            for part in name.split("+")
        ]
    ]


# Pictures: what each augmentation does to one image


def draw(image, rows, columns, path, generator, mean):
    """Save a sheet with a row for each name in rows, the image and `columns` draws, there and as SVG beside it.
    image: uint8 (3, H, W)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * (columns + 1), 1.45 * len(rows)), layout="constrained")
    for line, (name, axes) in enumerate(
        zip(rows, figure.subplots(len(rows), columns + 1, squeeze=False), strict=True)
    ):
        drawn = image.expand(columns, -1, -1, -1)
        for function in parse(name, mean)[-1]:
            drawn = function(drawn, generator)
        for column, (ax, pixels) in enumerate(zip(axes, [image, *drawn], strict=True)):
            ax.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if column == 0:
                ax.set_ylabel(name, fontsize=11)
            if line == 0:
                ax.set_title("original" if column == 0 else f"draw {column}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    print(path)


def main():
    from pathlib import Path

    import data  # only for this script's own pictures: the rest of the file stands alone

    parser = data.runs.new_parser(__doc__)
    data.add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("figures/augmentation.png"), help="(default: %(default)s)"
    )
    parser.add_argument("--index", type=int, default=0, help="which image of the train split (default: 0)")
    parser.add_argument("--seed", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError("pictures need matplotlib: pip install matplotlib") from None
    dataset = data.load(args.data, args.root, args.fraction, args.classes)
    if not 0 <= args.index < len(dataset.train.images):
        raise ValueError(
            f"--index {args.index}: {dataset.name} has images 0 to {len(dataset.train.images) - 1}"
        )
    image, generator = dataset.train.images[args.index], torch.Generator().manual_seed(args.seed)
    draw(image, ["cutout", "autoaugment", "jitter"], 3, args.out, generator, dataset.mean)  # as on the slides
    every = args.out.with_stem(args.out.stem + "-all")
    draw(image, [name for name in NAMES if name != "none"], 8, every, generator, dataset.mean)


if __name__ == "__main__":
    from runs import command_line

    command_line(main)
