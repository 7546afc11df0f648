"""Records of a run: table rows of metrics.csv (one per epoch) and steps.csv (one per step)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One table row of metrics.csv: an epoch.

    Attributes:
        stage: Name of the stage.
        epoch: Number of the epoch in the stage, from 1.
        lr: Learning rate of the head at the last step of the epoch.
        train_loss: Mean cross-entropy of the training photos in nats, with label smoothing.
        valid_loss: Mean cross-entropy of the validation photos in nats.
        accuracy: Validation accuracy without test-time augmentation, as a fraction of 1.
        seconds: Wall-clock time of training and validation.
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
    """One table row of steps.csv: an optimizer step.

    Attributes:
        stage: Name of the stage.
        epoch: Number of the epoch in the stage, from 1.
        step: Number of the step in the epoch, from 1.
        loss: Mean loss of the photos in the step, in nats.
        momentum: Momentum of SGD, or the first beta of Adam.
        lr: Learning rate of each trainable layer group; that of the head is last.
    """

    stage: str
    epoch: int
    step: int
    loss: float
    momentum: float
    lr: tuple[float, ...]
