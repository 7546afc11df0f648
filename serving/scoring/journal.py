"""Journal of a scoring job: a folder beside the table, from which an interrupted job is resumed.

    .OUT.parts/
      lock                held by the running process; its content marks the folder as a journal
      job.json            values that determine the rows: bundle, options, requested inputs
      inputs.jsonl        names of the images that were found, one in each line, in order
      inputs.json         number of images, checksum of the names of each shard, number of
                          folders, archives and lists that could not be read, and counts of what
                          was passed over
      00000.jsonl         a line with checksums, and the table rows of the first 1,000 images;
                          exists only when complete
      00000.npy           features of these images, if requested; written before the rows

OUT is the name of the table. A shard is 1,000 images. A resumed job scores an incomplete shard
again from its first image. The same images therefore always form the same batches.

A list of images that was cut or changed is refused. A shard that was cut or changed when the job is
resumed is scored again. The rows of a shard are read only if they are those of its images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.errors import OptionError, WorkError
from serving.inputs.passed_over import PassedOver
from serving.scoring.journal_folder import JOB, JournalFolder, folder_of, open_file
from serving.scoring.rows import Features, ScoreRow
from serving.utils.files import atomic_write

SIZE: Final = 1000
"""Number of images in a shard; the last shard may have fewer."""

VERSION: Final = 2
"""Version of the files' content. A job of another version can't be resumed."""

_INPUTS: Final = "inputs.jsonl"
_COUNTS: Final = "inputs.json"
_MODE: Final = 0o600

# What JSON, text and numpy's array files raise for damaged content.
_DAMAGED: Final = (
    *(ValueError, TypeError, LookupError, EOFError, MemoryError, RecursionError, SyntaxError),
    tokenize.TokenError,
)


def has_inputs(out: Path) -> bool:
    """Check whether an unfinished job for the table `out` has the complete list of its images."""
    return (folder_of(out) / _INPUTS).exists()


class ScoringJournal:
    """Journal folder of one job. A context manager that holds a lock on the folder.

    Attributes:
        folder: The journal folder.
        total: Number of images; 0 until `write_inputs` was called.
        skipped: Number of folders, archives and lists that could not be read.
        passed_over: Counts of files and folders that were passed over.
        damaged: Number of shards that were found cut or changed, and are scored again.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], *, restart: bool = False) -> None:
        """Lock the journal folder, and resume the job in it or begin a new one.

        Args:
            out: Path of the table.
            facts: Values that determine the rows, such as the bundle and the options, as JSON.
            restart: Whether to discard an unfinished job.

        Raises:
            OptionError: Another process holds the lock, the unfinished job has different `facts` or
                is damaged, or what lies at the path of the folder is no journal of this user.
            WorkError: The folder can't be written.
        """
        self.folder = folder_of(out)
        self.total = self.skipped = self.damaged = 0
        self.passed_over = PassedOver()
        self._out = out
        self._digests: list[str] = []
        self._complete: set[int] = set()
        with self._work_errors():
            self._locked = JournalFolder(out)
            try:
                if restart:
                    self._locked.clear()
                self._begin({"journal": VERSION, **json.loads(json.dumps(facts))})
                if self.known:
                    self._verify()
            except BaseException:
                self._locked.release()
                raise

    def __enter__(self) -> ScoringJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self._locked.release()

    @property
    def known(self) -> bool:
        """Whether the list of images is complete."""
        return (self.folder / _INPUTS).exists()

    def write_inputs(
        self,
        names: Iterable[str],
        skipped: Sequence[str] = (),
        passed_over: PassedOver | None = None,
    ) -> None:
        """Write the list of images.

        Args:
            names: Names of the images, in order.
            skipped: Messages about folders, archives and lists that could not be read. Read after
                `names` is exhausted, so it may grow during the iteration.
            passed_over: Counts of what was passed over; they may grow, too.

        Raises:
            WorkError: The list can't be written.
        """
        path, iterator = self.folder / _INPUTS, iter(names)
        total, digests = 0, list[str]()
        passed_over = PassedOver() if passed_over is None else passed_over
        with self._work_errors():
            with atomic_write(path, _MODE) as partial, partial.open("wb") as file:
                while shard := list(islice(iterator, SIZE)):
                    lines = _lines(shard)
                    file.write(lines)
                    total += len(shard)
                    digests.append(_sha256(lines))
                counts = {
                    "images": total,
                    "skipped": len(skipped),
                    **({"passed_over": passed_over.to_json()} if passed_over else {}),
                    "sha256": digests,
                }
                with atomic_write(self.folder / _COUNTS, _MODE) as partial_counts:
                    partial_counts.write_text(json.dumps(counts))
            self.total, self.skipped, self._digests = total, len(skipped), digests
            self.passed_over = passed_over

    def todo(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number and the image names of each incomplete shard, in order.

        Raises:
            OptionError: The list of images is damaged.
            WorkError: The list of images can't be read.
        """
        with self._work_errors(), self._damage(self.folder / _INPUTS):
            for number, lines in self._read_inputs():
                if number not in self._complete:
                    yield number, [_name(line) for line in lines]

    def _read_inputs(self) -> Iterator[tuple[int, list[bytes]]]:
        """Yield the number and the lines of each shard of the list of images.

        Raises:
            ValueError: The list was cut or changed.
        """
        with open_file(self.folder / _INPUTS) as file:
            for number, digest in enumerate(self._digests):
                lines = list(islice(file, self._size(number)))
                if len(lines) != self._size(number) or _sha256(b"".join(lines)) != digest:
                    raise ValueError(f"it was cut or changed after {number * SIZE} images")
                yield number, lines
            if file.read(1):
                raise ValueError(f"it has more than its {self.total} images")

    def _size(self, number: int) -> int:
        """Return the number of images of a shard."""
        return min(SIZE, self.total - number * SIZE)

    @property
    def shards(self) -> int:
        """Number of shards of the job, complete or not."""
        return -(-self.total // SIZE)

    @property
    def done(self) -> int:
        """Number of images in complete shards."""
        return sum(map(self._size, self._complete))

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
            WorkError: A file can't be written, or the rows are not those of the shard's images.
        """
        if not self._are_rows_of(number, rows):
            raise WorkError(
                f"--out {self._out}: the rows of shard {number} are not those of its images; this "
                "is a fault of Fledge, please report it"
            )
        digest = None if features is None else _sha256(np.ascontiguousarray(features).data)
        body = "".join(row.to_json() for row in rows).encode("ascii")
        head = json.dumps(self._head(number, body, digest)).encode("ascii")
        with self._work_errors():
            if features is not None:
                path = self._features(number)
                with atomic_write(path, _MODE) as partial, partial.open("wb") as array_file:
                    np.save(array_file, features)
            with atomic_write(self._rows(number), _MODE) as partial:
                partial.write_bytes(head + b"\n" + body)
        self._complete.add(number)

    def read(self, number: int) -> tuple[list[ScoreRow], Features | None]:
        """Return the rows and the features (None if not requested) of a complete shard.

        The rows are those of the shard's images, in order.

        Raises:
            OptionError: A file of the shard is damaged.
            WorkError: A file of the shard can't be read.
        """
        path, array = self._rows(number), self._features(number)
        with self._work_errors():
            with self._damage(path):
                body, digest = self._read_rows(number)
                rows = [ScoreRow.from_json(line) for line in body.decode("ascii").splitlines()]
                if not self._are_rows_of(number, rows):
                    raise ValueError("its rows are not those of the images")
            if digest is None:
                return rows, None
            with self._damage(array):
                return rows, self._read_features(number, digest)

    def _are_rows_of(self, number: int, rows: Sequence[ScoreRow]) -> bool:
        return _sha256(_lines([row.path for row in rows])) == self._digests[number]

    def _head(self, number: int, body: bytes, features: str | None) -> dict[str, object]:
        """Return the first line of a shard's file, as JSON.

        Args:
            number: Number of the shard.
            body: The other lines.
            features: Checksum of the features; None: not requested.
        """
        return {
            "rows": self._size(number),
            "inputs": self._digests[number],
            "sha256": _sha256(body),
            "features": features,
        }

    def _read_rows(self, number: int) -> tuple[bytes, str | None]:
        """Return the lines of a shard's rows, and the checksum of the features.

        ValueError is raised if the file was cut or changed, or belongs to other images.
        """
        first, _, body = _read(self._rows(number)).partition(b"\n")
        head = json.loads(first)
        features = head.get("features") if isinstance(head, dict) else None
        if head != self._head(number, body, features):
            raise ValueError("it was cut or changed")
        return body, features

    def _read_features(self, number: int, digest: str) -> Features:
        with open_file(self._features(number)) as file:
            # `np.load` would also read zip archives, and raise their errors.
            features: Features = np.lib.format.read_array(file)
        if features.dtype != np.float32 or features.shape[:-1] != (self._size(number),):
            raise ValueError(f"it is {features.dtype} {list(features.shape)}")
        if _sha256(np.ascontiguousarray(features).data) != digest:
            raise ValueError("it was changed")
        return features

    def remove(self) -> None:
        """Delete the job's files. To be called when the table is complete."""
        with self._work_errors():
            self._locked.clear()

    def _begin(self, facts: Any) -> None:
        path = self.folder / JOB
        if not path.exists():
            self._locked.clear()  # files of a removal that was killed
            with atomic_write(path, _MODE) as partial:
                partial.write_text(json.dumps(facts))
            return
        try:
            before = dict(json.loads(_read(path)))
        except (ValueError, TypeError, RecursionError):
            before = {"job": "unreadable"}
        if "job" not in before and before.get("journal") != VERSION:
            raise OptionError(
                f"--out {self._out}: an unfinished job of another version of Fledge exists there; "
                "finish it with that version, or add --restart"
            )
        for key in [key for key in {**before, **facts} if before.get(key) != facts.get(key)]:
            raise OptionError(
                f"--out {self._out}: an unfinished job exists there with {key} = "
                f"{_short(before.get(key))}, now {_short(facts.get(key))}; use the same options "
                "and inputs, or add --restart"
            )

    def _verify(self) -> None:
        """Read the counts, compare the list of images with them, and find the complete shards."""
        path = self.folder / _COUNTS
        with self._damage(path):
            values = json.loads(_read(path) if path.exists() else b"")
            images, skipped, digests = (values[key] for key in ("images", "skipped", "sha256"))
            if not all(type(value) is int and value >= 0 for value in (images, skipped)):
                raise ValueError("its counts are no numbers")
            if not isinstance(digests, list) or len(digests) != -(-images // SIZE):
                raise ValueError(f"it has no checksums of {images} images")
            # A job of an earlier version has no such counts.
            self.passed_over = PassedOver.from_json(values.get("passed_over", {}))
            self.total, self.skipped, self._digests = images, skipped, digests
        path = self.folder / _INPUTS
        with self._damage(path):
            for _ in self._read_inputs():
                pass
        for number in range(self.shards):
            try:
                _, digest = self._read_rows(number)
                if digest is not None:
                    self._read_features(number, digest)
            except FileNotFoundError:
                continue
            except _DAMAGED:
                self.damaged += 1
            else:
                self._complete.add(number)

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


def _read(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def _lines(names: Iterable[str]) -> bytes:
    """Return the lines of names in the list of images: JSON in ASCII."""
    return "".join(json.dumps(name) + "\n" for name in names).encode("ascii")


def _name(line: bytes) -> str:
    name = json.loads(line)
    if not isinstance(name, str):
        raise ValueError(f"{line.decode('ascii', 'replace').strip():.60} is no name of an image")
    return name


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
