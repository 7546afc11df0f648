"""Count the file operations of a job, and make one of them fail or end the process there.

The functions of `os`, `open` and the written bytes of Python's files are replaced while a
`FileOperations` is active. Operations outside of its folder are not counted and never fail. Three
libraries would write by native code, which these replacements don't see. They are made to write
through Python's files: pyarrow's Parquet writer, `np.save`, and Pillow's encoders.

Not counted are memory-mapped files (`torch.from_file`, `np.memmap`), what native code reads
(ONNX Runtime, safetensors), and calls that ask for a file's size or existence.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

KILLED: Final = 86
"""Exit status of a process that ended at an operation."""

ERRNOS: Final = (errno.ENOSPC, errno.EIO, errno.EACCES)

READING: Final = frozenset({"read", "list"})
"""Operations that get data or names from the disk."""

UNCHANGING: Final = READING | {"lock", "fsync", "utime"}
"""Operations after which the disk has the same content."""

_GROWING: Final = frozenset({"open", "write", "allocate", "mkdir", "symlink", "link"})
"""Operations that fail on a full disk."""
_WITHOUT_NAME: Final = frozenset({"write", "truncate", "allocate", "fsync", "lock"})
"""Operations on an open file, whose errors name no file."""


class Operation(NamedTuple):
    """A file operation: its kind, such as "open" or "rename", and the path below the folder."""

    kind: str
    path: str


@dataclass
class FileOperations:
    """Counts the file operations below a folder. A context manager; not reentrant.

    Attributes:
        folder: The folder. Operations outside of it are ignored.
        fail_at: Number of the operation, from 0, that fails; None: none.
        error: Error number of the failure. A disk that is full (ENOSPC) stays full: later
            operations that need space fail, too. None: the process ends with the status `KILLED`,
            without any cleanup. A write fails, or ends the process, after half of its bytes.
        operations: The operations so far.
    """

    folder: Path
    fail_at: int | None = None
    error: int | None = None
    operations: list[Operation] = field(default_factory=list)
    _paths: dict[int, str] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> FileOperations:
        self._prefix = os.path.realpath(self.folder) + os.sep
        self._active = _replacements(self)
        self._active.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._active.__exit__(None, None, None)

    @property
    def failed(self) -> bool:
        """Whether the operation `fail_at` was reached."""
        return self.fail_at is not None and len(self.operations) > self.fail_at

    def below(self, path: Any, folder: int | None = None) -> str | None:
        """Return the path relative to the folder; None if it lies outside.

        Args:
            path: A path, or the descriptor of an open file or folder.
            folder: Descriptor of the folder that `path` is relative to.
        """
        if isinstance(path, int):
            return self._paths.get(path)
        text = os.fsdecode(path)
        if folder is not None:
            parent = self._paths.get(folder)
            return None if parent is None else os.path.join(parent, text)
        text = os.path.abspath(text)
        return text.removeprefix(self._prefix) if text.startswith(self._prefix) else None

    def opened(self, file: int, path: str) -> None:
        """Remember the path of an open file."""
        self._paths[file] = path

    def closed(self, file: int) -> None:
        """Forget an open file."""
        self._paths.pop(file, None)

    def meet(self, kind: str, path: str | None, half: Callable[[], object] = lambda: None) -> None:
        """Count an operation before it is done, and fail or end the process if it is its turn.

        Args:
            kind: Kind of the operation.
            path: Path relative to the folder; None: the operation is not counted.
            half: Does the first half of the operation; called before a failure.
        """
        if path is None:
            return
        with self._lock:
            number = len(self.operations)
            self.operations.append(Operation(kind, path))
        if self.fail_at is None or number < self.fail_at:
            return
        full = self.error == errno.ENOSPC and kind in _GROWING
        if number > self.fail_at and not full:
            return
        if number == self.fail_at:
            half()
        if self.error is None:
            os._exit(KILLED)
        name = () if kind in _WITHOUT_NAME else (str(self.folder / path),)
        raise OSError(self.error, os.strerror(self.error), *name)


class _File(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, operations: FileOperations, path: str, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._operations, self._path = operations, path
        self._failure: OSError | None = None
        operations.opened(self.fileno(), path)

    def write(self, data: Any) -> int:
        view, write = memoryview(data).cast("B"), super().write
        half = view[: len(view) // 2]
        if self._failure is None:
            try:
                self._operations.meet("write", self._path, lambda: write(half))
            except OSError as error:
                # As of the system: the call that wrote half succeeds, and the next one fails.
                self._failure = error
                return len(half) or self.write(data)
            return write(data)
        failure, self._failure = self._failure, None
        raise failure

    def truncate(self, size: int | None = None) -> int:
        self._operations.meet("truncate", self._path)
        return super().truncate(size)

    def close(self) -> None:
        if not self.closed:
            self._operations.closed(self.fileno())
        super().close()


@contextmanager
def _replacements(operations: FileOperations) -> Iterator[None]:
    """Replace the functions that work on files."""
    with mock.patch.multiple(os, **_os_functions(operations)), _native(operations):
        opened = _open(operations)
        flock = fcntl.flock

        def lock(file: Any, how: int) -> None:
            number = file if isinstance(file, int) else file.fileno()
            operations.meet("lock", operations.below(number))
            flock(file, how)

        with (
            mock.patch.object(builtins, "open", opened),
            mock.patch.object(io, "open", opened),
            mock.patch.object(fcntl, "flock", lock),
        ):
            yield


def _open(operations: FileOperations) -> Callable[..., Any]:
    """Return a replacement of `open`."""
    real = io.open

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        path = None if isinstance(file, int) else operations.below(file)
        writes = bool(set(mode) & set("wax+"))
        operations.meet("open" if writes else "read", path)
        if path is None or not writes:
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _File(operations, path, file, mode.translate({ord("b"): "", ord("t"): ""}), closefd,
                    opener)  # fmt: skip
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)  # type: ignore[operator]
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    return opened


def _os_functions(operations: FileOperations) -> dict[str, Callable[..., Any]]:
    """Return replacements of functions of `os`, by name."""
    below, meet = operations.below, operations.meet

    def of_path(name: str, kind: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def replaced(path: Any = ".", *arguments: Any, **named: Any) -> Any:
            meet(kind, below(path, named.get("dir_fd")))
            return real(path, *arguments, **named)

        return replaced

    def of_two(name: str, kind: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def replaced(source: Any, target: Any, *arguments: Any, **named: Any) -> Any:
            meet(kind, below(target))
            return real(source, target, *arguments, **named)

        return replaced

    def opened(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        name = below(path, named.get("dir_fd"))
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        meet("open" if writes else "read", name)
        file = real_open(path, flags, *arguments, **named)
        if name is not None:
            operations.opened(file, name)
        elif path != os.devnull and below(str(path) + os.sep + "x") is not None:
            operations.opened(file, "")  # the folder itself
        return file

    def close(file: int) -> None:
        operations.closed(file)
        real_close(file)

    def fsync(file: Any) -> None:
        # Nothing is flushed: the disk's content is looked at on a machine that keeps running.
        meet("fsync", below(file if isinstance(file, int) else file.fileno()))

    def write(file: int, data: Any) -> int:
        view = memoryview(data).cast("B")
        meet("write", below(file), lambda: real_write(file, view[: len(view) // 2]))
        return real_write(file, data)

    real_open, real_close, real_write = os.open, os.close, os.write
    kinds = {
        "mkdir": "mkdir", "unlink": "unlink", "remove": "unlink", "rmdir": "rmdir",
        "truncate": "truncate", "ftruncate": "truncate", "posix_fallocate": "allocate",
        "listdir": "list", "scandir": "list", "utime": "utime",
    }  # fmt: skip
    two = ("replace", "rename", "symlink", "link")
    return {
        "open": opened, "close": close, "fsync": fsync, "write": write,
        **{name: of_path(name, kind) for name, kind in kinds.items()},
        **{name: of_two(name, name) for name in two},
    }  # fmt: skip


@contextmanager
def _native(operations: FileOperations) -> Iterator[None]:
    """Let the writers in native code write through Python's files; count the exchanges of folders.

    Only libraries that are loaded already are changed.
    """
    modules = sys.modules
    patches: list[Any] = []
    if "numpy.lib._format_impl" in modules:
        patches.append(
            mock.patch.object(modules["numpy.lib._format_impl"], "isfileobj", return_value=False)
        )
    if "PIL.ImageFile" in modules:
        encode = modules["PIL.ImageFile"]._encode_tile

        def encode_tile(im: Any, fp: Any, tile: Any, size: int, *_: Any) -> None:
            encode(im, fp, tile, size, None, io.UnsupportedOperation())

        patches.append(mock.patch.object(modules["PIL.ImageFile"], "_encode_tile", encode_tile))
    if "serving.utils.files" in modules:
        files = modules["serving.utils.files"]
        # As in a new process, which looks for leftovers in each folder once.
        files._swept.clear()
        real_exchange = files.exchange

        def exchange(one: Path, other: Path) -> bool:
            operations.meet("exchange", operations.below(other))
            return real_exchange(one, other)

        patches.append(mock.patch.object(files, "exchange", exchange))
    if "pyarrow.parquet" in modules:
        real_writer = modules["pyarrow.parquet"].ParquetWriter
        patches.append(
            mock.patch.object(modules["pyarrow.parquet"], "ParquetWriter", _parquet(real_writer))
        )
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        if "serving.utils.files" in modules:
            modules["serving.utils.files"]._swept.clear()


def _parquet(real: Any) -> Callable[..., Any]:
    class Writer:
        def __init__(self, path: Path, schema: Any) -> None:
            self._file = open(path, "wb")  # noqa: SIM115
            self._writer = real(self._file, schema)
            self.write_table = self._writer.write_table

        def close(self) -> None:
            try:
                self._writer.close()
            finally:
                self._file.close()

    return Writer
