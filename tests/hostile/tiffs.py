"""Builders of TIFFs that are cheap to send and expensive to open or to decode."""

from __future__ import annotations

import struct
import zlib
from typing import Final

SHORT, LONG, RATIONAL = 3, 4, 5
_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1}
_FORMS: Final = {1: "B", 2: "c", 3: "H", 4: "I", 5: "Q", 7: "B"}

Tag = tuple[int, int, bytes]
"""Field type, number of values, and the values."""


def numbers(kind: int, *values: int) -> Tag:
    """A tag of the given values."""
    return kind, len(values), struct.pack(f"<{len(values)}{_FORMS[kind]}", *values)


def directory(tags: dict[int, Tag], at: int) -> bytes:
    """A directory that stands at the offset `at`, and behind it its values."""
    entries, values = b"", b""
    behind = at + 2 + 12 * len(tags) + 4
    for tag, (kind, count, raw) in sorted(tags.items()):
        inside = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack("<I", behind + len(values))
        values += raw if len(raw) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, count) + inside
    return struct.pack("<H", len(tags)) + entries + bytes(4) + values


def tiff(tags: dict[int, Tag], blob: bytes = b"") -> bytes:
    """A TIFF whose `blob` begins at offset 8."""
    return struct.pack("<2sHI", b"II", 42, 8 + len(blob)) + blob + directory(tags, 8 + len(blob))


def grey(tags: dict[int, Tag], blob: bytes = b"", side: int = 64) -> bytes:
    """An uncompressed grey picture with further tags; `blob` begins at offset 8 + `side` ** 2."""
    own = {
        256: numbers(SHORT, side),
        257: numbers(SHORT, side),
        258: numbers(SHORT, 8),
        259: numbers(SHORT, 1),
        262: numbers(SHORT, 1),
        273: numbers(LONG, 8),
        277: numbers(SHORT, 1),
        278: numbers(SHORT, side),
        279: numbers(LONG, side * side),
    }
    return tiff(own | tags, bytes(side * side) + blob)


def of_strips(strip: bytes, count: int, width: int, compression: int, shared: bool = True) -> bytes:
    """A grey picture of strips of one row each, which are all the same bytes if `shared`."""
    step = 0 if shared else len(strip)
    return tiff(
        {
            256: numbers(LONG, width),
            257: numbers(LONG, count),
            258: numbers(SHORT, 8),
            259: numbers(SHORT, compression),
            262: numbers(SHORT, 1),
            273: numbers(LONG, *(8 + step * one for one in range(count))),
            277: numbers(SHORT, 1),
            278: numbers(SHORT, 1),
            279: numbers(LONG, *[len(strip)] * count),
        },
        strip * (1 if shared else count),
    )


def empty_blocks(size: int, pixels: bytes) -> bytes:
    """A Deflate stream of about `size` bytes of blocks that have tables of codes and no data."""
    fields = [(0, 1), (2, 2), (0, 5), (0, 5), (14, 4)]
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    fields += [({18: 1, 0: 2, 1: 2}.get(one, 0), 3) for one in order]
    # 256 lengths of 0 by code 18, then 1 for the end of the block, and 1 for a distance.
    fields += [(0, 1), (127, 7), (0, 1), (107, 7), (3, 2), (1, 2), (0, 1)]
    value = at = 0
    for _ in range(2):  # 92 bits each
        for number, width in fields:
            value |= number << at
            at += width
    blocks = value.to_bytes(at // 8, "little")
    packer = zlib.compressobj(9, wbits=-15)
    last = packer.compress(pixels) + packer.flush()
    return b"\x78\x01" + blocks * (size // len(blocks)) + last + zlib.adler32(pixels).to_bytes(4)


def clear_codes(size: int, width: int) -> bytes:
    """LZW of about `size` bytes of codes that clear the table, and a black row."""
    codes = [256] * 8
    row = [256, *[0] * width]
    pack = "".join(f"{one:09b}" for one in codes)
    tail = "".join(f"{one:09b}" for one in row)
    tail += "0" * (-len(tail) % 8)
    nine = int(pack, 2).to_bytes(9)
    return nine * (size // 9) + int(tail, 2).to_bytes(len(tail) // 8)


def with_directory(tag: int, kind: int, count: int) -> bytes:
    """A picture whose directory of EXIF or GPS has a tag of many values."""
    start = 8 + 64 * 64
    values = (b"\x71\x11\1\0\x31\x75\0\0" * count)[: count * _SIZES[kind]]
    return grey({tag: numbers(LONG, start)}, directory({50000: (kind, count, values)}, start))


def with_tag(tag: int, kind: int, count: int) -> bytes:
    """A picture with a tag of many values."""
    return grey({tag: (kind, count, (b"\x71\x11\1\0\x31\x75\0\0" * count)[: count * _SIZES[kind]])})


def of_one_tile(
    data: bytes, compression: int, side: int = 16, tile: int = 4000, photometric: int = 1
) -> bytes:
    """A small grey picture in a large tile."""
    return tiff(
        {
            256: numbers(LONG, side),
            257: numbers(LONG, side),
            258: numbers(SHORT, 8),
            259: numbers(SHORT, compression),
            262: numbers(SHORT, photometric),
            277: numbers(SHORT, 1),
            322: numbers(LONG, tile),
            323: numbers(LONG, tile),
            324: numbers(LONG, 8),
            325: numbers(LONG, len(data)),
        },
        data,
    )
