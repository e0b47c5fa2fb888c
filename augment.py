"""Random augmentation of image batches, with separate parameters for every image, on any device.

torchvision's augmentations, a whole batch at a time. Needs only torch (AutoAugment reads its policy from
torchvision): copy this file into your own project.

    import torch, augment
    generator = torch.Generator().manual_seed(1)
    images = augment.random_rotation(images, generator)  # uint8 (N, 3, H, W) in and out
    (stream,) = augment.parse("flip+crop")  # by name: a list of such functions

Each augmentation has two halves: a pure function of images and per-image parameters (`rotate`), and a
wrapper that draws the parameters as torchvision does (`random_rotation`). Images are uint8 (N, 3, H, W) of
any size, contiguous or channels_last; results are new tensors of the same layout. Others raise TypeError.
Keep parameters and their generator on the CPU: results are then the same on every device, up to rounding,
and no device synchronization is needed. Parameters on another device work, but are copied to the CPU where
float64 (MPS has none) or sorting is needed: affine maps, jitter, autoaugment.
"""

import functools
import math

import torch
from torch.nn import functional as F

# Geometry


def flip(images, flipped):
    """Mirror left to right the images for which flipped, bool (N,), is true."""
    _check(images)
    return torch.where(_per_image(flipped, images), images.flip(-1), images)


def rotate(images, degrees):
    """Rotate counter-clockwise about the centre by degrees, float (N,); nearest pixel, black outside."""
    zero = torch.zeros_like(degrees)
    return _affine(images, _matrices(images, degrees, zero, zero, zero, zero))


def shear(images, x, y):
    """Shift each row left by x times its distance from the top, and each column up by y times its distance
    from the left, x and y float (N,); nearest pixel, black outside. torchvision's affine takes atan(x) in
    degrees."""
    zero = torch.zeros_like(x)
    return _affine(images, _matrices(images, zero, x, y, zero, zero))


def translate(images, x, y):
    """Move right by x and down by y, float (N,) in pixels; nearest pixel, black outside."""
    zero = torch.zeros_like(x)
    return _affine(images, _matrices(images, zero, zero, zero, x, y))


def _matrices(images, degrees, shear_x, shear_y, x, y):
    """Affine maps from a pixel to its source, in grid_sample's units: float32 (..., 6), computed in float64
    on the CPU, since MPS has none. Parameters are (...); only one kind may differ from 0."""
    _check(images)
    height, width = images.shape[2:]
    degrees, shear_x, shear_y, x, y = (p.cpu().double() for p in (degrees, shear_x, shear_y, x, y))
    turn = -torch.deg2rad(degrees)
    cos, sin = turn.cos(), turn.sin()
    x_row = (cos, sin + shear_x, shear_x * height / 2 - x)
    y_row = (shear_y - sin, cos, shear_y * width / 2 - y)
    return torch.stack([*x_row, *y_row], -1).float() / torch.tensor([width / 2] * 3 + [height / 2] * 3)


def _affine(images, matrices):
    """Sample each pixel at the source that matrices, float (N, 6), give; nearest pixel, black outside.

    The arithmetic follows torchvision's order of operations, which decides how half of all ties are rounded.
    """
    height, width = images.shape[2:]
    base = torch.ones(3, height, width, device=images.device)
    base[0] = torch.linspace(-width * 0.5 + 0.5, width * 0.5 - 0.5, width, device=images.device)
    base[1] = torch.linspace(-height * 0.5 + 0.5, height * 0.5 - 0.5, height, device=images.device)[:, None]
    base = base.flatten(1)

    def sample(images, matrices):
        grid = matrices.view(-1, 2, 3).bmm(base.expand(len(images), -1, -1))
        grid = grid.view(-1, 2, height, width).permute(0, 2, 3, 1)  # (N, H, W, 2)
        return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)

    return _in_blocks(sample, images, _upload(matrices, images.device))


def crop(images, top, left, height, width):
    """Crop a box from each image and resize it to the image size; bilinear. top..width: float (N,), whole
    pixels."""
    _check(images)
    boxes = _upload(torch.stack([top, left, height, width]).float(), images.device)
    top, left, height, width = boxes
    across, down = _stretch(left, width, images.shape[3]), _stretch(top, height, images.shape[2])

    def sample(images, across, down):
        grid = torch.empty(len(images), 2, *images.shape[2:], device=images.device)
        grid[:, 0], grid[:, 1] = across[:, None], down[:, :, None]
        pixels = F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)
        return pixels.add_(0.5)

    return _in_blocks(sample, images, across, down)


