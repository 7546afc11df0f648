"""Records of a run: one per epoch (metrics.csv) and one per optimizer step (steps.csv)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One row of metrics.csv.

    Attributes:
        stage: Its name.
        epoch: Number in the stage, from 1.
        lr: The head's learning rate at the last step.
        train_loss: Mean cross-entropy in nats, with label smoothing.
        valid_loss: Mean cross-entropy in nats.
        accuracy: On the validation part without test-time augmentation, a fraction of 1.
        seconds: Wall-clock time.
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
        stage: Its name.
        epoch: Number in the stage, from 1.
        step: Number in the epoch, from 1.
        loss: Mean over the step's photos, in nats.
        momentum: Of sgd, or Adam's first beta.
        lr: Learning rate of each trainable layer group, the head's last.
    """

    stage: str
    epoch: int
    step: int
    loss: float
    momentum: float
    lr: tuple[float, ...]
