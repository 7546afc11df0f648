"""Check that an ONNX file is complete in itself: no tensor or node reads another file.

ONNX Runtime opens the files that a graph names, also files outside the bundle: their content would
be part of the model, and no checksum covers it. The check reads the file's protobuf messages field
by field. The data of the tensors is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from serving.errors import BundleError

_MAX_FIELDS: Final = 5_000_000  # read in about 3 s; a network has some ten thousand

_Message = Mapping[int, str]
"""Kind of the message in each field that can contain a tensor or a node, by field number."""

# Field numbers of onnx.proto.
_MESSAGES: Final[Mapping[str, _Message]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor
_OP_TYPE: Final = 4  # of a node
_COMPILED: Final = b"EPContext"  # a node that names a file of compiled code

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups (3, 4) are not in ONNX


def check(graph: Path, data: bytes) -> None:
    """Check the content of an ONNX file.

    Args:
        graph: Path of the file, for messages.
        data: Content of the file.

    Raises:
        BundleError: The graph names another file, or `data` is no ONNX file.
    """
    messages = [("model", 0, len(data))]
    number = 0
    try:
        while messages:
            kind, start, end = messages.pop()
            inner = _MESSAGES[kind]
            for field, wire, first, last in _fields(data, start, end):
                number += 1
                if number > _MAX_FIELDS:
                    raise ValueError("it has too many fields")
                if kind == "tensor" and field in (_EXTERNAL_DATA, _DATA_LOCATION):
                    # A location of 0 states that the data is in the tensor.
                    if wire != _VARINT or any(data[first:last]):
                        raise BundleError(
                            f"{graph} keeps weights in another file, which no checksum covers; "
                            "export the model again"
                        )
                elif kind == "node" and field == _OP_TYPE and data[first:last] == _COMPILED:
                    raise BundleError(f"{graph} runs compiled code; export the model again")
                elif field in inner:
                    if wire != _BYTES:
                        raise ValueError("a message has another type")
                    messages.append((inner[field], first, last))
    except (IndexError, ValueError) as error:
        reason = "it is cut off" if isinstance(error, IndexError) else error
        raise BundleError(f"{graph} can't be loaded: no ONNX file: {reason}") from error


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield field number, wire type, start and end of the value of each field of a message.

    Raises:
        IndexError, ValueError: The bytes are no protobuf message.
    """
    while at < end:
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if key >= 2**32 or not field:
            raise ValueError("a field has no valid number")
        first = at
        if wire == _VARINT:
            _, at = _varint(data, at)
        elif wire == _BYTES:
            length, first = _varint(data, at)
            at = first + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("a field has an unknown type")
        if at > end:
            raise IndexError
        yield field, wire, first, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while byte >= 0x80:
        at += 1
        if shift > 63:
            raise ValueError("a number has too many digits")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift += 7
    return value, at + 1
