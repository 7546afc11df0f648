"""Write tensors to a .safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from serving.errors import WorkError
from serving.utils.files import atomic_write


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous tensors to `path` atomically.

    The file's bytes are made in memory. `safetensors.torch.save_file` would need no memory, but
    since version 0.8 it writes to a file of a random name beside `path`, which a killed process
    leaves there for ever, and only the user who wrote the file can read it.

    Args:
        path: The file.
        tensors: The tensors by name.
        metadata: Texts for the file's header.

    Raises:
        WorkError: The file can't be written, for example because the disk is full. An older file
            stays.
    """
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(save(dict(tensors), metadata))
    except OSError as error:
        raise WorkError(f"{path} can't be written: {error.strerror or error}") from error
