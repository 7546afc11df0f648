"""The loop: one stage."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.errors import WorkError
from serving.progress import progress_bar
from training import lr_finder, optim, schedule
from training.activations import Precision, TrainFeed
from training.model import Classifier
from training.options import OptimizerConfig, Stage

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.csv.

    epoch: from 1. lr: the head's rate at the last step. Losses are cross-entropy in nats, the
    training loss with label smoothing. accuracy: of the plain view, a fraction of 1.
    """

    stage: str
    epoch: int
    lr: float
    train_loss: float
    valid_loss: float
    accuracy: float
    seconds: float


def find_lr(
    classifier: Classifier,
    stage: Stage,
    optimizer: OptimizerConfig,
    feed: TrainFeed,
    batch_size: int,
    smoothing: float,
    steps: int = 80,
) -> lr_finder.Curve:
    """Range test of a stage; leaves the classifier as it was."""
    trial = optim.build(classifier, optimizer, 1.0, stage.lr_divide)
    suffix = classifier.suffix

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            yield from feed.epoch(epoch, batch_size)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

    try:
        return lr_finder.range_test(
            suffix,
            trial,
            endless(),
            loss_of,
            steps=steps,
            autocast=feed.precision.autocast,
            train=classifier.train,  # it knows what stays in eval mode
        )
    except ValueError as error:
        raise WorkError(
            f"stage {stage.name}: lr_find: {error}; set stage.{stage.name}.lr"
        ) from error


def train_stage(
    classifier: Classifier,
    stage: Stage,
    lr: float,
    config: OptimizerConfig,
    feed: TrainFeed,
    valid: Batches,
    *,
    batch_size: int,
    smoothing: float,
    on_epoch: Callable[[Epoch], None],
) -> None:
    """Train one stage.

    Args:
        classifier: Frozen as the stage says.
        stage: Schedule and rates.
        lr: The head's learning rate.
        config: The optimiser.
        feed: Training batches, as inputs of the classifier's suffix.
        valid: Validation batches, likewise.
        batch_size: Photos a step.
        smoothing: Label smoothing.
        on_epoch: Called after each epoch with its figures.

    Raises:
        WorkError: The loss is no longer finite; names stage, step and rate.
    """
    suffix = classifier.suffix
    optimizer = optim.build(classifier, config, lr, stage.lr_divide)
    steps = feed.steps(batch_size)
    feed.fill()
    for epoch in range(stage.epochs):
        started, total, seen = time.perf_counter(), 0.0, 0
        classifier.train()
        with progress_bar() as bar:
            task = bar.add_task(f"{stage.name} {epoch + 1}/{stage.epochs}", total=steps)
            for step, (inputs, labels) in enumerate(feed.epoch(epoch, batch_size)):
                factor = factor_at(stage, epoch + step / steps)
                optim.set_factor(optimizer, factor)
                with feed.precision.autocast():
                    logits = suffix(inputs)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
                value = loss.item()
                if not math.isfinite(value):
                    raise WorkError(
                        f"stage {stage.name}: the loss is {value} at epoch {epoch + 1}, "
                        f"step {step + 1}, rate {lr * factor:.3g}; lower stage.{stage.name}.lr"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, seen = total + value * len(labels), seen + len(labels)
                bar.advance(task)
        accuracy, valid_loss = validate(classifier, suffix, valid, feed.precision)
        if not math.isfinite(valid_loss):
            raise WorkError(
                f"stage {stage.name}: the validation loss is {valid_loss} after epoch {epoch + 1}, "
                f"rate {lr * factor:.3g}; lower stage.{stage.name}.lr"
            )
        seconds = time.perf_counter() - started
        on_epoch(
            Epoch(stage.name, epoch + 1, lr * factor, total / seen, valid_loss, accuracy, seconds)
        )


def factor_at(stage: Stage, position: float) -> float:
    """The schedule of a stage at a position in epochs."""
    if stage.schedule == "sgdr":
        # Whole epochs are trained: cycles of fractional length are stretched to end with them.
        lengths = schedule.cycle_lengths(stage.cycles, stage.cycle_len, stage.cycle_mult)
        position *= sum(lengths) / stage.epochs
        return schedule.sgdr(position, stage.cycles, stage.cycle_len, stage.cycle_mult)
    if stage.schedule == "one_cycle":
        return schedule.one_cycle(position, stage.epochs)
    return 1.0


@torch.no_grad()
def validate(
    classifier: Classifier, suffix: nn.Module, valid: Batches, precision: Precision
) -> tuple[float, float]:
    """Accuracy and mean loss; leaves the classifier in eval mode."""
    classifier.eval()
    right, loss, seen = 0, 0.0, 0
    for inputs, labels in valid:
        with precision.autocast():
            logits = suffix(inputs).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(dim=1) == labels).sum())
        seen += len(labels)
    return right / seen, loss / seen
