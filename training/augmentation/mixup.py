"""Training on two photos at once: mixup and cutmix, with targets mixed in the same proportion."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config.sections import AugmentConfig
from training.utils.device import upload

_STREAM = 1  # other random numbers than `training.augmentation.transforms` draws from the same seed


def mix(
    config: AugmentConfig, images: Tensor, labels: Tensor, classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix every photo of a batch with another of the same batch.

    mixup (Zhang et al., 2018, "mixup: Beyond Empirical Risk Minimization") blends whole photos;
    cutmix (Yun et al., 2019) puts a rectangle of the other photo into the first. Where both are on,
    each batch has one of them by the toss of a coin. The share of the first photo comes from
    Beta(alpha, alpha), one draw a batch; cutmix takes it as it is after the rectangle was cut off
    at the edges and rounded to whole pixels.

    Args:
        config: `mixup` and `cutmix`, each its alpha; 0 is off.
        images: float [N, 3, H, W].
        labels: int64 [N], below `classes`.
        classes: How many there are.
        seed, step: All that the randomness depends on, beside the shape of the batch.

    Returns:
        images: like the ones given, which stay as they are.
        targets: float32 [N, classes], each row sums to 1.
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
    """Top, bottom, left and right of a share of the picture about (x, y), cut off at the edges."""
    half = math.sqrt(area) / 2
    top, bottom = (round((y + side) * height) for side in (-half, half))
    left, right = (round((x + side) * width) for side in (-half, half))
    return max(top, 0), min(bottom, height), max(left, 0), min(right, width)
