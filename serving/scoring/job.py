"""The input of a scoring engine, local or Ray: journal, model and options of one job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.inference.predictor import Predictor
from serving.scoring.journal import ScoringJournal
from serving.scoring.options import ScoringOptions
from serving.utils.progress import Progress


@dataclass(frozen=True)
class ScoringJob:
    """Input of an engine that scores the incomplete shards of a job.

    Attributes:
        journal: Provides the shards (1,000 inputs each) and stores their rows.
        predictor: The model.
        options: The user's options.
        batch: Rows (images times views) of one run of the graph.
        protocols: Protocols that addresses may have.
        progress: Counts and shows the images that are done.
    """

    journal: ScoringJournal
    predictor: Predictor
    options: ScoringOptions
    batch: int
    protocols: Sequence[str]
    progress: Progress
