"""Augmentation policies of torchvision, seeded per image: RandAugment and TrivialAugment.

RandAugment applies a few random operations of one magnitude (Cubuk et al., 2020). TrivialAugment,
here in its wide variant, applies one operation of random magnitude (Müller & Hutter, 2021).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from training.config.sections import AugmentConfig


def apply_policy(
    images: Tensor, seeds: Tensor, config: AugmentConfig, *, fill: tuple[int, ...]
) -> Tensor:
    """Apply the policy to each image with its own seed, in place.

    Restores the global random state.

    Args:
        images: float32 [N, 3, H, W] in 0..255; rounded to integers for the operations.
        seeds: int64 [N].
        config: `policy` (not "none"), `policy_ops` and `policy_magnitude`.
        fill: RGB colour of pixels from outside the picture.

    Returns:
        `images`, with integer values.
    """
    policy = _policy(config, fill)
    pixels = images.round().to(torch.uint8)
    # torchvision draws from the global CPU generator, also for images on a GPU.
    with torch.random.fork_rng(devices=[]):
        for row, seed in enumerate(seeds.tolist()):
            torch.default_generator.manual_seed(seed)
            images[row] = _apply_to_image(policy, pixels[row])
    return images


def _apply_to_image(policy: Callable[..., Tensor], image: Tensor) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, H, W]; on the CPU with Pillow, which is faster there."""
    if image.device.type != "cpu":
        return policy(image)
    changed = policy(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def _policy(config: AugmentConfig, fill: tuple[int, ...]) -> Callable[..., Tensor]:
    how = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": list(fill)}
    policy: Callable[..., Tensor] = (
        v2.RandAugment(config.policy_ops, config.policy_magnitude, **how)
        if config.policy == "rand_augment"
        else v2.TrivialAugmentWide(**how)
    )
    return policy
