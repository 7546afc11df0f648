"""How good a checkpoint is: float32, the service's own pixels, with and without TTA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving import images
from serving.errors import DataError, ImageError
from serving.preprocess import Preprocess
from serving.progress import progress_bar
from serving.views import VIEWS, average, count, render, softmax
from training import checkpoint, data
from training.model import Classifier, normalise

BATCH = 32


@dataclass(frozen=True)
class Result:
    """accuracy: fraction of 1; loss: mean cross-entropy in nats; photos and views counted."""

    accuracy: float
    loss: float
    photos: int
    views: int
    broken: int = 0


@torch.inference_mode()
def logits_of(classifier: Classifier, pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Float32 logits [N, classes] of pixels uint8 [N, H, W, 3], in eval mode."""
    was_training = classifier.training
    classifier.eval()
    try:
        device = next(classifier.parameters()).device
        logits = [
            classifier(normalise(part.to(device), preprocess)).float().cpu()
            for part in pixels.split(BATCH)
        ]
        return torch.cat(logits)
    finally:
        classifier.train(was_training)


def score(
    probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Accuracy and cross-entropy of probabilities [N, classes]."""
    right = probabilities.argmax(axis=1) == labels
    true = probabilities[np.arange(len(labels)), labels]
    return float(right.mean()), float(-np.log(np.maximum(true, 1e-12)).mean())


def evaluate(
    run: Path,
    *,
    part: str = "valid",
    tta: int = 0,
    data_folder: Path | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Score a run's checkpoint on its own validation (or test) photos.

    Args:
        run: Run folder or checkpoint.
        part: "valid", "test" or "train".
        tta: Views to average, as the service does it.
        data_folder: Where the photos are now, if they have moved.
        say: Takes a line about every photo that can't be read.
    """
    classifier, info = checkpoint.load(run)
    dataset = data.of_run(run, data_folder, part)
    samples: Sequence[data.Sample] = getattr(dataset, part)
    if not samples:
        raise DataError(f"{run} has no {part} photos")
    views = VIEWS[: count(tta, VIEWS)]
    pixels, labels, broken = [], [], 0
    with progress_bar() as bar:
        for path, label in bar.track(samples, description="decoding"):
            try:
                image = images.read(path, background=info.preprocess.background).image
            except ImageError as error:
                say(f"skipped {path}: {error}")
                broken += 1
                continue
            pixels.append(render(image, info.preprocess, views))
            labels.append(label)
    if not pixels:
        raise DataError(f"none of the {len(samples)} {part} photos of {run} can be read")
    stacked = torch.from_numpy(np.stack(pixels))  # [N, V, H, W, 3]
    # View by view, so that the plain view meets the same batches as with tta = 0.
    by_view = [
        softmax(logits_of(classifier, stacked[:, v].contiguous(), info.preprocess).numpy())
        for v in range(len(views))
    ]
    averaged = np.stack([average(rows) for rows in np.stack(by_view, axis=1)])
    accuracy, loss = score(averaged, np.array(labels))
    return Result(accuracy, loss, len(labels), len(views), broken)
