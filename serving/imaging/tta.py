"""Test-time augmentation (TTA): render fixed views of an image and average the probabilities.

A view is one crop of the image, possibly mirrored. The first view, "plain", is always what
`Preprocess.fit` keeps: the centre crop, or the whole picture. The option `tta=N` takes the first N
views in the order of the bundle's manifest. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from serving.errors import OptionError
from serving.imaging.preprocess import Box, Pixels, Preprocess

Probabilities = npt.NDArray[np.float64]


class View(NamedTuple):
    """A TTA view: one crop of an image, possibly mirrored.

    Attributes:
        name: Name of the view in the manifest.
        zoom: Side of the plain view (`Preprocess.box`) divided by the side of this crop.
        x: Horizontal position of the crop: 0 left edge, 0.5 centre, 1 right edge.
        y: Vertical position of the crop: 0 top edge, 0.5 centre, 1 bottom edge.
        flip: Whether the crop is mirrored left to right.
    """

    name: str
    zoom: float = 1.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False


_CLOSE: Final = 1.15

VIEWS: Final = (
    View("plain"),
    View("flip", flip=True),
    View("wide", zoom=0.9),
    View("wide-flip", zoom=0.9, flip=True),
    View("close", zoom=_CLOSE),
    View("close-flip", zoom=_CLOSE, flip=True),
    View("top-left", x=0.0, y=0.0),
    View("bottom-right-flip", x=1.0, y=1.0, flip=True),
    View("top-right", x=1.0, y=0.0),
    View("bottom-left-flip", x=0.0, y=1.0, flip=True),
)


def count_views(tta: int, views: Sequence[View]) -> int:
    """Return the number of views to average for the option `tta`.

    Args:
        tta: Value of the option; 0 and 1 both mean the plain view only.
        views: All views of the bundle.

    Raises:
        OptionError: `tta` is negative or larger than the number of views.
    """
    if not 0 <= tta <= len(views):
        raise OptionError(f"tta = {tta}: this model has {len(views)} views; use 0 to {len(views)}")
    return max(1, tta)


def views_for(preprocess: Preprocess, views: Sequence[View] = VIEWS) -> tuple[View, ...]:
    """Return the views that are of use with a preprocessing.

    Where the plain view shows the whole picture, there is no wider one, and a corner must be close.
    """
    if preprocess.fit == "crop":
        return tuple(views)
    return tuple(
        view if view[2:4] == (0.5, 0.5) else view._replace(zoom=max(view.zoom, _CLOSE))
        for view in views
        if view.zoom >= 1
    )


def render(
    image: Image.Image, preprocess: Preprocess, views: Sequence[View], area: Box | None = None
) -> Pixels:
    """Cut the views of an upright RGB image: uint8 [V, size, size, 3].

    Args:
        image: The image.
        preprocess: Preprocessing of the model.
        views: The V views.
        area: The box of the image that the picture covers; None: all of it.
    """
    area = area or (0, 0, *image.size)
    return np.stack([_cut(image, preprocess, view, area) for view in views])


def average(probabilities: Probabilities, how: str = "mean") -> Probabilities:
    """Average the probabilities of an image over its views: [V, classes] -> [classes].

    Args:
        probabilities: Probabilities of the V views; every row sums to 1.
        how: "mean" for the arithmetic mean, "log_mean" for the renormalised geometric mean.

    Returns:
        Probabilities that sum to 1.

    Raises:
        OptionError: `how` is neither "mean" nor "log_mean".
    """
    if how == "mean":
        mean = probabilities.mean(axis=0)
    elif how == "log_mean":
        logs = np.log(np.maximum(probabilities, 1e-12)).mean(axis=0)
        mean = np.exp(logs - logs.max())
    else:
        raise OptionError(f"average = {how!r}: use mean or log_mean")
    return np.asarray(mean / mean.sum())


def softmax(logits: npt.NDArray[np.float32], temperature: float = 1.0) -> Probabilities:
    """Return the softmax of logits [N, classes] divided by `temperature`, in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    exps = np.exp(scaled)
    return np.asarray(exps / exps.sum(axis=-1, keepdims=True))


def energies(logits: npt.NDArray[np.float32]) -> Probabilities:
    """Return the energy of logits [..., classes]: -log sum exp, in float64.

    The energy is low for images like the training photos (Liu et al., 2020, "Energy-based
    Out-of-distribution Detection", at temperature 1).
    """
    most = logits.max(axis=-1).astype(np.float64)
    sums = np.exp(logits - most[..., None]).sum(axis=-1)
    return np.asarray(-most - np.log(sums))


def _cut(image: Image.Image, preprocess: Preprocess, view: View, area: Box) -> Pixels:
    pixels = preprocess.cut(image, preprocess.box(area, view.zoom, view.x, view.y), area)
    return pixels[:, ::-1] if view.flip else pixels
