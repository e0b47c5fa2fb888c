"""Random augmentation of whole batches, every image with parameters of its own, on any device.

Needs nothing but torch: copy this file into your own project.

    import torch, augment
    generator = torch.Generator().manual_seed(1)
    images = augment.random_flip(images, generator)  # uint8 (N, 3, H, W) in, the same out

Each augmentation has two halves: a pure function of images and per-image parameters (`flip`), and a
wrapper that draws these parameters (`random_flip`). The parameters are drawn on the generator's device:
a generator on the CPU gives the same augmentation whatever device the images are on.
"""

import torch


def flip(images, flipped):
    """Mirror left-right the images where flipped, bool (N,), is true. images: uint8 (N, C, H, W)."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)


def random_flip(images, generator, p=0.5):
    """torchvision's RandomHorizontalFlip(p), image by image."""
    flipped = torch.rand(len(images), generator=generator, device=generator.device) < p
    return flip(images, flipped.to(images.device))


AUGMENTATIONS = {"flip": random_flip}


def parse(name):
    """What a name such as `none`, `flip` or `a+b` does to an epoch: a list of streams.

    A stream is a list of functions (images, generator) -> images, applied in turn; every image goes once an
    epoch through each stream. Raises ValueError for an unknown name.
    """
    if name == "none":
        return [[]]
    unknown = [part for part in name.split("+") if part not in AUGMENTATIONS]
    if unknown:
        known = ", ".join(["none", *AUGMENTATIONS])
        raise ValueError(f"unknown augmentation {unknown[0]!r}: choose from {known}, or join several with +")
    return [[AUGMENTATIONS[part] for part in name.split("+")]]
