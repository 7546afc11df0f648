"""Choose, save and evaluate the best checkpoint of a run.

The best epoch has the highest validation accuracy. Among epochs with equal accuracy, the epoch with
the lowest validation loss is the best.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serving.imaging.preprocess import Preprocess
from training.config.sections import TtaConfig
from training.data.dataset import Dataset
from training.evaluation import evaluate
from training.evaluation.shortcomings import balanced_accuracy, count
from training.models.classifier import Classifier
from training.run import checkpoint
from training.run.checkpoint import BEST, CheckpointInfo
from training.run.history import Epoch
from training.utils.console import Log

Rank = tuple[float, float]


def rank(row: Epoch) -> Rank:
    """Return the sort key of an epoch; the best epoch has the largest key."""
    return row.accuracy, -row.valid_loss


def save(
    folder: Path, row: Epoch, classifier: Classifier, info: CheckpointInfo, preprocess: Preprocess
) -> None:
    """Write the classifier's weights as the run's best checkpoint.

    Args:
        folder: The run folder.
        row: Metrics of the epoch after which the classifier is saved.
        classifier: The network.
        info: Description of the run's checkpoints, without metrics.
        preprocess: Preprocessing of the images in the epoch's stage.
    """
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
    """Evaluate the best checkpoint in float32, and write the results into its .json file.

    Args:
        folder: The run folder.
        dataset: The run's photos; those of the validation split are evaluated.
        tta: Test-time augmentation; `count = 0` turns it off.
        log: Function that is called with each log line.
        device: "auto", "cpu" or "cuda".
    """
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
    balanced = balanced_accuracy(*count(result.plain, result.labels))
    metrics = {
        **info.metrics, "accuracy": accuracy, "balanced_accuracy": balanced, "loss": loss
    }  # fmt: skip
    if result.views > 1:
        metrics |= {"accuracy_tta": result.accuracy, "loss_tta": result.loss, "views": result.views}
    # The photos of a resumed run may have moved.
    data = {**info.data, "root": str(dataset.root)}
    checkpoint.write_info(path, replace(info, metrics=metrics, data=data))
    return result
