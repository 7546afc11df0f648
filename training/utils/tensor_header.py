"""Read the header of a .safetensors file, within limits and without the tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from serving.utils import json_reader
from serving.utils.json_reader import JsonError
from serving.utils.regular_files import open_regular

_MAX_HEADER: Final = 2**23  # bytes; the largest network has 9,000 tensors in a resume state: 1 MB
_MAX_DIMENSIONS: Final = 8
_LENGTH: Final = 8  # bytes of the number at the start, which is the length of the header

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**48)]


class _TensorEntry(TypedDict):
    dtype: str
    shape: Annotated[list[_Count], Field(max_length=_MAX_DIMENSIONS)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


_ENTRY: Final = TypeAdapter(_TensorEntry)
_METADATA: Final = TypeAdapter(dict[str, str])


class TensorHeader(NamedTuple):
    """Header of a .safetensors file.

    Attributes:
        shapes: Shape of each tensor, by name.
        metadata: Texts that were written with the tensors.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> TensorHeader:
    """Read the header of a .safetensors file without the tensors.

    Raises:
        OSError: The file can't be read, or is no regular file.
        ValueError: The header is damaged or too long, or states more bytes than the file has.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH), "little")
        if length > _MAX_HEADER:
            raise JsonError(f"its header has more than {_MAX_HEADER:,} bytes")
        values: Any = json_reader.parse(file.read(length))
    if not isinstance(values, dict):
        raise JsonError("its header is no object")
    metadata = json_reader.validate(values.pop("__metadata__", {}), _METADATA)
    shapes = {}
    for name, value in values.items():
        entry = json_reader.validate(value, _ENTRY)
        start, end = entry["data_offsets"]
        if not start <= end <= size - _LENGTH - length:
            raise JsonError(f"{name!r:.80} lies outside of the file")
        shapes[name] = tuple(entry["shape"])
    return TensorHeader(shapes, metadata)
