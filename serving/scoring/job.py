"""Input of both scoring engines (threads on this machine, or Ray): journal, model and options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.inference.predictor import Predictor
from serving.scoring.journal import ScoringJournal
from serving.scoring.options import ScoringOptions
from serving.utils.progress import Progress


@dataclass(frozen=True)
class ScoringJob:
    """Input of a scoring engine. The engine scores all shards of the journal that are not complete.

    Attributes:
        journal: Journal of the job, with the shards (1,000 images each) and the rows already
            written.
        predictor: The model.
        options: Options of `fledge score`.
        batch: Number of TTA views in one run of the ONNX graph, counted over all images.
        protocols: Protocols that addresses of images may have, such as "s3".
        progress: Progress display, which counts the scored images.
    """

    journal: ScoringJournal
    predictor: Predictor
    options: ScoringOptions
    batch: int
    protocols: Sequence[str]
    progress: Progress