def _stretch(start, length, size):
    """The source of each pixel when [start, start + length) is stretched over an axis of `size`: float
    (N, size) in grid_sample's units, from -1 to 1. No pixel outside the interval contributes."""
    centres = torch.arange(size, device=start.device) + 0.5
    start, length = start[:, None], length[:, None]
    source = (centres * (length / size)).clamp(min=0.5).minimum(length - 0.5) + start
    return source * (2 / size) - 1


def erase(images, top, left, height, width, fill):
    """Fill one rectangle of each image. top..width: float (N,), whole pixels; height = 0 leaves an image
    unchanged; fill: uint8 (3,)."""
    _check(images)
    boxes = _upload(torch.stack([top, left, height, width]).float(), images.device)
    top, left, height, width = boxes[:, :, None]  # each (N, 1)
    rows = torch.arange(images.shape[2], device=images.device)
    cols = torch.arange(images.shape[3], device=images.device)
    inside_rows = (rows >= top) & (rows < top + height)  # (N, H)
    inside_cols = (cols >= left) & (cols < left + width)  # (N, W)
    inside = inside_rows[:, None, :, None] & inside_cols[:, None, None, :]  # (N, 1, H, W)
    return torch.where(inside, _upload(fill, images.device).view(1, -1, 1, 1), images)


# Colour


def brightness(images, factor):
    """Scale by factor, float (N,): 0 is black, 1 leaves it unchanged."""
    _check(images)
    return _blend(images, 0, factor)


def contrast(images, factor):
    """Scale the difference from the mean of the grey image by factor, float (N,): 0 is uniform grey."""
    _check(images)
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), factor)


def saturation(images, factor):
    """Scale the difference from the grey image by factor, float (N,): 0 is grey."""
    _check(images)
    return _blend(images, _grey(images), factor)


def sharpness(images, factor):
    """Scale the difference from a smoothed copy (3x3 kernel) by factor, float (N,): 0 is smooth. The border
    is unchanged."""
    _check(images)
    if min(images.shape[2:]) <= 2:
        return images.clone()
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(smooth, kernel / 13, groups=3).round_()
    return _blend(images, smooth, factor)


