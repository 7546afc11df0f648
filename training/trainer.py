"""The loop: one epoch of one stage, its validation, and the range test before it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.errors import WorkError
from serving.progress import progress_bar
from training import lr_finder, optim, schedule
from training.ema import Ema
from training.feeds import TrainFeed
from training.model import Classifier
from training.options import Recipe, Stage
from training.precision import Precision

LOOK_EVERY: Final = 32
"""Steps between two looks at the loss: each look waits for a GPU."""

STEPS: Final = "steps"
"""What the clock calls forward and backward passes and updates."""

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Batch]


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


@dataclass(frozen=True)
class Step:
    """One line of steps.csv: a step of the optimiser, with what it was made with.

    step: from 1 in its epoch. loss: of its batch or batches. lr: of each layer group that trains,
    the head's last. momentum: or Adam's first beta.
    """

    stage: str
    epoch: int
    step: int
    loss: float
    momentum: float
    lr: tuple[float, ...]


def find_lr(
    classifier: Classifier, stage: Stage, recipe: Recipe, feed: TrainFeed
) -> lr_finder.Curve:
    """Range test of a stage; leaves the classifier as it was.

    Raises:
        WorkError: The curve says nothing; names the stage.
    """
    trial = optim.build(classifier, recipe.optimizer, stage, 1.0)
    config = recipe.lr_find

    def endless() -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from feed.epoch(epoch, recipe.batch_size)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)

    feed.prepare(range(-(-config.steps // feed.steps(recipe.batch_size))))
    try:
        with progress_bar() as bar:
            task = bar.add_task(f"{stage.name} lr_find", total=config.steps)
            return lr_finder.range_test(
                classifier.suffix,
                trial,
                endless(),
                loss_of,
                low=config.low,
                high=config.high,
                steps=config.steps,
                direction=config.direction,
                autocast=feed.precision.autocast,
                train=classifier.train,  # it knows what stays in eval mode
                take_step=lambda optimizer: optim.step(optimizer, recipe.optimizer),
                on_step=lambda: bar.advance(task),
            )
    except ValueError as error:
        raise WorkError(
            f"stage {stage.name}: lr_find: {error}; set stage.{stage.name}.lr"
        ) from error


def train_epoch(
    classifier: Classifier,
    stage: Stage,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    feed: TrainFeed,
    epoch: int,
    valid_losses: Sequence[float] = (),
    ema: Ema | None = None,
) -> tuple[float, list[Step]]:
    """Train one epoch; returns the mean loss over its photos, and its steps.

    Args:
        classifier: Already frozen as the stage wants it.
        stage, recipe: What to do.
        optimizer: From `optim.build`.
        feed: The stage's batches.
        epoch: Which one, counted from 0 in its stage.
        valid_losses: Of the stage's epochs so far; the plateau schedule reads them.
        ema: Updated after each step.

    Raises:
        WorkError: The loss is no number any more; names stage, epoch, step and rate.
    """
    suffix = classifier.suffix
    config, size = recipe.optimizer, recipe.batch_size
    steps = -(-feed.steps(size) // config.accumulate)
    rows: list[Step] = []
    made: list[Tensor] = []
    seen: list[int] = []
    feed.prepare([epoch])  # before the bar: it shows one of its own
    classifier.train()
    with progress_bar() as bar:
        task = bar.add_task(f"{stage.name} {epoch + 1}/{stage.epochs}", total=steps)
        for number, batches in enumerate(_groups(feed.epoch(epoch, size), config.accumulate)):
            position = epoch + number / steps
            point = schedule.at(
                stage, position, steps=steps, losses=valid_losses, momentum=config.momentum
            )
            optim.set_point(optimizer, point)
            with feed.clock(STEPS):
                made.append(_backward(suffix, batches, feed.precision, recipe.label_smoothing))
                optim.step(optimizer, config)
                if ema:
                    ema.update()
            momentum = config.momentum if point.momentum is None else point.momentum
            rates = tuple(optim.rates_now(optimizer).values())
            rows.append(Step(stage.name, epoch + 1, number + 1, math.nan, momentum, rates))
            seen.append(sum(len(labels) for _, labels in batches))
            if len(made) % LOOK_EVERY == 0 or len(rows) == steps:
                _look(rows, made)
            bar.advance(task)
    _look(rows, made)
    losses = np.array([row.loss for row in rows])
    return float(losses @ seen / sum(seen)), rows


def _look(rows: list[Step], made: list[Tensor]) -> None:
    """Take the losses of the last steps from the device, which waits for it, and empty `made`."""
    for place, loss in enumerate(torch.stack(made).tolist() if made else [], len(rows) - len(made)):
        rows[place] = row = replace(rows[place], loss=loss)
        if not math.isfinite(loss):
            raise WorkError(
                f"stage {row.stage}: the loss is {loss} at epoch {row.epoch}, step {row.step}, "
                f"rate {row.lr[-1]:.3g}; lower stage.{row.stage}.lr"
            )
    made.clear()


def _groups(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    """Batches by the `count`, the last group as long as it comes."""
    while group := list(itertools.islice(batches, count)):
        yield group


def _backward(
    suffix: nn.Module, batches: Sequence[Batch], precision: Precision, smoothing: float
) -> Tensor:
    """Gradients of the mean loss over all photos of the batches; returns that loss, a scalar."""
    photos = sum(len(labels) for _, labels in batches)
    total = torch.zeros((), device=precision.device)
    for inputs, labels in batches:
        with precision.autocast():
            logits = suffix(inputs)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        if len(batches) > 1:
            loss = loss * (len(labels) / photos)
        loss.backward()
        total += loss.detach()
    return total


@torch.inference_mode()
def validate(classifier: Classifier, valid: Batches, precision: Precision) -> tuple[float, float]:
    """Accuracy and mean loss; leaves the classifier in eval mode."""
    classifier.eval()
    suffix = classifier.suffix
    right, loss = torch.zeros((), device=precision.device), torch.zeros((), device=precision.device)
    seen = 0
    for inputs, labels in valid:
        with precision.autocast():
            logits = suffix(inputs).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
    return right.item() / seen, loss.item() / seen
