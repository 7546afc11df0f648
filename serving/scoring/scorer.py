"""Scorer: loads and decodes images, runs the model on batches, returns a row for each image."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from serving.errors import FledgeError
from serving.inference.predictor import Prediction, Predictor, Prepared
from serving.inputs import sources
from serving.scoring.options import ScoringOptions
from serving.scoring.rows import Features, ScoreRow
from serving.utils.parallel import map_ordered

_WINDOW: Final = 8
"""Pending chunks for each thread: enough to hide a slow chunk, and few enough for the memory."""
_CHUNK: Final = 8
"""Largest number of images of a chunk of several batches; a larger batch is one chunk."""


class Chunk(NamedTuple):
    """Inputs that one thread scores in one call.

    shard: number of the shard, a part of the job with 1,000 inputs.
    last: whether this is the last chunk of the shard.
    """

    shard: int
    names: list[str]
    last: bool


class ScoredChunk(NamedTuple):
    """A chunk's rows, and its features [inputs, D] if requested."""

    chunk: Chunk
    rows: list[ScoreRow]
    features: Features | None


class Scorer:
    """Scores chunks; thread-safe.

    Attributes:
        chunk_size: Number of inputs of a chunk, a multiple of the images of a batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        options: ScoringOptions,
        *,
        batch: int,
        protocols: Sequence[str] = (),
        runs: int | None = None,
    ) -> None:
        """Store the arguments; nothing is loaded yet.

        Args:
            predictor: The model.
            options: Of these, `tta`, `top_k`, `probabilities` and `embeddings` are used.
            batch: Rows (images times views) of one run of the graph.
            protocols: Protocols that addresses may have.
            runs: Largest number of concurrent runs of the graph, while other threads decode;
                None: one for each thread.
        """
        self._predictor, self._options = predictor, options
        self._images = options.images_per_run(batch)
        self._top_k = min(options.top_k, len(predictor.manifest.labels))
        self.chunk_size = self._images * max(1, _CHUNK // self._images)
        self._run_slots = threading.Semaphore(runs) if runs else contextlib.nullcontext()
        self._of_thread, self._protocols = threading.local(), protocols
        self._readers: list[sources.Reader] = []

    def __call__(self, chunk: Chunk) -> ScoredChunk:
        """Score the inputs of a chunk, in batches."""
        rows: list[ScoreRow] = []
        features: list[Features] = []
        for start in range(0, len(chunk.names), self._images):
            for row, vector in self._score_batch(chunk.names[start : start + self._images]):
                rows.append(row)
                features += [] if vector is None else [vector]
        return ScoredChunk(chunk, rows, np.stack(features) if features else None)

    def close(self) -> None:
        """Close the open archives."""
        for reader in self._readers:
            reader.close()

    def _score_batch(self, names: Sequence[str]) -> Iterator[tuple[ScoreRow, Features | None]]:
        prepared: dict[int, Prepared] = {}
        answers: dict[int, Prediction | FledgeError] = {}
        for index, name in enumerate(names):
            try:
                data = self._reader().load(name)
                prepared[index] = self._predictor.prepare(data, self._options.tta)
            except FledgeError as error:
                answers[index] = error
        try:
            with self._run_slots:
                predictions = self._predictor.predict(list(prepared.values()))
            answers.update(zip(prepared, predictions, strict=True))
        except FledgeError as error:
            # Run each image separately, because one that makes the batch fail must not affect the
            # others.
            for index, one in prepared.items():
                answers[index] = self._predict_one(one) if len(prepared) > 1 else error
        for index, name in enumerate(names):
            yield self._row(name, answers[index])

    def _predict_one(self, prepared: Prepared) -> Prediction | FledgeError:
        try:
            return self._predictor.predict([prepared])[0]
        except FledgeError as error:
            return error

    def _row(self, name: str, answer: Prediction | FledgeError) -> tuple[ScoreRow, Features | None]:
        if isinstance(answer, FledgeError):
            return ScoreRow.of_error(name, answer), self._missing_features()
        probabilities = answer.probabilities.tolist() if self._options.probabilities else None
        row = ScoreRow.of_answer(name, self._predictor.answer(answer, self._top_k), probabilities)
        return row, answer.features if self._options.embeddings else None

    def _missing_features(self) -> Features | None:
        if not self._options.embeddings:
            return None
        shape = self._predictor.manifest.graph["outputs"]["features"]["shape"]
        return np.full(int(shape[1]), np.nan, np.float32)

    def _reader(self) -> sources.Reader:
        """The calling thread's reader."""
        reader: sources.Reader | None = getattr(self._of_thread, "reader", None)
        if reader is None:
            reader = self._of_thread.reader = sources.Reader(self._protocols)
            self._readers.append(reader)
        return reader


def score_chunks(
    scorer: Scorer, chunks: Iterable[Chunk], workers: int
) -> Generator[ScoredChunk, None, None]:
    """Score chunks in `workers` threads; yields the results in the order of the chunks."""
    return map_ordered(scorer, chunks, workers=workers, window=_WINDOW * workers, name="score")
