"""Write pictures to files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from serving.utils.files import atomic_write


def write_picture(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write a picture file atomically.

    Args:
        path: The file.
        save: Function that writes the picture into a file in memory. Given the file on disk, Pillow
            would write it by code of its own, whose error on a full disk is "encoder error -2".

    Raises:
        OSError: The file can't be written. The error has the reason and the path.
    """
    file = io.BytesIO()
    save(file)
    with atomic_write(path) as partial:
        partial.write_bytes(file.getvalue())