def _blend(images, other, factor):
    """other + factor * (images - other), as uint8."""
    factor = _per_image(factor.float(), images)
    return (images * factor).add_(other * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def _grey(images):
    """Luma, rounded down, float (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114).floor_()[:, None]


def hue(images, shift):
    """Shift the hue in HSV (Smith, 1978) by shift, float (N,), a fraction of the colour circle."""
    _check(images)
    red, green, blue = images.float().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Sixths of the circle: 0 is red, 2 green, 4 blue. Masks use arithmetic, since comparisons and `where`
    # take several times as long on a CPU. Values are integers: only the largest is less than 1 below value.
    not_red = (value - red).clamp_(max=1)
    is_green = (1 - (value - green).clamp_(max=1)).mul_(not_red)
    is_blue = not_red - is_green
    sixths = (green - blue).mul_(1 - not_red)
    sixths = sixths.add_((blue - red).mul_(is_green)).add_((red - green).mul_(is_blue))
    sixths = sixths.div_(chroma.clamp(min=1)) + 2 * is_green + 4 * is_blue
    sixths = sixths.add_(6 * _per_image(shift.float(), images)[:, 0])
    out = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        k = sixths + offset
        k -= 6 * (k / 6).floor_()
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        out[:, channel] = (value - chroma * k).mul_(255.999 / 255)  # as torchvision converts to bytes
    return out


def jitter(images, order, factors):
    """Change brightness, contrast, saturation and hue of each image by factors, float (N, 4), in that image's
    own order, a permutation of these four, int64 (N, 4)."""
    _check(images)
    order, factors = order.cpu(), factors.cpu().float()
    return _in_rounds(images, order, factors.gather(1, order), (brightness, contrast, saturation, hue))


# The remaining operations of AutoAugment


def posterize(images, bits):
    """Keep only the upper bits of every value; bits: how many, (N,) in 0..8."""
    _check(images)
    mask = 256 - 2 ** (8 - _per_image(bits.int(), images))
    return images & mask.to(torch.uint8)


def solarize(images, threshold):
    """Invert the values at or above threshold (N,)."""
    _check(images)
    return torch.where(images >= _per_image(threshold, images), 255 - images, images)


def invert(images):
    """255 minus every value."""
    _check(images)
    return 255 - images


def autocontrast(images):
    """Stretch each channel of each image to 0..255."""
    _check(images)
    low, high = (bound((2, 3), keepdim=True).float() for bound in (images.amin, images.amax))
    flat = low == high
    scale = 255 / (high - low).masked_fill_(flat, 255)
    return (images - low.masked_fill_(flat, 0)).mul_(scale).clamp_(0, 255).to(torch.uint8)


def equalize(images):
    """Flatten the histogram of each channel of each image."""
    _check(images)
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


# The operations of AutoAugment, Cubuk et al., 2019, arXiv:1805.09501, with torchvision's magnitudes. name:
# (function of images i and parameters p (n, 6), the ten magnitudes for height and width, whether the sign is
# random). The first five are affine and form one group: p holds matrices. Otherwise p[:, 0] is the magnitude.
AFFINE = 5
OPERATIONS = {
    "ShearX": (_affine, lambda h, w: torch.linspace(0, 0.3, 10), True),
    "ShearY": (_affine, lambda h, w: torch.linspace(0, 0.3, 10), True),
    "TranslateX": (_affine, lambda h, w: torch.linspace(0, 150 / 331 * w, 10), True),
    "TranslateY": (_affine, lambda h, w: torch.linspace(0, 150 / 331 * h, 10), True),
    "Rotate": (_affine, lambda h, w: torch.linspace(0, 30, 10), True),
    "Brightness": (lambda i, p: brightness(i, 1 + p[:, 0]), lambda h, w: torch.linspace(0, 0.9, 10), True),
    "Color": (lambda i, p: saturation(i, 1 + p[:, 0]), lambda h, w: torch.linspace(0, 0.9, 10), True),
    "Contrast": (lambda i, p: contrast(i, 1 + p[:, 0]), lambda h, w: torch.linspace(0, 0.9, 10), True),
    "Sharpness": (lambda i, p: sharpness(i, 1 + p[:, 0]), lambda h, w: torch.linspace(0, 0.9, 10), True),
    "Posterize": (lambda i, p: posterize(i, p[:, 0]), lambda h, w: torch.linspace(8, 4, 10).round(), False),
    "Solarize": (lambda i, p: solarize(i, p[:, 0]), lambda h, w: torch.linspace(255, 0, 10), False),
    "AutoContrast": (lambda i, p: autocontrast(i), lambda h, w: torch.zeros(10), False),
    "Equalize": (lambda i, p: equalize(i), lambda h, w: torch.zeros(10), False),
    "Invert": (lambda i, p: invert(i), lambda h, w: torch.zeros(10), False),
}


def autoaugment(images, operations, magnitudes):
    """Apply two operations in sequence. operations: int64 (N, 2), indices into OPERATIONS, -1 for none;
    magnitudes: float (N, 2), signed."""
    operations, magnitudes = operations.cpu(), magnitudes.cpu()
    shear_x, shear_y, x, y, degrees = (magnitudes * (operations == number) for number in range(AFFINE))
    parameters = _matrices(images, degrees, shear_x, shear_y, x.trunc(), y.trunc())  # (N, 2, 6)
    parameters[..., 0] = torch.where(operations < AFFINE, parameters[..., 0], magnitudes)
    functions = [_affine, *(function for function, *_ in list(OPERATIONS.values())[AFFINE:])]
    groups = torch.where(operations < 0, -1, (operations - AFFINE + 1).clamp(min=0))  # indices into functions
    return _in_rounds(images, groups, parameters, functions)


def _in_rounds(images, operations, parameters, functions):
    """Pass each image through one of functions in each of R rounds. operations: int64 (N, R), indices into
    functions, -1 for none; parameters: float (N, R, ...), for that function; both on the CPU. Each round
    sorts the images by operation: writing groups to scattered rows takes ten times as long on a CPU."""
    counts = [torch.bincount(column + 1, minlength=len(functions) + 1).tolist() for column in operations.T]
    order = operations.argsort(0)  # (N, R), per round: the images sorted by operation
    position = order.argsort(0)  # (N, R), per round: each image's position in that order
    between = position[:, :-1].gather(0, order[:, 1:])  # from each round's order to the next
    moves = _upload(torch.cat([order[:, :1], between, position[:, -1:]], 1), images.device)  # (N, R + 1)
    parameters = _upload(parameters[order, torch.arange(order.shape[1])], images.device)
    pixels = images.contiguous()
    for number, count in enumerate(counts):
        pixels = pixels.index_select(0, moves[:, number])
        _, *groups = pixels.split(count)
        _, *group_parameters = parameters[:, number].split(count)
        for function, group, parameter in zip(functions, groups, group_parameters, strict=True):
            group.copy_(function(group, parameter))
    return torch.empty_like(images).copy_(pixels.index_select(0, moves[:, -1]))


def _check(images):
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise TypeError(f"images must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")


def _upload(parameters, device):
    """parameters on device, without device synchronization: CUDA needs pinned memory for that."""
    if device.type == "cuda" and parameters.device.type == "cpu":
        return parameters.contiguous().pin_memory().to(device, non_blocking=True)
    return parameters.to(device)


def _per_image(parameter, images):
    """A parameter (N,), moved to the images' device as (N, 1, 1, 1)."""
    return _upload(parameter, images.device).view(-1, 1, 1, 1)


def _in_blocks(function, images, *parameters):
    """function(images, *parameters) as uint8; on a CPU in blocks that fit its cache, which halves the time of
    a crop or rotation and saves 2 % of an epoch of the custom network on hybrid."""
    size = 128 if images.device.type == "cpu" else max(len(images), 1)
    out = torch.empty_like(images)
    for block, *given in zip(*(tensor.split(size) for tensor in (out, images, *parameters)), strict=True):
        block.copy_(function(*given))
    return out


# Random parameters


def _uniform(generator, low, high, *shape):
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _randint(generator, high):
    """Random integers in [0, high), as floats, each with its own bound. high: float (N,)."""
    return (_uniform(generator, 0, 1, len(high)) * high).floor().minimum(high - 1)


def random_flip(images, generator, p=0.5):
    """torchvision's RandomHorizontalFlip(p)."""
    return flip(images, _uniform(generator, 0, 1, len(images)) < p)


def random_rotation(images, generator, degrees=15):
    """torchvision's RandomRotation(degrees)."""
    return rotate(images, _uniform(generator, -degrees, degrees, len(images)))


def random_translation(images, generator, most=4):
    """torchvision's RandomCrop(size, padding=most), where size is the image size: moved by up to `most` whole
    pixels in each direction, black outside."""
    x, y = _uniform(generator, 0, 2 * most + 1, 2, len(images)).floor() - most
    return translate(images, x, y)


def draw_crop(count, height, width, generator, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Boxes of RandomResizedCrop, (top, left, height, width), each float (N,): the first of ten tries that
    fits, else the largest centred box with an allowed ratio."""
    area, aspect = _draw_shapes(generator, height * width, scale, ratio, count, tries)
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    box_height, box_width, found = _first(fits, heights, widths)
    middle_height, middle_width = round(min(height, width / ratio[0])), round(min(width, height * ratio[1]))
    box_height = torch.where(found, box_height, middle_height)
    box_width = torch.where(found, box_width, middle_width)
    top = _randint(generator, height - box_height + 1)
    left = _randint(generator, width - box_width + 1)
    top = torch.where(found, top, (height - middle_height) // 2)
    left = torch.where(found, left, (width - middle_width) // 2)
    return top, left, box_height, box_width


def _draw_shapes(generator, whole, scale, ratio, *shape):
    """Areas, with scale as the range of fractions of the whole, and log-uniform aspect ratios in ratio."""
    area = whole * _uniform(generator, *scale, *shape)
    return area, _uniform(generator, math.log(ratio[0]), math.log(ratio[1]), *shape).exp()


def _first(fits, *values):
    """For each of values, (N, tries), the first that fits, and whether one does, each (N,)."""
    first = fits.int().argmax(1, keepdim=True)
    return *(value.gather(1, first)[:, 0] for value in values), fits.any(1)


def random_crop(images, generator, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop(size, scale, ratio), where size is the image size."""
    _check(images)
    return crop(images, *draw_crop(len(images), *images.shape[2:], generator, scale, ratio))


def draw_cutout(count, height, width, generator, p=0.5, scale=(0.02, 0.2), ratio=(0.3, 3.3), tries=10):
    """Boxes of RandomErasing, (top, left, height, width), each float (N,): the first of ten tries that is
    smaller than the image; height 0 if there is none, and with probability 1 - p."""
    area, aspect = _draw_shapes(generator, height * width, scale, ratio, count, tries)
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    box_height, box_width, found = _first((heights < height) & (widths < width), heights, widths)
    found &= _uniform(generator, 0, 1, count) < p
    top = _randint(generator, (height - box_height + 1).clamp(min=1))
    left = _randint(generator, (width - box_width + 1).clamp(min=1))
    return top, left, box_height * found, box_width


def random_cutout(images, generator, p=0.5, scale=(0.02, 0.2), ratio=(0.3, 3.3), fill=(0, 0, 0)):
    """torchvision's RandomErasing(p, scale, ratio), filled with one colour: three values in 0..255. With
    the data's mean colour it equals RandomErasing(value=0) after normalisation. Cutout: DeVries and Taylor,
    2017, arXiv:1708.04552."""
    _check(images)
    boxes = draw_cutout(len(images), *images.shape[2:], generator, p, scale, ratio)
    # torch.tensor(fill, device=...) would synchronize with the device
    colour = [torch.full((), value, dtype=torch.uint8, device=images.device) for value in fill]
    return erase(images, *boxes, torch.stack(colour))


def draw_jitter(count, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1):
    """Order, int64 (N, 4), and factors, float (N, 4), of ColorJitter."""
    order = _uniform(generator, 0, 1, count, 4).argsort(1)
    reach = torch.tensor([brightness, contrast, saturation, hue], device=generator.device)
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0], device=generator.device)
    return order, middle + reach * _uniform(generator, -1, 1, count, 4)


