"""Early stopping: end a stage whose validation loss stops falling; restore its best weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from training.models.classifier import Classifier
from training.optim.ema import Ema
from training.run.resume_state import ResumeTensors


def is_overfitting(losses: Sequence[float], patience: int) -> bool:
    """Whether the lowest loss is `patience` or more epochs old; False if `patience` is 0."""
    if not patience or not losses:
        return False
    return len(losses) - 1 - list(losses).index(min(losses)) >= patience


class EarlyStopping:
    """Keeps copies of a stage's weights and averages at the epoch with the lowest validation loss.

    With `patience` 0 it never stops the stage, copies nothing and restores nothing.

    Attributes:
        kept: State dict of the classifier after that epoch; {} if there is none yet.
        kept_ema: `Ema.state` after that epoch; {} without a moving average.
    """

    def __init__(
        self, patience: int, classifier: Classifier, ema: Ema | None, resumed: ResumeTensors
    ) -> None:
        """Continue with the copies of `resumed`, which are {} at the start of a stage."""
        self._patience, self._classifier, self._ema = patience, classifier, ema
        self.kept: Mapping[str, Tensor] = resumed.kept
        self.kept_ema: Mapping[str, Tensor] = resumed.kept_ema

    def should_stop(self, losses: Sequence[float]) -> bool:
        """Whether to end the stage after epochs with these validation losses."""
        return is_overfitting(losses, self._patience)

    def update(self, losses: Sequence[float]) -> None:
        """Copy the weights if the last of these validation losses is the lowest."""
        *earlier, last = losses
        if self._patience and last < min(earlier, default=math.inf):
            self.kept = _copies(self._classifier.state_dict())
            self.kept_ema = _copies(self._ema.state()) if self._ema else {}

    def restore(self) -> None:
        """Load the saved weights into the classifier and the moving average; delete the copies."""
        if not self._patience:
            return
        self._classifier.load_state_dict(self.kept)
        if self._ema and self.kept_ema:
            self._ema.load(self.kept_ema)
        self.kept, self.kept_ema = {}, {}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
