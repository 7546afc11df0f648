"""Journal of a scoring job: a folder beside the table, from which an interrupted job is resumed.

    .OUT.parts/
      job.json            values that determine the rows: bundle, options, requested inputs
      inputs.jsonl        names of the images that were found, one in each line, in order
      skipped.json        number of folders, archives and lists that could not be read
      00000.jsonl         table rows of the first 1,000 images; exists only when complete
      00000.npy           features of these images, if requested; written before the rows

OUT is the name of the table. A shard is 1,000 images. A resumed job scores an incomplete shard
again from its first image. The same images therefore always form the same batches.
"""

from __future__ import annotations

import contextlib
import json
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.errors import OptionError, WorkError
from serving.scoring.rows import Features, ScoreRow
from serving.utils.files import NoLocks, atomic_write, lock

SIZE: Final = 1000
"""Number of images in a shard; the last shard may have fewer."""

_JOB: Final = "job.json"
_INPUTS: Final = "inputs.jsonl"
_SKIPPED: Final = "skipped.json"
_LOCK: Final = "lock"

# What JSON, text and numpy's array files raise for damaged content.
_DAMAGED: Final = (
    *(ValueError, TypeError, EOFError, MemoryError, RecursionError, SyntaxError),
    tokenize.TokenError,
)


def has_inputs(out: Path) -> bool:
    """Check whether an unfinished job for the table `out` has the complete list of its images."""
    return (_folder(out) / _INPUTS).exists()


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


