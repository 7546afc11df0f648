"""RandAugment and TrivialAugment from torchvision, with a separate random seed for each image.

RandAugment (Cubuk et al., 2020) applies a few random operations of one fixed magnitude.
TrivialAugmentWide (Müller & Hutter, 2021) applies one operation of random magnitude.
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
    """Apply RandAugment or TrivialAugment to each image, in place.

    The state of torch's global random generator is the same before and after the call.

    Args:
        images: Images, float32 [N, 3, H, W] in 0..255; first rounded to integers.
        seeds: Random seed of each image, int64 [N].
        config: Augmentation options: `policy` (not "none"), `policy_ops` and `policy_magnitude`.
        fill: RGB colour of output pixels that come from outside the image, 0 to 255.

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
    """Apply the policy to an image, uint8 [3, H, W]. On a CPU, Pillow is used: it is faster."""
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
