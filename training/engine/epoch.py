"""Functions that train one epoch, validate, and run the learning-rate range test of a stage."""

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
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup, no_sync
from training.engine import compile
from training.models.classifier import Classifier
from training.models.freezing import is_batchnorm
from training.optim import lr_range_test, schedules
from training.optim.ema import Ema
from training.optim.optimizer import apply_schedule, build_optimizer, current_rates, optimizer_step
from training.run.history import Step
from training.utils.precision import Precision

READ_LOSS_EVERY: Final = 32
"""Number of steps after which the losses are read from the GPU. A read is rare because it waits for
the GPU and for the other processes."""

STEPS: Final = "steps"
"""Name of the timer's activity for forward passes, backward passes and optimizer steps."""


Batch = tuple[Tensor, Tensor]
SizedBatch = tuple[Batch, int]
"""(this process's shard of a batch, number of photos in the whole batch)."""

Batches = Iterable[Batch]


def find_lr(
    classifier: Classifier, stage: Stage, recipe: Recipe, train_loader: TrainLoader
) -> lr_range_test.Curve:
    """Run the learning-rate range test of a stage, and return the loss curve.

    The classifier's weights are restored after the test.

    Args:
        classifier: The network, with layers frozen for the stage.
        stage: The stage.
        recipe: The recipe. Its table `lr_find` has the options of the test.
        train_loader: The stage's training batches.

    Raises:
        WorkError: The loss diverges at once or never falls; the message names the stage.
    """
    optimizer = build_optimizer(classifier, recipe.optimizer, stage, 1.0)
    config = recipe.lr_find

    def endless() -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from train_loader.epoch(epoch, recipe.batch_size)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        return train_loader.process_group.global_loss(loss, len(labels))

    steps_per_epoch = len(train_loader.batch_sizes(recipe.batch_size))
    _prepare(train_loader, range(-(-config.steps // steps_per_epoch)))
    try:
        with progress_bar() as bar:
            task = bar.add_task(f"{stage.name} lr_find", total=config.steps)
            return lr_range_test.range_test(
                train_loader.process_group.wrap(classifier.suffix),
                optimizer,
                endless(),
                loss_of,
                low=config.low,
                high=config.high,
                steps=config.steps,
                direction=config.direction,
                autocast=train_loader.precision.autocast,
                train=classifier.train,  # keeps frozen modules in eval mode
                take_step=lambda optimizer: optimizer_step(optimizer, recipe.optimizer),
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
    train_loader: TrainLoader,
    epoch: int,
    valid_losses: Sequence[float] = (),
    ema: Ema | None = None,
) -> tuple[float, list[Step]]:
    """Train one epoch.

    Each process trains on its shard of every batch; all processes return the same values.

    Args:
        classifier: The network, with layers frozen for the stage.
        stage: The stage; it has the learning-rate schedule.
        recipe: The recipe; it has batch size, gradient accumulation and label smoothing.
        optimizer: Result of `build_optimizer`.
        train_loader: The stage's training batches.
        epoch: Number of the epoch in its stage, from 0.
        valid_losses: Validation losses of the stage's finished epochs, for the plateau schedule.
        ema: Moving average of the weights, updated after each optimizer step.

    Returns:
        The mean loss over the epoch's photos in nats, and a record of each optimizer step.

    Raises:
        Diverged: The loss is not finite; the message names stage, epoch, step and learning rate.
    """
    config, size, process_group = recipe.optimizer, recipe.batch_size, train_loader.process_group
    precision = train_loader.precision
    sizes = train_loader.batch_sizes(size)
    steps = -(-len(sizes) // config.accumulate)
    rows: list[Step] = []
    unread: list[Tensor] = []  # losses of the steps since the last read, on the device
    photos: list[int] = []
    _prepare(train_loader, [epoch])  # before the bar below, because it shows its own
    net = process_group.wrap(compile.accelerated_suffix(classifier, stage, recipe))
    classifier.train()
    with progress_bar() as bar:
        task = bar.add_task(f"{stage.name} {epoch + 1}/{stage.epochs}", total=steps)
        batches = zip(train_loader.epoch(epoch, size), sizes, strict=True)
        for number, group in enumerate(_groups(batches, config.accumulate)):
            position = epoch + number / steps
            point = schedules.schedule_at(
                stage, position, steps=steps, losses=valid_losses, momentum=config.momentum
            )
            apply_schedule(optimizer, point)
            with train_loader.timer(STEPS):
                unread.append(
                    _backward(net, group, precision, recipe.label_smoothing, process_group)
                )
                optimizer_step(optimizer, config)
                if ema:
                    ema.update()
            momentum = config.momentum if point.momentum is None else point.momentum
            rates = tuple(current_rates(optimizer).values())
            rows.append(Step(stage.name, epoch + 1, number + 1, math.nan, momentum, rates))
            photos.append(sum(size for _, size in group))
            if len(unread) % READ_LOSS_EVERY == 0 or len(rows) == steps:
                _read_losses(rows, unread, process_group)
            bar.advance(task)
    _average_statistics(classifier, ema, process_group)
    losses = np.array([row.loss for row in rows])
    return float(losses @ photos / sum(photos)), rows


def _prepare(train_loader: TrainLoader, epochs: Iterable[int]) -> None:
    """Compute the augmented views of the photos for the given epochs and store them in the cache.

    Views that are in the cache already are not computed again.
    """
    process_group = train_loader.process_group
    # On a CPU the first process of a machine fills the disk cache that the others read.
    on_disk = train_loader.precision.device.type == "cpu"
    with process_group.local_main_process_first() if on_disk else nullcontext():
        train_loader.prepare(epochs)
    process_group.wait_for_everyone()


def _read_losses(rows: list[Step], unread: list[Tensor], process_group: ProcessGroup) -> None:
    """Read losses from the device, and write them into the records of the last steps.

    `unread` has the losses on the device, one per step, and is emptied. `rows` has the records of
    all steps of the epoch so far; the last records get the losses.

    Raises:
        Diverged: A loss is not finite.
    """
    losses = process_group.mean(torch.stack(unread)).tolist()
    for index, loss in enumerate(losses, len(rows) - len(unread)):
        rows[index] = row = replace(rows[index], loss=loss)
        if not math.isfinite(loss):
            raise Diverged(
                f"stage {row.stage}: the loss is {loss} at epoch {row.epoch}, step {row.step}, "
                f"rate {row.lr[-1]:.3g}; lower stage.{row.stage}.lr"
            )
    unread.clear()


def _groups(batches: Iterator[SizedBatch], count: int) -> Iterator[list[SizedBatch]]:
    """Yield the batches in groups of `count`; the last group may be shorter."""
    while group := list(itertools.islice(batches, count)):
        yield group


def _backward(
    net: nn.Module,
    batches: Sequence[SizedBatch],
    precision: Precision,
    smoothing: float,
    process_group: ProcessGroup,
) -> Tensor:
    """Run the forward and backward passes of one optimizer step, and accumulate the gradients.

    The loss of the step is the mean over all photos in the `batches` of all processes.

    Args:
        net: The layers that train.
        batches: The batches whose gradients are accumulated.
        precision: Device and dtype of the forward pass.
        smoothing: Label smoothing, in [0, 1].
        process_group: The processes that train.

    Returns:
        A scalar on the device. Its mean over all processes is the loss of the step.
    """
    photos = sum(size for _, size in batches)
    total = torch.zeros((), device=precision.device)
    for number, ((inputs, labels), size) in enumerate(batches, 1):
        last = number == len(batches)
        with nullcontext() if last else no_sync(net):
            with precision.autocast():
                logits = net(inputs)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            weight = process_group.loss_weight(len(labels), size) * (size / photos)
            if weight != 1:
                loss = loss * weight
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def _average_statistics(
    classifier: Classifier, ema: Ema | None, process_group: ProcessGroup
) -> None:
    """Replace the BatchNorm statistics of each process by their mean over all processes.

    The same is done with the exponential moving averages of these statistics in `ema`. BatchNorms
    in eval mode are left out. Averaging once per epoch gives the same result as averaging after
    every step, because the update of running statistics is linear.
    """
    if process_group.size == 1:
        return
    training = [n for n, m in classifier.named_modules() if is_batchnorm(m) and m.training]
    names = [f"{n}.{what}" for n in training for what in ("running_mean", "running_var")]
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
    """Return validation accuracy and mean loss over the batches of all processes.

    The network is left in eval mode.

    Args:
        classifier: The network.
        valid: Batches of this process's shard: inputs of the trainable layers, and labels.
        precision: Device and dtype of the forward pass.
        process_group: The processes that validate.

    Returns:
        Accuracy as a fraction of 1, and cross-entropy in nats.
    """
    classifier.eval()
    suffix: nn.Module = classifier.suffix
    # Fusing the BatchNorms of a whole network saves time on a CPU; on a GPU it takes more time.
    if not classifier.freezing.prefix and precision.device.type == "cpu":
        suffix = frozen_prefix.fused(suffix)
    correct, loss = (torch.zeros((), device=precision.device) for _ in range(2))
    photos = 0
    for inputs, labels in valid:
        with precision.autocast():
            logits = suffix(inputs).float()[: len(labels)]
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(dim=1) == labels).sum()
        photos += len(labels)
    own = torch.tensor([correct.item(), loss.item(), photos], dtype=torch.float64)
    all_correct, all_loss, all_photos = process_group.total(own).tolist()
    return all_correct / all_photos, all_loss / all_photos
