import torch

import augment


def test_flip():
    images = torch.randint(0, 256, (64, 3, 5, 7), dtype=torch.uint8)
    flipped = augment.random_flip(images, torch.Generator().manual_seed(1))
    same, mirrored = (flipped == images).flatten(1).all(1), (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 16 < mirrored.sum() < 48
