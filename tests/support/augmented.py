"""Small photos and their augmentation, for the tests of `training.augmentation`."""

import torch
import torch.nn.functional as F

from training.augmentation import transforms
from training.config.sections import AugmentConfig

COLOUR = torch.tensor([[1.0, 0, 1, 1, 0]])  # changes nothing


def plain(**changes):
    return AugmentConfig(preset="none", **changes)


def squares(n=3, side=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator)


def smooth(n=3, side=32):
    """Photos without detail, so resampling changes little: float32 [n, 3, side, side]."""
    return F.interpolate(
        squares(n, 4).permute(0, 3, 1, 2).float(), size=side, mode="bicubic"
    ).clamp(0, 255)


def channels_last(images):
    return images.round().to(torch.uint8).permute(0, 2, 3, 1)


def run(config, pixels, size=None, *, aspect=1.0, seed=0, view=0):
    params = transforms.draw(config, torch.full((len(pixels),), aspect), seed, view)
    return transforms.apply(pixels, params, config, size or pixels.shape[1])
