"""One scoring job, as the local and the Ray engine get it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.inference.predictor import Predictor
from serving.scoring.journal import ScoringJournal
from serving.scoring.options import ScoringOptions
from serving.utils.progress import Progress


@dataclass(frozen=True)
class ScoringJob:
    """What an engine needs to score the incomplete shards of a job.

    Attributes:
        journal: Has the inputs, takes the rows.
        predictor: The model.
        options: The user's options.
        batch: Rows (images times views) of one run of the graph.
        protocols: Protocols that addresses may have.
        progress: Counts the images.
    """

    journal: ScoringJournal
    predictor: Predictor
    options: ScoringOptions
    batch: int
    protocols: Sequence[str]
    progress: Progress
