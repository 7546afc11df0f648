"""The best checkpoint of a run: highest validation accuracy, the lower loss between equals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from serving.preprocess import Preprocess
from serving.views import softmax
from training import checkpoint, evaluate, pixels
from training.checkpoint import BEST, CheckpointInfo
from training.model import Classifier
from training.trainer import Epoch

Say = Callable[[str], None]
Rank = tuple[float, float]


def rank(row: Epoch) -> Rank:
    """What the best epoch has most of."""
    return row.accuracy, -row.valid_loss


def save(
    folder: Path, row: Epoch, classifier: Classifier, info: CheckpointInfo, preprocess: Preprocess
) -> None:
    """Keep an epoch's weights as the best so far."""
    metrics = {
        "accuracy": row.accuracy,
        "loss": row.valid_loss,
        "stage": row.stage,
        "epoch": row.epoch,
    }
    checkpoint.save(
        folder / BEST, classifier, replace(info, metrics=metrics, preprocess=preprocess)
    )


def finish(folder: Path, photos: pixels.Photos) -> evaluate.Result:
    """Score the best checkpoint in float32, as `fledge evaluate` does, and write that down."""
    classifier, info = checkpoint.load(folder)
    _, valid = photos.at(info.preprocess)
    logits = evaluate.logits_of(classifier, valid.pixels, info.preprocess)
    accuracy, loss = evaluate.score(softmax(logits.numpy()), valid.labels.numpy())
    metrics = {**info.metrics, "accuracy": accuracy, "loss": loss}
    checkpoint.save(folder / BEST, classifier, replace(info, metrics=metrics))
    return evaluate.Result(accuracy, loss, len(valid), 1)
