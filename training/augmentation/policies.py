"""Ready-made sequences of strong changes, torchvision's, with randomness of their own.

RandAugment: a few random operations of one strength (Cubuk et al., 2020). TrivialAugment: one
operation of random strength (Müller & Hutter, 2021), in its wide variant.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from training.config.sections import AugmentConfig


def run(images: Tensor, seeds: Tensor, config: AugmentConfig, *, fill: tuple[int, ...]) -> Tensor:
    """Change each image by its own seed, in place; the global random state stays as it was.

    Args:
        images: float32 [N, 3, H, W] in 0..255; rounded, as the operations work on whole numbers.
        seeds: int64 [N].
        config: `policy`, which is not "none", `policy_ops` and `policy_magnitude`.
        fill: Colour of what comes in from outside the picture, RGB.

    Returns:
        float32 [N, 3, H, W], whole numbers.
    """
    policy = _policy(config, fill)
    pixels = images.round().to(torch.uint8)
    # torchvision draws from the CPU's global generator, wherever the images are.
    with torch.random.fork_rng(devices=[]):
        for row, seed in enumerate(seeds.tolist()):
            torch.default_generator.manual_seed(seed)
            images[row] = _run(policy, pixels[row])
    return images


def _run(policy: Callable[..., Tensor], image: Tensor) -> Tensor:
    """uint8 [3, H, W] -> the same; on the CPU by Pillow, which is the faster there."""
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
