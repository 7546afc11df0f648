"""Augmentation by mixup and cutmix: blend pairs of photos, and their labels in proportion."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config.sections import AugmentConfig
from training.utils.device import upload

_STREAM = 1  # selects another random stream than that of `training.augmentation.transforms`


def mix(
    config: AugmentConfig, images: Tensor, labels: Tensor, classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix every photo of a batch with another photo of the batch by mixup or cutmix.

    mixup (Zhang et al., 2018, "mixup: Beyond Empirical Risk Minimization") blends whole photos;
    cutmix (Yun et al., 2019) pastes a rectangle of the other photo. If both are switched on, each
    batch uses either of them with probability 0.5. The share of the first photo is drawn from
    Beta(alpha, alpha) once per batch. For cutmix, the share is then computed again from the area of
    the rectangle after clipping and rounding.

    Args:
        config: Augmentation options: `mixup` and `cutmix` are the alpha of each technique; 0: off.
        images: Photos, float [N, 3, H, W]; not modified.
        labels: Class indices, int64 [N].
        classes: Number of classes.
        seed, step: Seeds of the random numbers.

    Returns:
        images: Mixed photos, float [N, 3, H, W].
        targets: Class shares of each photo, float32 [N, classes]; every row sums to 1.
    """
    targets = F.one_hot(labels, classes).float()
    if not config.mixes:
        return images, targets
    rng = np.random.default_rng([seed, step, _STREAM])
    coin = rng.random()
    other = upload(torch.from_numpy(rng.permutation(len(images))), images.device)
    if config.mixup and (not config.cutmix or coin < 0.5):
        share = rng.beta(config.mixup, config.mixup)
        images = images * share + images[other] * (1 - share)
    else:
        height, width = images.shape[-2:]
        top, bottom, left, right = _rectangle(
            1 - rng.beta(config.cutmix, config.cutmix), height, width, *rng.random(2)
        )
        share = 1 - (bottom - top) * (right - left) / (height * width)
        images = images.clone()
        images[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    return images, targets * share + targets[other] * (1 - share)


def _rectangle(
    area: float, height: int, width: int, x: float, y: float
) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of a rectangle in pixels, clipped to the picture.

    Args:
        area: Area of the rectangle before clipping, as a share of the picture's area.
        height, width: Size of the picture in pixels.
        x, y: Centre of the rectangle as shares of width and height.
    """
    half = math.sqrt(area) / 2
    top, bottom = (round((y + side) * height) for side in (-half, half))
    left, right = (round((x + side) * width) for side in (-half, half))
    return max(top, 0), min(bottom, height), max(left, 0), min(right, width)
