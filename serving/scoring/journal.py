"""The journal of a scoring job: what is done stays done, whenever it is killed.

    .OUT.parts/
      job.json            what decides the rows: the bundle, the options, the inputs asked for
      inputs.jsonl        the inputs that were found, one a line, in order
      skipped.json        how many places could not be looked into
      00000.jsonl         rows of the first thousand inputs; there when they are whole
      00000.npy           their features, where they are asked for; written before the rows

A shard that is not there is done again whole, so the same inputs always meet in the same batches.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from serving.errors import OptionError, WorkError
from serving.scoring.table import ScoreRow
from serving.utils.files import NoLocks, lock, write_aside

SIZE: Final = 1000
"""Inputs of a shard."""

_JOB: Final = "job.json"
_INPUTS: Final = "inputs.jsonl"
_SKIPPED: Final = "skipped.json"
_LOCK: Final = "lock"

Features = npt.NDArray[np.float32]


def begun(out: Path) -> bool:
    """Whether a job of `out` that is not finished has found its inputs."""
    return (_folder(out) / _INPUTS).exists()


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


class ScoringJournal:
    """One job's folder.

    total: how many inputs there are; skipped: places that could not be looked into.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], *, restart: bool = False) -> None:
        """Go on with the job of `out`, or begin it.

        Args:
            out: The table that is to come.
            facts: What decides its rows; JSON.
            restart: Forget what was done.

        Raises:
            OptionError: Another process is at work there; the job that lies there is another.
            WorkError: The folder can't be written.
        """
        self.folder = _folder(out)
        self.total = self.skipped = 0
        self._out = out
        self._lock = contextlib.ExitStack()
        with self._guard():
            self.folder.mkdir(exist_ok=True)
            self._alone()
            try:
                if restart:
                    self._clear()
                self._begin(json.loads(json.dumps(facts)))
                self._count()
            except BaseException:
                self._leave()
                raise

    def __enter__(self) -> ScoringJournal:
        """Nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let others at it; what is done stays."""
        self._leave()

    def _leave(self) -> None:
        if not (self.folder / _JOB).exists():  # finished: whoever waits for the lock makes it anew
            (self.folder / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        self._lock.close()

    @property
    def known(self) -> bool:
        """Whether the inputs were found already."""
        return (self.folder / _INPUTS).exists()

    def keep_inputs(self, names: Iterable[str], skipped: Sequence[str] = ()) -> None:
        """Write down what is to be scored, once and for all.

        `skipped` may fill while `names` are taken: a line for each place not looked into.
        """
        path = self.folder / _INPUTS
        with self._guard():
            with write_aside(path) as aside, aside.open("w", encoding="ascii") as file:
                file.writelines(json.dumps(name) + "\n" for name in names)
                with write_aside(self.folder / _SKIPPED) as counted:
                    counted.write_text(json.dumps(len(skipped)))
            self._count()

    def todo(self) -> Iterator[tuple[int, list[str]]]:
        """Number and inputs of each shard that is not done, in order."""
        with self._guard(), (self.folder / _INPUTS).open(encoding="ascii") as file:
            for number in range(self.shards):
                lines = list(islice(file, SIZE))
                if not self._rows(number).exists():
                    yield number, [json.loads(line) for line in lines]

    @property
    def shards(self) -> int:
        """How many there are when all is done."""
        return -(-self.total // SIZE)

    @property
    def done(self) -> int:
        """Inputs whose rows are there."""
        last = self.shards - 1
        sizes = (
            SIZE if number < last else self.total - last * SIZE
            for number in range(self.shards)
            if self._rows(number).exists()
        )
        return sum(sizes)

    def write(
        self, number: int, rows: Sequence[ScoreRow], features: Features | None = None
    ) -> None:
        """A shard is done. The rows' rename is the moment.

        Args:
            number: Of the shard.
            rows: Of its inputs, in order.
            features: float32 [rows, D]; of a broken image nan.
        """
        with self._guard():
            if features is not None:
                with write_aside(self._features(number)) as aside, aside.open("wb") as file:
                    np.save(file, features)
            with write_aside(self._rows(number)) as aside, aside.open("w", encoding="ascii") as out:
                out.writelines(row.to_json() for row in rows)

    def read(self, number: int) -> tuple[list[ScoreRow], Features | None]:
        """What was written."""
        with self._guard():
            with self._rows(number).open(encoding="ascii") as file:
                rows = [ScoreRow.from_json(line) for line in file]
            path = self._features(number)
            return rows, np.load(path) if path.exists() else None

    def remove(self) -> None:
        """The table is whole: nothing of this is needed any more."""
        with self._guard():
            self._clear()

    def _begin(self, facts: Any) -> None:
        path = self.folder / _JOB
        if not path.exists():
            self._clear()  # what a removal that was killed has left
            with write_aside(path) as aside:
                aside.write_text(json.dumps(facts))
            return
        try:
            before = dict(json.loads(path.read_text()))
        except ValueError:
            before = {"job": "unreadable"}
        for key in [key for key in {**before, **facts} if before.get(key) != facts.get(key)]:
            raise OptionError(
                f"--out {self._out}: a job that was not finished lies there, with "
                f"{key} = {_short(before.get(key))}, now {_short(facts.get(key))}; go on as then, "
                "or add --restart"
            )

    def _count(self) -> None:
        if self.known:
            with (self.folder / _INPUTS).open("rb") as file:
                self.total = sum(1 for _ in file)
            self.skipped = int(json.loads((self.folder / _SKIPPED).read_text()))

    def _alone(self) -> None:
        """Two at the same job would do it twice, and clear each other's folder."""
        with contextlib.ExitStack() as opened:  # closed again, unless it is locked
            file = opened.enter_context((self.folder / _LOCK).open("w"))
            try:
                lock(file.fileno(), wait=False)
            except NoLocks:  # nobody is kept out
                return
            except (BlockingIOError, PermissionError) as error:
                raise OptionError(
                    f"--out {self._out}: another process is at work on it; wait, or name another"
                ) from error
            self._lock = opened.pop_all()

    def _clear(self) -> None:
        # The job goes first: without it the rest is nobody's.
        (self.folder / _JOB).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def _rows(self, number: int) -> Path:
        return self.folder / f"{number:05}.jsonl"

    def _features(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkError(
                f"--out {self._out}: {error.strerror or error}; what is done is kept in "
                f"{self.folder}"
            ) from error


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
