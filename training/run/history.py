"""Records of a run: one per epoch (metrics.csv) and one per optimizer step (steps.csv)."""

from __future__ import annotations

from dataclasses import dataclass


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
