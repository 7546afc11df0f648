"""Names of images -> rows, a few at a time, by several threads, in order."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from serving.errors import FledgeError
from serving.inference.predictor import Prediction, Predictor, Prepared
from serving.inputs import sources
from serving.scoring.table import Features, ScoreRow

_AHEAD: Final = 8
"""Chunks a worker may be ahead of the table: hides a slow one, and bounds the memory."""
_CHUNK: Final = 8
"""Images that a thread takes at once, where batches are smaller."""


class Chunk(NamedTuple):
    """Inputs that one thread takes at once, and whether the shard ends with them."""

    shard: int
    names: list[str]
    last: bool


class ScoredChunk(NamedTuple):
    """A chunk's rows, and features [inputs, D] where they are asked for."""

    chunk: Chunk
    rows: list[ScoreRow]
    features: Features | None


class Scorer:
    """Scores chunks; called by several threads at once.

    chunk: how many inputs it likes to have at once, whole batches of them.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        batch: int,
        tta: int,
        top_k: int,
        probabilities: bool,
        embeddings: bool,
        protocols: Sequence[str] = (),
        runs: int | None = None,
    ) -> None:
        """Take what decides the rows.

        Args:
            predictor: Opened.
            batch: Images of one run of the graph.
            tta: This and the others as `score.ScoringOptions`.
            top_k: See there.
            probabilities: See there.
            embeddings: See there.
            protocols: As `inputs.Reader`.
            runs: Of the graph, that go at a time while other threads decode; None: each thread's.
        """
        self._predictor, self._batch, self._tta = predictor, batch, tta
        self._top_k = min(top_k, len(predictor.manifest.labels))
        self._probabilities, self._embeddings = probabilities, embeddings
        self.chunk = batch * max(1, _CHUNK // batch)
        self._turns = threading.Semaphore(runs) if runs else contextlib.nullcontext()
        self._own, self._protocols = threading.local(), protocols
        self._readers: list[sources.Reader] = []

    def __call__(self, chunk: Chunk) -> ScoredChunk:
        """Rows, and features [inputs, D] where they are asked for."""
        rows: list[ScoreRow] = []
        features: list[Features] = []
        for start in range(0, len(chunk.names), self._batch):
            for row, vector in self._run(chunk.names[start : start + self._batch]):
                rows.append(row)
                features += [] if vector is None else [vector]
        return ScoredChunk(chunk, rows, np.stack(features) if features else None)

    def close(self) -> None:
        """Close the archives."""
        for reader in self._readers:
            reader.close()

    def _run(self, names: Sequence[str]) -> Iterator[tuple[ScoreRow, Features | None]]:
        prepared: dict[int, Prepared] = {}
        answers: dict[int, Prediction | FledgeError] = {}
        for place, name in enumerate(names):
            try:
                data = self._reader().load(name)
                prepared[place] = self._predictor.prepare(data, self._tta)
            except FledgeError as error:
                answers[place] = error
        try:
            with self._turns:
                found = self._predictor.predict(list(prepared.values()))
            answers.update(zip(prepared, found, strict=True))
        except FledgeError as error:
            for place, one in prepared.items():  # nobody pays for a neighbour
                answers[place] = self._alone(one) if len(prepared) > 1 else error
        for place, name in enumerate(names):
            yield self._row(name, answers[place])

    def _alone(self, one: Prepared) -> Prediction | FledgeError:
        try:
            return self._predictor.predict([one])[0]
        except FledgeError as error:
            return error

    def _row(self, name: str, answer: Prediction | FledgeError) -> tuple[ScoreRow, Features | None]:
        if isinstance(answer, FledgeError):
            return ScoreRow.of_error(name, answer), self._nothing()
        every = answer.probabilities.tolist() if self._probabilities else None
        row = ScoreRow.of_answer(name, self._predictor.answer(answer, self._top_k), every)
        return row, answer.features if self._embeddings else None

    def _nothing(self) -> Features | None:
        if not self._embeddings:
            return None
        shape = self._predictor.manifest.graph["outputs"]["features"]["shape"]
        return np.full(shape[1], np.nan, np.float32)

    def _reader(self) -> sources.Reader:
        reader: sources.Reader | None = getattr(self._own, "reader", None)
        if reader is None:
            reader = self._own.reader = sources.Reader(self._protocols)
            self._readers.append(reader)
        return reader


def in_order(
    work: Callable[[Chunk], ScoredChunk], chunks: Iterable[Chunk], workers: int
) -> Iterator[ScoredChunk]:
    """Map `work` over `chunks` by threads; results come in the order of the chunks."""
    pending: deque[Future[ScoredChunk]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="score")
    try:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # On Ctrl-C what runs is waited for, what waits is dropped.
        pool.shutdown(wait=True, cancel_futures=True)
