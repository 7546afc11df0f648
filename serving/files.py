"""Writing aside: a file or folder has its name when it is whole, and never before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Give a path to write a file to; flush it to the disk and rename it to `path` at the end.

    On any error it is removed, and an older `path` stays as it was. A kill leaves `.NAME.partial`,
    which the next write of `path` replaces.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        with aside.open("r+b") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether a process of this number runs here."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
