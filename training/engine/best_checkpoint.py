"""The best checkpoint of a run: highest validation accuracy, then lowest validation loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serving.imaging.preprocess import Preprocess
from training.config.sections import TtaConfig
from training.data.dataset import Dataset
from training.evaluation import evaluate
from training.models.classifier import Classifier
from training.run import checkpoint
from training.run.checkpoint import BEST, CheckpointInfo
from training.run.history import Epoch
from training.utils.console import Log

Rank = tuple[float, float]


def rank(row: Epoch) -> Rank:
    """Sort key of an epoch; the best epoch has the largest key."""
    return row.accuracy, -row.valid_loss


def save(
    folder: Path, row: Epoch, classifier: Classifier, info: CheckpointInfo, preprocess: Preprocess
) -> None:
    """Write the weights of an epoch as the run's best checkpoint."""
    metrics = {
        "accuracy": row.accuracy,
        "loss": row.valid_loss,
        "stage": row.stage,
        "epoch": row.epoch,
    }
    checkpoint.save(
        folder / BEST, classifier, replace(info, metrics=metrics, preprocess=preprocess)
    )


def evaluate_best(
    folder: Path, dataset: Dataset, tta: TtaConfig, log: Log, device: str = "auto"
) -> evaluate.EvaluationResult:
    """Evaluate the best checkpoint in float32, as `fledge evaluate` does; update its metrics."""
    result = evaluate.evaluate(
        folder,
        tta=tta if tta.count else None,
        data_folder=dataset.root,
        device=device,
        log=log,
    )
    path = (folder / BEST).with_suffix(".json")
    info = checkpoint.read_info(path)
    accuracy, loss = evaluate.score(result.plain, result.labels)
    metrics = {**info.metrics, "accuracy": accuracy, "loss": loss}
    if result.views > 1:
        metrics |= {"accuracy_tta": result.accuracy, "loss_tta": result.loss, "views": result.views}
    # The photos of a resumed run may have moved.
    data = {**info.data, "root": str(dataset.root)}
    checkpoint.write_info(path, replace(info, metrics=metrics, data=data))
    return result
