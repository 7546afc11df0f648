"""Small files that would cost hours or gigabytes: refused by their structure, before any decoder.

`images.decode` refuses by width and height once Pillow has opened a file. Here is what Pillow and
the libraries under it would do at opening, or however few pixels there are. Each limit is far
beyond what a program that writes images makes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

from PIL import Image, PngImagePlugin

from serving.errors import BrokenImage, TooLarge

# Bytes that a packed text or a profile of a PNG may have. Pillow's megabyte refuses good pictures:
# programs keep whole projects there.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24

# Half of what Pillow refuses by itself at opening, where it allocates for some formats. It counts
# for the whole process, so `refuse` raises it for who allows more, and never lowers it.
Image.MAX_IMAGE_PIXELS = 50_000_000

SEGMENTS: Final = 1_000
"""Of a JPEG's head. Pillow keeps each, and joins those with EXIF in quadratic time."""

SCANS: Final = 100
"""Of a JPEG. Each goes over all pixels, and 30 bytes make one; encoders make about ten."""

CHUNKS: Final = 65_536
"""Of a PNG. Pillow takes some microseconds and a hundred bytes for each."""

STRIPS: Final = 131_072
"""Of a TIFF, or tiles. Pillow makes a decoder for each, be there rows for them or not."""

RUN_LENGTH_PIXELS: Final = 10_000_000
"""Of a BMP in run-length code, which Pillow decodes in Python."""


def refuse(data: bytes, max_pixels: int) -> None:
    """Refuse what is known to be out of proportion; whether the rest is an image, others find out.

    Raises:
        TooLarge: More pixels than allowed, in a tile or in run-length code.
        BrokenImage: More parts than any encoder makes.
    """
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, -(-max_pixels // 2))
    if data.startswith(b"\xff\xd8\xff"):
        _jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _png(data)
    elif data.startswith((b"II", b"MM")):
        _tiff(data, max_pixels)
    elif data.startswith(b"BM"):
        _bmp(data, max_pixels)


def _check(what: str, limit: int, found: int) -> None:
    if found > limit:
        raise BrokenImage(f"the image is broken: more than {limit} {what}")


def _jpeg(data: bytes) -> None:
    frame, parts = 0, b""
    for number, (marker, at) in enumerate(_markers(data)):
        _check("segments before the picture", SEGMENTS, number)
        if marker in _FRAMES:
            frame, parts = marker, data[at + 7 : at + 8]
        if marker == _SCAN:
            whole = data[at + 2 : at + 3] == parts and frame not in _PROGRESSIVE
            break
    else:
        return
    # Where the first scan is not the only one: nearly always there are few, and nobody counts.
    if not whole and data.count(b"\xff\xda") > SCANS:
        scans = 0
        for marker, _ in _markers(data):
            scans += marker == _SCAN
            _check("scans", SCANS, scans)


# Of segments with a length, as Pillow has it, and of the end.
_MARKER: Final = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
_SCAN, _END = 0xDA, 0xD9
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = (0xC2, 0xC6, 0xCA, 0xCE)


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """A JPEG's markers, and where the length of each stands, up to the end of the picture.

    An end before the first scan is none: Pillow reads on.
    """
    at, begun = 2, False
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        begun |= marker == _SCAN
        if marker != _END:
            yield marker, at
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
        elif begun:
            return


def _png(data: bytes) -> None:
    at, number = 8, 0
    while at < len(data) and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        number += 1
        _check("chunks", CHUNKS, number)


def _tiff(data: bytes, max_pixels: int) -> None:
    width = height = 0
    # Pillow takes a 64-bit directory in the other byte order for one of 32 bits, libtiff does not.
    kinds = {data[2:3] == b"+", b"+" in data[2:4]}
    for tag, count, value in (entry for big in kinds for entry in _entries(data, big)):
        if tag in (273, 324):
            _check("strips or tiles", STRIPS, count)
        # Of several entries for one tag Pillow takes the last and libtiff the first.
        width = max(width, value * (tag == 322))
        height = max(height, value * (tag == 323))
    if width * height > max_pixels:
        raise TooLarge(f"tiles of {width} x {height} pixels are more than the {max_pixels} allowed")


def _entries(data: bytes, big: bool) -> Iterator[tuple[int, int, int]]:
    """Tag, number of values, and the value where it is one, of a TIFF's first directory."""
    order = "<" if data[0] == 73 else ">"
    if big:
        head, count, entry, room = "8xQ", "Q", "HHQ8s", 8
    else:
        head, count, entry, room = "4xI", "H", "HHI4s", 4
    try:
        (start,) = struct.unpack_from(order + head, data)
        (number,) = struct.unpack_from(order + count, data, min(start, len(data)))
    except struct.error:
        return
    start += struct.calcsize(order + count)
    size = struct.calcsize(order + entry)
    whole = data[start : start + size * number]
    whole = whole[: len(whole) // size * size]
    for tag, kind, values, raw in struct.iter_unpack(order + entry, whole):
        taken = min(room, {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}.get(kind, room))
        yield tag, values, int.from_bytes(raw[:taken], "little" if order == "<" else "big")


def _bmp(data: bytes, max_pixels: int) -> None:
    try:
        size, width, height, code = struct.unpack_from("<IIi4xI", data, 14)
    except struct.error:
        return
    if size >= 40 and code in (1, 2):
        limit = min(max_pixels, RUN_LENGTH_PIXELS)
        if width * abs(height) > limit:
            told = f"{width} x {abs(height)} pixels in run-length code"
            raise TooLarge(f"{told} are more than the {limit} allowed")
