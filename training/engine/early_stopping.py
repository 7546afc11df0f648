"""Early stopping of a stage when the validation loss stops falling.

At the end of the stage the weights of the epoch with the lowest validation loss are restored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from training.models.classifier import Classifier
from training.optim.ema import Ema
from training.run.resume_state import ResumeTensors


def is_overfitting(losses: Sequence[float], patience: int) -> bool:
    """Return whether at least `patience` epochs have passed since the epoch with the lowest loss.

    The result is False if `patience` is 0.

    Args:
        losses: Validation loss of each epoch, in order.
        patience: Number of epochs.
    """
    if not patience or not losses:
        return False
    return len(losses) - 1 - list(losses).index(min(losses)) >= patience


class EarlyStopping:
    """Early stopping of one stage, with copies of the weights of the stage's best epoch.

    The best epoch has the lowest validation loss. With `patience` 0, early stopping is off: the
    methods do nothing.

    Attributes:
        kept: State dict of the classifier after the best epoch; {} before the first epoch.
        kept_ema: Result of `Ema.state` after the best epoch; {} before the first epoch or without
            a moving average of the weights.
    """

    def __init__(
        self, patience: int, classifier: Classifier, ema: Ema | None, resumed: ResumeTensors
    ) -> None:
        """Start or resume early stopping.

        Args:
            patience: Number of epochs without a new lowest loss after which the stage ends.
            classifier: The network.
            ema: Moving average of the weights, if there is one.
            resumed: Tensors of the resume state. The copies in it are used if the run was resumed
                within the stage; at the start of a stage they are empty.
        """
        self._patience, self._classifier, self._ema = patience, classifier, ema
        self.kept: Mapping[str, Tensor] = resumed.kept
        self.kept_ema: Mapping[str, Tensor] = resumed.kept_ema

    def should_stop(self, losses: Sequence[float]) -> bool:
        """Return whether to end the stage after epochs with the given validation losses."""
        return is_overfitting(losses, self._patience)

    def update(self, losses: Sequence[float]) -> None:
        """Copy the current weights if the last of the given validation losses is the lowest."""
        *earlier, last = losses
        if self._patience and last < min(earlier, default=math.inf):
            self.kept = _copies(self._classifier.state_dict())
            self.kept_ema = _copies(self._ema.state()) if self._ema else {}

    def restore(self) -> None:
        """Load the copies into the classifier and the moving average, then delete the copies."""
        if not self._patience:
            return
        self._classifier.load_state_dict(self.kept)
        if self._ema and self.kept_ema:
            self._ema.load(self.kept_ema)
        self.kept, self.kept_ema = {}, {}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