class ScoringJournal:
    """Journal folder of one job. A context manager that holds a lock on the folder.

    Attributes:
        folder: The journal folder.
        total: Number of images; 0 until `write_inputs` was called.
        skipped: Number of folders, archives and lists that could not be read.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], *, restart: bool = False) -> None:
        """Lock the journal folder, and resume the job in it or begin a new one.

        Args:
            out: Path of the table.
            facts: Values that determine the rows, such as the bundle and the options, as JSON.
            restart: Whether to discard an unfinished job.

        Raises:
            OptionError: Another process holds the lock, or the unfinished job has different
                `facts`.
            WorkError: The folder can't be written.
        """
        self.folder = _folder(out)
        self.total = self.skipped = 0
        self._out = out
        self._lock = contextlib.ExitStack()
        with self._work_errors():
            self.folder.mkdir(exist_ok=True)
            self._acquire_lock()
            try:
                if restart:
                    self._clear()
                self._begin(json.loads(json.dumps(facts)))
                self._read_counts()
            except BaseException:
                self._release()
                raise

    def __enter__(self) -> ScoringJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        # Remove the folder if it has no job. The next run creates it again.
        if not (self.folder / _JOB).exists():
            with contextlib.suppress(OSError):
                (self.folder / _LOCK).unlink(missing_ok=True)
                self.folder.rmdir()
        self._lock.close()

    @property
    def known(self) -> bool:
        """Whether the list of images is complete."""
        return (self.folder / _INPUTS).exists()

    def write_inputs(self, names: Iterable[str], skipped: Sequence[str] = ()) -> None:
        """Write the list of images.

        Args:
            names: Names of the images, in order.
            skipped: Messages about folders, archives and lists that could not be read. Read after
                `names` is exhausted, so it may grow during the iteration.

        Raises:
            WorkError: The list can't be written.
        """
        path = self.folder / _INPUTS
        with self._work_errors():
            with atomic_write(path) as partial, partial.open("w", encoding="ascii") as file:
                file.writelines(json.dumps(name) + "\n" for name in names)
                with atomic_write(self.folder / _SKIPPED) as partial_count:
                    partial_count.write_text(str(len(skipped)))
            self._read_counts()

    def todo(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number and the image names of each incomplete shard, in order.

        Raises:
            OptionError: The list of images is damaged.
            WorkError: The list of images can't be read.
        """
        path = self.folder / _INPUTS
        with self._work_errors(), self._damage(path), path.open(encoding="ascii") as file:
            for number in range(self.shards):
                lines = list(islice(file, SIZE))
                if not self._rows(number).exists():
                    yield number, [_name(line) for line in lines]

    @property
    def shards(self) -> int:
        """Number of shards of the job, complete or not."""
        return -(-self.total // SIZE)

    @property
    def done(self) -> int:
        """Number of images in complete shards."""
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
        """Write the rows of a shard, which completes the shard.

        Args:
            number: Number of the shard, from 0.
            rows: Table rows of the shard's images, in order.
            features: Features of the images, float32 [rows, D], with nan for an image that could
                not be scored. None: not requested.

        Raises:
            WorkError: A file can't be written.
        """
        with self._work_errors():
            if features is not None:
                path = self._features(number)
                with atomic_write(path) as partial, partial.open("wb") as array_file:
                    np.save(array_file, features)
            path = self._rows(number)
            with atomic_write(path) as partial, partial.open("w", encoding="ascii") as file:
                file.writelines(row.to_json() for row in rows)

    def read(self, number: int) -> tuple[list[ScoreRow], Features | None]:
        """Return the rows and the features (None if not requested) of a complete shard.

        Raises:
            OptionError: A file of the shard is damaged.
            WorkError: A file of the shard can't be read.
        """
        path, array = self._rows(number), self._features(number)
        with self._work_errors():
            with self._damage(path), path.open(encoding="ascii") as file:
                rows = [ScoreRow.from_json(line) for line in file]
            if not array.exists():
                return rows, None
            with self._damage(array):
                features = np.load(array)
                if features.dtype != np.float32 or features.shape[:-1] != (len(rows),):
                    raise ValueError(f"it is {features.dtype} {list(features.shape)}")
        return rows, features

    def remove(self) -> None:
        """Delete the job's files. To be called when the table is complete."""
        with self._work_errors():
            self._clear()

    def _begin(self, facts: Any) -> None:
        path = self.folder / _JOB
        if not path.exists():
            self._clear()  # files of a removal that was killed
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(facts))
            return
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError, RecursionError):
            before = {"job": "unreadable"}
        for key in [key for key in {**before, **facts} if before.get(key) != facts.get(key)]:
            raise OptionError(
                f"--out {self._out}: an unfinished job exists there with {key} = "
                f"{_short(before.get(key))}, now {_short(facts.get(key))}; use the same options "
                "and inputs, or add --restart"
            )

    def _read_counts(self) -> None:
        if self.known:
            with (self.folder / _INPUTS).open("rb") as file:
                self.total = sum(1 for _ in file)
            path = self.folder / _SKIPPED
            with self._damage(path):
                self.skipped = int(path.read_text())

    def _acquire_lock(self) -> None:
        """Lock the journal folder.

        Without the lock, a second process could score the same job and delete the folder.
        """
        with contextlib.ExitStack() as opened:  # closes the file, unless it gets locked
            file = opened.enter_context((self.folder / _LOCK).open("w"))
            try:
                lock(file.fileno(), wait=False)
            except NoLocks:  # run without protection
                return
            except (BlockingIOError, PermissionError) as error:
                raise OptionError(
                    f"--out {self._out}: another process is writing it; wait, or name another file"
                ) from error
            self._lock = opened.pop_all()

    def _clear(self) -> None:
        # Delete job.json first. Without it, `_begin` discards the other files, so a kill here is
        # harmless.
        (self.folder / _JOB).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def _rows(self, number: int) -> Path:
        return self.folder / f"{number:05}.jsonl"

    def _features(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"

    @contextlib.contextmanager
    def _damage(self, path: Path) -> Iterator[None]:
        """Convert errors of the block that damaged content causes to an OptionError with a remedy.

        Args:
            path: The file that the block reads.
        """
        try:
            yield
        except _DAMAGED as error:
            reason = " ".join(str(error).split())
            raise OptionError(
                f"--out {self._out}: an unfinished job exists there, and {path} is damaged: "
                f"{reason:.200}; add --restart"
            ) from error

    @contextlib.contextmanager
    def _work_errors(self) -> Iterator[None]:
        """Convert an OSError in the block to a WorkError that names the table and the folder."""
        try:
            yield
        except OSError as error:
            raise WorkError(
                f"--out {self._out}: {error.strerror or error}; complete shards are kept in "
                f"{self.folder}"
            ) from error


def _name(line: str) -> str:
    name = json.loads(line)
    if not isinstance(name, str):
        raise ValueError(f"{line.strip():.60} is no name of an image")
    return name


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
