"""Read the directories of TIFF files, and of EXIF data, which have the same form.

Pillow makes a Python object of each value of a tag, except of bytes and texts, and libtiff decodes
each strip or tile as often as the directory names it. So a file can cost far more than its pixels;
`Directory` counts this before the file is opened.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import numpy as np

from serving.errors import BrokenImage

ENTRIES: Final = 4_096
"""Largest number of entries of a directory."""

# Bytes of a value of each kind (field type). Values of these kinds become one object of bytes or
# text: BYTE, ASCII, UNDEFINED.
_SIZES: Final = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8},
    **{13: 4, 16: 8, 17: 8, 18: 8},
}
_BYTES: Final = frozenset({1, 2, 7})

OFFSETS: Final = frozenset({273, 324})  # of strips, of tiles
_COUNTS: Final = frozenset({279, 325})
_WHOLE: Final = {3: "u2", 4: "u4", 16: "u8"}  # kinds of offsets and byte counts

# Directories that Pillow reads with the first one: EXIF, GPS, and interoperability in EXIF.
_DIRECTORIES: Final = frozenset({34665, 34853, 40965})
_MAX_DIRECTORIES: Final = 6
_SHARED: Final = 8
_UNKNOWN: Final = 2**63


class TiffEntry(NamedTuple):
    """An entry of a directory.

    Attributes:
        tag, kind: Tag and field type.
        number: Number of values.
        value: The value; meaningful only if there is one of at most 4 bytes (8 in a BigTIFF).
        at: Offset of the values in the file.
    """

    tag: int
    kind: int
    number: int
    value: int
    at: int


class Metadata(NamedTuple):
    """What the tags of a TIFF or of EXIF data cost.

    Attributes:
        values: Number of values that become objects, offsets and byte counts of strips left out.
        size: Bytes of the values that stand outside of the directories.
    """

    values: int
    size: int


def variants(data: bytes) -> set[bool]:
    """Return whether to read a file as BigTIFF; both where Pillow and libtiff may differ."""
    # Pillow reads a BigTIFF of the other byte order as 32-bit, but libtiff doesn't.
    return {data[2:3] == b"+", b"+" in data[2:4]}


def tiff_entries(data: bytes, big: bool, start: int | None = None) -> Iterator[TiffEntry]:
    """Yield the entries of a directory.

    Args:
        data: The encoded file.
        big: Whether to read the file as BigTIFF, with 64-bit offsets.
        start: Offset of the directory. None: of the first one.

    Raises:
        BrokenImage: The directory has more than `ENTRIES` entries.
    """
    order = "<" if data[:1] == b"I" else ">"
    if big:
        head, count, entry, width = "8xQ", "Q", "HHQ8s", 8
    else:
        head, count, entry, width = "4xI", "H", "HHI4s", 4
    try:
        if start is None:
            (start,) = struct.unpack_from(order + head, data)
        (number,) = struct.unpack_from(order + count, data, min(start, len(data)))
    except struct.error:
        return
    start += struct.calcsize(order + count)
    size = struct.calcsize(order + entry)
    if min(number, len(data) // size) > ENTRIES:
        raise BrokenImage(f"the image is broken: more than {ENTRIES} entries of its directory")
    table = data[start : start + size * number]
    table = table[: len(table) // size * size]  # complete entries only
    byte_order: Literal["little", "big"] = "little" if order == "<" else "big"
    for tag, kind, values, raw in struct.iter_unpack(order + entry, table):
        start += size
        length = _SIZES.get(kind, width)
        inside = length * values <= width
        at = start - width if inside else int.from_bytes(raw, byte_order)
        yield TiffEntry(tag, kind, values, int.from_bytes(raw[:length], byte_order), at)


def metadata(data: bytes, big: bool) -> Metadata:
    """Count the values of the first directory and of those that Pillow reads with it.

    Args:
        data: A TIFF, or EXIF data without the word before it.
        big: As in `tiff_entries`.

    Raises:
        BrokenImage: A directory has more than `ENTRIES` entries.
    """
    values = size = 0
    starts: list[int | None] = [None]
    for start in starts:  # grows
        for entry in tiff_entries(data, big, start):
            length = entry.number * _SIZES.get(entry.kind, 8)
            size += length if length > 8 else 0
            strips = start is None and entry.tag in OFFSETS | _COUNTS and entry.kind in _WHOLE
            if entry.kind not in _BYTES and not strips:
                values += entry.number
            if entry.tag in _DIRECTORIES:
                starts.append(entry.value)
        if len(starts) > _MAX_DIRECTORIES:
            return Metadata(_UNKNOWN, _UNKNOWN)
    return Metadata(values, size)


def tags_share_bytes(data: bytes) -> bool:
    """Return whether tags of EXIF data or of a JPEG's index of pictures (MPF) share many bytes.

    Not every version of Pillow limits what it reads of them to the size of the data.
    """
    try:
        entries = list(tiff_entries(data, False))
    except BrokenImage:
        return True
    sizes = [one.number * _SIZES.get(one.kind, 8) for one in entries]
    return sum(size for size in sizes if size <= len(data)) > _SHARED * len(data)


def strips_share_bytes(data: bytes, big: bool) -> bool:
    """Return whether strips or tiles may share bytes, so that they are decoded several times.

    Also true where offsets or byte counts are missing, repeated, or of an unusual form, so that
    libtiff guesses them.
    """
    entries = [one for one in tiff_entries(data, big) if one.tag in OFFSETS | _COUNTS]
    if sorted(one.tag in OFFSETS for one in entries) != [False, True]:
        return True
    (first, second) = entries
    if (
        not first.number
        or first.number != second.number
        or not {first.kind, second.kind} <= _WHOLE.keys()
    ):
        return True
    lengths = first if first.tag in _COUNTS else second
    if lengths.at + lengths.number * _SIZES[lengths.kind] > len(data):
        return True
    order = "<" if data[0] == 73 else ">"
    coded = np.frombuffer(data, order + _WHOLE[lengths.kind], lengths.number, lengths.at)
    return float(coded.sum(dtype=np.float64)) > len(data)