def random_jitter(images, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1):
    """torchvision's ColorJitter(brightness, contrast, saturation, hue), for strengths up to 1 (hue: 0.5)."""
    return jitter(images, *draw_jitter(len(images), generator, brightness, contrast, saturation, hue))


@functools.cache
def _policy(height, width):
    """The 25 sub-policies for CIFAR-10: each operation's index into OPERATIONS, probability, magnitude, and
    whether its sign is random, each (25, 2), on the CPU."""
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
    """Operations, int64 (N, 2), -1 where none is applied, and magnitudes, float (N, 2), both on the CPU."""
    operations, probabilities, magnitudes, signed = _policy(height, width)
    chosen = (_uniform(generator, 0, 1, count).cpu() * len(operations)).long().clamp_(max=len(operations) - 1)
    applied = _uniform(generator, 0, 1, count, 2).cpu() <= probabilities[chosen]
    negative = (_uniform(generator, 0, 1, count, 2).cpu() < 0.5) & signed[chosen]
    operation = torch.where(applied, operations[chosen], -1)
    return operation, torch.where(negative, -magnitudes[chosen], magnitudes[chosen])


def random_autoaugment(images, generator):
    """torchvision's AutoAugment(AutoAugmentPolicy.CIFAR10): nearest pixel, black outside."""
    _check(images)
    return autoaugment(images, *draw_autoaugment(len(images), *images.shape[2:], generator))


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
    """The list of streams for a name in NAMES, or for several joined by +.

    A stream is a list of functions (images, generator) -> images, applied in turn; every image goes through
    each stream once per epoch. mean: the data's mean colour, in [0, 1], with which cutout fills. Raises
    ValueError for an unknown name, and for names that cannot be joined.
    """
    if name == "none":
        return [[]]
    if name == "hybrid":
        # Each image twice. The authors apply cutout before normalising: in black, and to every image
        basic = [random_flip, random_rotation, random_crop]
        return [basic, [*basic, functools.partial(random_cutout, p=1.0)]]
    parts = name.split("+")
    unknown = [part for part in parts if part and part not in NAMES]
    if unknown or len(set(parts) & AUGMENTATIONS.keys()) < len(parts):  # none, hybrid, a blank, a repetition
        wrong = f"unknown augmentation {unknown[0]!r}" if unknown else f"augmentation {name!r}"
        raise ValueError(
            f"{wrong}: choose none or hybrid, each alone, or different ones of "
            f"{', '.join(AUGMENTATIONS)}, joined by +"
        )
    fill = tuple(round(255 * value) for value in mean)
    functions = AUGMENTATIONS | {"cutout": functools.partial(random_cutout, fill=fill)}
    return [[functions[part] for part in parts]]
