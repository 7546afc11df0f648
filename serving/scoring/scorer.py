"""Score images in batches: load, decode, run the model, and return a table row for each image."""

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
"""Number of pending chunks for each thread. More would hide slower chunks, but need more memory."""
_CHUNK: Final = 8
"""Largest number of images in a chunk. A larger batch is a chunk of its own."""


class Chunk(NamedTuple):
    """Images that one thread scores in one call.

    Attributes:
        shard: Number of the shard (1,000 images of the job) that the images belong to.
        names: Names of the images.
        last: Whether this is the last chunk of the shard.
    """

    shard: int
    names: list[str]
    last: bool


class ScoredChunk(NamedTuple):
    """Result of a chunk.

    Attributes:
        chunk: The chunk.
        rows: Table rows of the images, in order.
        features: Features of the images, float32 [images, D]; None if not requested.
    """

    chunk: Chunk
    rows: list[ScoreRow]
    features: Features | None


class Scorer:
    """Callable that scores chunks of images. Thread-safe.

    Attributes:
        chunk_size: Number of images in a chunk, a multiple of the number of images in a batch.
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
            options: Options of `fledge score`; only `tta`, `top_k`, `probabilities`, `embeddings`
                and `root` are used.
            batch: Number of TTA views in one run of the ONNX graph, counted over all images.
            protocols: Protocols that addresses of images may have, such as "s3".
            runs: How many threads may run the graph at the same time; the others decode meanwhile.
                None: no limit.
        """
        self._predictor, self._options = predictor, options
        self._images = options.images_per_run(batch)
        self._top_k = min(options.top_k, len(predictor.manifest.labels))
        self.chunk_size = self._images * max(1, _CHUNK // self._images)
        self._run_slots = threading.Semaphore(runs) if runs else contextlib.nullcontext()
        self._of_thread, self._protocols = threading.local(), protocols
        self._readers: list[sources.Reader] = []

    def __call__(self, chunk: Chunk) -> ScoredChunk:
        """Score the images of a chunk, in batches."""
        rows: list[ScoreRow] = []
        features: list[Features] = []
        for start in range(0, len(chunk.names), self._images):
            for row, vector in self._score_batch(chunk.names[start : start + self._images]):
                rows.append(row)
                features += [] if vector is None else [vector]
        return ScoredChunk(chunk, rows, np.stack(features) if features else None)

    def close(self) -> None:
        """Close the tar archives opened by the readers of all threads."""
        for reader in self._readers:
            reader.close()

    def _score_batch(self, names: Sequence[str]) -> Iterator[tuple[ScoreRow, Features | None]]:
        prepared: dict[int, Prepared] = {}
        answers: dict[int, Prediction | FledgeError] = {}
        for index, name in enumerate(names):
            try:
                data = self._reader().load(name)
                prepared[index] = self._predictor.prepare(
                    data, self._options.tta, max_pixels=self._options.max_pixels
                )
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
        """Return the image reader of the calling thread."""
        reader: sources.Reader | None = getattr(self._of_thread, "reader", None)
        if reader is None:
            reader = self._of_thread.reader = sources.Reader(self._protocols, self._options.root)
            self._readers.append(reader)
        return reader


def score_chunks(
    scorer: Scorer, chunks: Iterable[Chunk], workers: int
) -> Generator[ScoredChunk, None, None]:
    """Score chunks in parallel threads, and yield the results in the order of the chunks.

    Args:
        scorer: The scorer.
        chunks: The chunks.
        workers: Number of threads.
    """
    return map_ordered(scorer, chunks, workers=workers, window=_WINDOW * workers, name="score")
