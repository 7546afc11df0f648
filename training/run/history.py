"""Records of a run: one per epoch (metrics.csv) and one per optimizer step (steps.csv)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One row of metrics.csv.

    Attributes:
        stage: Name of the stage.
        epoch: Number of the epoch in the stage, from 1.
        lr: The head's learning rate at the last step.
        train_loss: Mean cross-entropy of the training photos in nats, with label smoothing.
        valid_loss: Mean cross-entropy of the validation photos in nats.
        accuracy: Validation accuracy without test-time augmentation, a fraction of 1.
        seconds: Wall-clock time of the epoch.
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
    """One row of steps.csv: an optimizer step.

    Attributes:
        stage: Name of the stage.
        epoch: Number of the epoch in the stage, from 1.
        step: Number of the step in the epoch, from 1.
        loss: Mean loss of the step's photos, in nats.
        momentum: Momentum of sgd, or Adam's first beta.
        lr: Learning rate of each trainable layer group, the head's last.
    """

    stage: str
    epoch: int
    step: int
    loss: float
    momentum: float
    lr: tuple[float, ...]
