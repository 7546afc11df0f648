"""The loop: one epoch of one stage, its validation, and the range test before it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.errors import Diverged, WorkError
from serving.utils.progress import progress_bar
from training.activations import frozen_prefix
from training.activations.loaders import TrainLoader
from training.config.schema import Recipe, Stage
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup, accumulating
from training.engine import compile
from training.models.classifier import Classifier
from training.models.freezing import is_batchnorm
from training.optim import lr_range_test, schedules
from training.optim import optimizer as optim
from training.optim.ema import Ema
from training.run.history import Step
from training.utils.precision import Precision

LOOK_EVERY: Final = 32
"""Steps between two looks at the loss: each look waits for a GPU, and for other processes."""

STEPS: Final = "steps"
"""What the clock calls forward and backward passes and updates."""


Batch = tuple[Tensor, Tensor]
Sized = tuple[Batch, int]
"""A process's part of a batch, and how many photos the whole of it has."""

Batches = Iterable[Batch]


def find_lr(
    classifier: Classifier, stage: Stage, recipe: Recipe, feed: TrainLoader
) -> lr_range_test.Curve:
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
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        return feed.process_group.overall(loss, len(labels))

    _prepare(feed, range(-(-config.steps // len(feed.sizes(recipe.batch_size)))))
    try:
        with progress_bar() as bar:
            task = bar.add_task(f"{stage.name} lr_find", total=config.steps)
            return lr_range_test.range_test(
                feed.process_group.wrap(classifier.suffix),
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
    feed: TrainLoader,
    epoch: int,
    valid_losses: Sequence[float] = (),
    ema: Ema | None = None,
) -> tuple[float, list[Step]]:
    """Train one epoch; returns the mean loss over its photos, and its steps.

    Of several processes each takes its part of every batch, and all get the same figures.

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
    config, size, process_group = recipe.optimizer, recipe.batch_size, feed.process_group
    sizes = feed.sizes(size)
    steps = -(-len(sizes) // config.accumulate)
    rows: list[Step] = []
    made: list[Tensor] = []
    seen: list[int] = []
    _prepare(feed, [epoch])  # before the bar: it shows one of its own
    net = process_group.wrap(compile.suffix_of(classifier, stage, recipe))
    classifier.train()
    with progress_bar() as bar:
        task = bar.add_task(f"{stage.name} {epoch + 1}/{stage.epochs}", total=steps)
        batches = zip(feed.epoch(epoch, size), sizes, strict=True)
        for number, group in enumerate(_groups(batches, config.accumulate)):
            position = epoch + number / steps
            point = schedules.at(
                stage, position, steps=steps, losses=valid_losses, momentum=config.momentum
            )
            optim.set_point(optimizer, point)
            with feed.timer(STEPS):
                made.append(
                    _backward(net, group, feed.precision, recipe.label_smoothing, process_group)
                )
                optim.step(optimizer, config)
                if ema:
                    ema.update()
            momentum = config.momentum if point.momentum is None else point.momentum
            rates = tuple(optim.rates_now(optimizer).values())
            rows.append(Step(stage.name, epoch + 1, number + 1, math.nan, momentum, rates))
            seen.append(sum(size for _, size in group))
            if len(made) % LOOK_EVERY == 0 or len(rows) == steps:
                _look(rows, made, process_group)
            bar.advance(task)
    _share_statistics(classifier, ema, process_group)
    losses = np.array([row.loss for row in rows])
    return float(losses @ seen / sum(seen)), rows


def _prepare(feed: TrainLoader, epochs: Iterable[int]) -> None:
    """Have the kept views of these epochs computed, by all processes."""
    shared = feed.precision.device.type == "cpu"  # the first of a machine computes for all there
    with feed.process_group.local_main_process_first() if shared else nullcontext():
        feed.prepare(epochs)
    feed.process_group.wait_for_everyone()


def _look(rows: list[Step], made: list[Tensor], process_group: ProcessGroup) -> None:
    """Take the losses of the last steps from the device, which waits for it, and empty `made`."""
    losses = process_group.mean(torch.stack(made)).tolist()
    for place, loss in enumerate(losses, len(rows) - len(made)):
        rows[place] = row = replace(rows[place], loss=loss)
        if not math.isfinite(loss):
            raise Diverged(
                f"stage {row.stage}: the loss is {loss} at epoch {row.epoch}, step {row.step}, "
                f"rate {row.lr[-1]:.3g}; lower stage.{row.stage}.lr"
            )
    made.clear()


def _groups(batches: Iterator[Sized], count: int) -> Iterator[list[Sized]]:
    """Batches by the `count`, the last group as long as it comes."""
    while group := list(itertools.islice(batches, count)):
        yield group


def _backward(
    net: nn.Module,
    batches: Sequence[Sized],
    precision: Precision,
    smoothing: float,
    process_group: ProcessGroup,
) -> Tensor:
    """Gradients of the mean loss over all photos of the batches, of all processes.

    Returns:
        A scalar whose mean over the processes is that loss.
    """
    photos = sum(size for _, size in batches)
    total = torch.zeros((), device=precision.device)
    for number, ((inputs, labels), size) in enumerate(batches, 1):
        last = number == len(batches)
        with nullcontext() if last else accumulating(net):
            with precision.autocast():
                logits = net(inputs)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            weight = process_group.weight(len(labels), size) * (size / photos)
            if weight != 1:
                loss = loss * weight
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def _share_statistics(classifier: Classifier, ema: Ema | None, process_group: ProcessGroup) -> None:
    """Make moving BatchNorm statistics, and their averages, the mean of those of all processes.

    Once an epoch is enough: a step moves them by a linear rule, so the mean moves by it too.
    """
    if process_group.size == 1:
        return
    moving = [n for n, m in classifier.named_modules() if is_batchnorm(m) and m.training]
    names = [f"{n}.{what}" for n in moving for what in ("running_mean", "running_var")]
    groups = [classifier.state_dict(), *([ema.averages] if ema else [])]
    own = [group[name] for group in groups for name in names]
    if own:
        means = process_group.mean(torch.cat(own))
        for values, mean in zip(own, means.split([len(v) for v in own]), strict=True):
            values.copy_(mean)


@torch.inference_mode()
def validate(
    classifier: Classifier,
    valid: Batches,
    precision: Precision,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Accuracy and mean loss, over the batches of all processes; leaves it in eval mode."""
    classifier.eval()
    suffix: nn.Module = classifier.suffix
    # On a CPU folding the whole network is soon paid for; a GPU is done before it is folded.
    if not classifier.freezing.prefix and precision.device.type == "cpu":
        suffix = frozen_prefix.fused(suffix)
    right, loss = torch.zeros((), device=precision.device), torch.zeros((), device=precision.device)
    seen = 0
    for inputs, labels in valid:
        with precision.autocast():
            logits = suffix(inputs).float()[: len(labels)]
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
    own = torch.tensor([right.item(), loss.item(), seen], dtype=torch.float64)
    all_right, all_loss, all_seen = process_group.total(own).tolist()
    return all_right / all_seen, all_loss / all_seen
