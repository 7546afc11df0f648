"""Test-time augmentation (TTA) in evaluation: make views of a photo and average their predictions.

A view is one crop, flip or random augmentation of a photo. The plain view is the photo as the
service sees it without TTA.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import Tensor

from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import VIEWS, Probabilities, View, average, views_for
from training.augmentation import transforms
from training.config.sections import AugmentConfig, TtaConfig

FIXED: Final = {
    "flip": (View("plain"), View("flip", flip=True)),
    # Krizhevsky et al., 2012, section 4.1, without the mirror images.
    "five_crop": (
        View("plain"),
        View("top-left", x=0.0, y=0.0),
        View("top-right", x=1.0, y=0.0),
        View("bottom-left", x=0.0, y=1.0),
        View("bottom-right", x=1.0, y=1.0),
    ),
    # Simonyan & Zisserman, 2015, section 3.2: one picture at several scales.
    "multi_scale": (
        View("plain"),
        View("wide", zoom=0.9),
        View("close", zoom=1.15),
        View("closer", zoom=1.3),
    ),
}
"""Kind -> its views, for the kinds with a fixed number of views; the first is the plain view."""


def fixed_views(config: TtaConfig | None, preprocess: Preprocess) -> tuple[View, ...]:
    """Return the deterministic views, with the unaugmented view first.

    If TTA is off or uses random augmentations, only the unaugmented view is returned.
    """
    if config is None or config.count == 0 or config.kind == "draws":
        return VIEWS[:1]
    if config.kind != "views":
        return views_for(preprocess, FIXED[config.kind])
    return views_for(preprocess)[: config.count]


def random_views(config: TtaConfig | None) -> int:
    """Return the number of random augmentations of each photo; 0 if none are used."""
    return config.count if config is not None and config.kind == "draws" else 0


def draw(
    pixels: Tensor,
    aspect: Tensor,
    config: AugmentConfig,
    *,
    seed: int,
    view: int,
    crop: float,
    size: int,
) -> Tensor:
    """Augment every photo at random, as in training: float32 [N, size, size, 3] in 0..255.

    Random erasing is switched off: it regularises training, but here it would only hide the
    subject.

    Args:
        pixels: Photos resized to squares, uint8 [N, S, S, 3].
        aspect: Width divided by height of each photo, float32 [N].
        config: The training augmentation.
        seed: Seed of the random augmentation.
        view: Number of the augmentation; equal seeds and numbers give equal pixels.
        crop: `Preprocess.kept_share`.
        size: Side of the result in pixels.
    """
    config = config.model_copy(update={"erase": 0.0})
    drawn = transforms.draw(config, aspect, seed, view, crop=crop)
    return transforms.apply(pixels, drawn, config, size)


def combine(probabilities: Probabilities, how: str, plain_weight: float = 0.0) -> Probabilities:
    """Average probabilities over views: [V, N, classes] -> [N, classes], with rows that sum to 1.

    Args:
        probabilities: Probabilities of each view, with the unaugmented view first.
        how: "mean" averages probabilities, "log_mean" averages their logarithms.
        plain_weight: Weight of the unaugmented view, in [0, 1]; the other views share the rest
            equally. 0 gives all views the same weight.
    """
    if len(probabilities) == 1:
        return np.asarray(probabilities[0])
    by_photo = probabilities.swapaxes(0, 1)
    if plain_weight == 0:
        return np.stack([average(rows, how) for rows in by_photo])
    plain = probabilities[0]
    others = np.stack([average(rows[1:], how) for rows in by_photo])
    if how == "mean":
        return np.asarray(plain_weight * plain + (1 - plain_weight) * others)
    logs = plain_weight * np.log(np.maximum(plain, 1e-12))
    logs = logs + (1 - plain_weight) * np.log(np.maximum(others, 1e-12))
    powers = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
