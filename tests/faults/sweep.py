"""Sweep the faults of a job: every file operation fails once, and ends the process once."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.faults import children
from tests.faults.children import Outcome
from tests.faults.file_operations import (
    ERRNOS,
    KILLED,
    READING,
    UNCHANGING,
    FileOperations,
    Operation,
)


class Job(Protocol):
    """A job whose file operations are swept. Its methods are called in child processes.

    Attributes:
        inputs: Folder of what the job reads and does not change; its operations don't fail.
        work: Folder that the job changes; it has the same path in every run.
        swept: Folder in `work` whose operations fail.
        ignored: Folders in `work` whose names of files may differ.
        optional: Files that a job may not make, if it says why.
    """

    inputs: Path
    work: Path
    ignored: Sequence[str]
    optional: Sequence[str]

    @property
    def swept(self) -> Path: ...

    def prepare(self) -> None:
        """Make the inputs, and an old result in `work`."""
        ...

    def run(self) -> int:
        """Run the job, and return its exit status."""
        ...

    def again(self) -> int:
        """Run the job again after a fault, as a user would, and return its exit status."""
        ...

    def result(self) -> dict[str, Any]:
        """Read the result as a user would; raise an exception if it is not whole.

        Returns:
            The parts of the result by name. Equal parts of different runs must be equal values.
        """
        ...

    def tolerates(self, operation: Operation) -> bool:
        """Whether the job may succeed after this operation failed, with a result that differs.

        It must then print why, if `says_why`.
        """
        ...

    def says_why(self, operation: Operation) -> bool:
        """Whether a job that succeeds with a result that differs prints why."""
        ...


@dataclass
class Report:
    """What a sweep did and found.

    Attributes:
        job: Name of the job.
        operations: Number of file operations of the job without a fault.
        errors: Number of runs in which an operation failed.
        kills: Number of operations before or in which the process ended. If the operation before
            changes nothing on the disk, its run counts for this one.
        kill_runs: Number of runs that were killed.
        found: A line for each violated law.
        seconds: CPU seconds of the sweep, with its child processes.
    """

    job: str
    operations: int = 0
    errors: int = 0
    kills: int = 0
    kill_runs: int = 0
    found: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _After:
    """State after a run: exit status, printed text, result, names of the files in `work`."""

    status: int
    output: str
    result: dict[str, Any]
    names: list[str]


class Sweep:
    """The sweep of one job, in a temporary folder."""

    def __init__(self, name: str, job: Job, base: Path) -> None:
        self.job, self.base = job, base
        self.report = Report(name)
        job.inputs, job.work = base / "inputs", base / "work"
        self._prepared = base / "prepared"
        # Hashes of the contents of `work` from which the job was run again.
        self._checked: set[str] = set()

    def start(self) -> None:
        """Prepare the job, and record its operations and its result."""
        job = self.job
        job.inputs.mkdir()
        job.work.mkdir()
        _must(children.call(job.prepare))
        job.work.rename(self._prepared)
        self._fresh()
        self.old = _must(children.call(job.result)).value

        def record() -> tuple[_After, list[Operation], list[str]]:
            with FileOperations(job.swept) as operations:
                status = job.run()
            return self._look(status), operations.operations, list(sys.modules)

        done = _must(children.call(record))
        after, self.operations, modules = done.value
        for name in modules:  # so that no other child has to import them
            with suppress(ImportError):
                importlib.import_module(name)
        self.new, self.names = after.result, after.names
        self.report.operations = len(self.operations)
        if after.status or self.new == self.old:
            raise RuntimeError(f"without a fault: {after}\n{done.output}")

    def errors(self, step: int, every_error: bool) -> None:
        """Let each operation fail, and run the job again in the same process.

        The job is run again once for the same files in `work`.

        Args:
            step: 1 takes every operation, 3 every third one.
            every_error: Fail with each error number, and not with one in turn.
        """
        cases = [
            (number, error)
            for place, number in enumerate(range(0, len(self.operations), step))
            for error in (ERRNOS if every_error else ERRNOS[place % len(ERRNOS) :][:1])
        ]

        def run() -> tuple[list[str], set[str]]:
            found = []
            for number, error in cases:
                kind, path = self.operations[number]
                at = f"{self.report.job}: {kind} {path} [{number}] {errno.errorcode[error]}"
                found += [f"{at}: {line}" for line in self._error(number, error)]
            return found, self._checked

        self.report.errors += len(cases)
        # One child for all: a fork takes longer than many a job.
        found, self._checked = _must(children.call(run)).value
        self.report.found += found

    def kills(self, step: int) -> None:
        """End the process at each operation, and run the job again in another process.

        Args:
            step: 1 takes every operation, 3 every third one.
        """
        kinds = [operation.kind for operation in self.operations]
        places = [
            number
            for number, kind in enumerate(kinds)
            if not number or kinds[number - 1] not in UNCHANGING or kind == "write"
        ][::step]
        self.report.kills = len(kinds) if step == 1 else len(places)
        self.report.kill_runs = len(places)
        for number in places:
            self._fresh()
            kind, path = self.operations[number]
            at = f"{self.report.job}: {kind} {path} [{number}] killed"
            self.report.found += [f"{at}: {line}" for line in self._kill(number)]

    def _error(self, number: int, error: int) -> Iterator[str]:
        self._fresh()
        _printed()
        try:
            with FileOperations(self.job.swept, number, error) as operations:
                status = self.job.run()
            after = self._look(status)
        except BaseException:
            yield f"exception\n{_printed()}\n{traceback.format_exc()}"
            return
        if not operations.failed:
            yield "the operation was not reached"
        yield from self._laws(after, self.operations[number], error)
        key = content_key(self.job.work, os.getpid())
        if key not in self._checked:
            self._checked.add(key)
            yield from self._again(self._look(self.job.again()))

    def _laws(self, after: _After, operation: Operation, error: int) -> Iterator[str]:
        """Yield the laws that the run with the fault violated."""
        tolerated = self.job.tolerates(operation)
        if not tolerated:
            yield from self._whole(after.result)
        lines = [line for line in after.output.splitlines() if line.startswith("fledge: ")]
        if after.status == 0:
            said = os.strerror(error) in after.output or not self.job.says_why(operation)
            if after.result != self.new and not (tolerated and said):
                parts = _difference(after.result, self.new)
                yield f"exit status 0 without the new result in {parts}\n{after.output}"
            if lines:
                yield f"exit status 0 with an error: {lines}"
            return
        if len(lines) != 1:
            yield f"exit status {after.status} with {len(lines)} lines of error\n{after.output}"
            return
        allowed = {1} if error != errno.EACCES and operation.kind not in READING else {1, 2, 78}
        if after.status not in allowed:
            yield f"exit status {after.status}: {lines[0]}"
        if str(self.job.work) not in lines[0]:
            yield f"the error names no file: {lines[0]}"
        if "nothing was changed" in lines[0] and after.result != self.old:
            yield f"something was changed: {lines[0]}"
        # flock's EACCES means that another process holds the lock, which the error says.
        if os.strerror(error) not in lines[0] and operation.kind != "lock":
            yield f"the error does not say why: {lines[0]}"

    def _whole(self, result: dict[str, Any]) -> Iterator[str]:
        """Yield the parts of a result that are neither the old nor the new one."""
        for name in sorted({*result, *self.old, *self.new}):
            if result.get(name) not in (self.old.get(name), self.new.get(name)):
                yield f"{name} is neither the old nor the new one: {str(result.get(name))[:200]}"

    def _again(self, again: _After) -> Iterator[str]:
        """Yield the laws that the run after the fault violated."""
        if again.status:
            yield f"again: exit status {again.status}\n{again.output}"
        elif again.result != self.new:
            yield f"again: another result in {_difference(again.result, self.new)}"
        elif again.names != self.names:
            stray, missing = set(again.names) - set(self.names), set(self.names) - set(again.names)
            if stray or missing - set(self.job.optional):
                yield f"again: left over {sorted(stray)}, missing {sorted(missing)}"

    def _kill(self, number: int) -> Iterator[str]:
        def run() -> None:
            with FileOperations(self.job.swept, number):
                self.job.run()

        done = children.call(run)
        if done.status != KILLED:
            yield f"was not killed: {done}"
            return
        key = content_key(self.job.work, done.pid)
        if key in self._checked:  # the same files as after another operation
            return
        self._checked.add(key)

        def look_and_run() -> tuple[dict[str, Any], _After]:
            return self.job.result(), self._look(self.job.again())

        again = children.call(look_and_run)
        if again.status:
            yield f"exception\n{again.output}\n{again.trace}"
            return
        result, after = again.value
        yield from self._whole(result)
        yield from self._again(after)

    def _fresh(self) -> None:
        """Put the prepared folder at the place of the work folder."""
        shutil.rmtree(self.job.work, ignore_errors=True)
        shutil.copytree(self._prepared, self.job.work, symlinks=True)

    def _look(self, status: int) -> _After:
        return _After(
            status, _printed(), self.job.result(), _names(self.job.work, self.job.ignored)
        )


def _printed() -> str:
    """Return what was printed since the last call."""
    output: str = sys.stdout.getvalue()  # type: ignore[attr-defined]
    sys.stdout.seek(0)
    sys.stdout.truncate()
    return output


def _names(folder: Path, ignored: Sequence[str]) -> list[str]:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    found = [path.as_posix() for path in paths if path.parts[0] not in ignored]
    # Names that differ from run to run.
    return sorted({re.sub(r"[0-9a-f]{12,}|\d{10}\.\d{6}", "*", name) for name in found})


def content_key(folder: Path, pid: int) -> str:
    """Hash the names and contents of all files, without process ids and random numbers."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix().replace(f"-{pid}", "-PID")
        digest.update(re.sub(r"\b[0-9a-f]{16}\b", "*", name).encode("utf-8", "surrogateescape"))
        if path.is_file():
            content = path.read_bytes()
            digest.update(re.sub(rb"\b[0-9a-f]{16}\b", b"*", content) + b"\0%d" % len(content))
    return digest.hexdigest()


def _difference(value: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in sorted({*value, *other}) if value.get(key) != other.get(key)]


def _must(done: Outcome) -> Outcome:
    if done.status:
        raise RuntimeError(f"{done.output}\n{done.trace}")
    return done


def sweep(
    name: str,
    job: Job,
    *,
    step: int = 1,
    every_error: bool = False,
    kinds: Sequence[str] = ("errors", "kills"),
) -> Report:
    """Sweep a job, and return what was found.

    Args:
        name: Name of the job.
        job: The job.
        step: 1 takes every operation, 3 every third one.
        every_error: Fail with each error number, and not with one in turn.
        kinds: "errors", "kills" or both.
    """
    before = _cpu_seconds()
    with tempfile.TemporaryDirectory(prefix="fledge-faults-") as folder:
        run = Sweep(name, job, Path(folder).resolve())
        run.start()
        if "errors" in kinds:
            run.errors(step, every_error)
        if "kills" in kinds:
            run.kills(step)
    run.report.seconds = round(_cpu_seconds() - before, 1)
    return run.report


def _cpu_seconds() -> float:
    return sum(os.times()[:4])
