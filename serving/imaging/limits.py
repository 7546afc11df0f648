"""Reject images that would take hours or gigabytes to decode (decompression bombs).

`serving.imaging.decode.decode` checks width times height after Pillow has opened a file. The limits
in this module also cover time and memory that Pillow needs while opening a file, and costs that
don't depend on the number of pixels. All limits are far above the values in files that image
encoders write.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from PIL import Image, PngImagePlugin

from serving.errors import BrokenImage, OptionError, TooLarge
from serving.imaging.heads.tiff import OFFSETS, tags_share_bytes, tiff_entries, variants

# Largest compressed text or profile of a PNG, in bytes. Pillow's limit of 1 MB rejects valid
# images: some programs store whole projects there.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24

# Pillow raises DecompressionBombError when it opens an image of more than twice this number of
# pixels; for some formats it allocates memory at that point. The setting is global, so
# `raise_limit_of_pillow` only increases it.
Image.MAX_IMAGE_PIXELS = 50_000_000

SEGMENTS: Final = 1_000
"""Largest number of segments before the pixels of a JPEG. Pillow keeps all segments in memory, and
joins EXIF segments in quadratic time."""

ALL_SEGMENTS: Final = 10_000
"""Largest number of segments of a JPEG whose scans must be counted. Encoders write some tens."""

BETWEEN: Final = 65_536
"""Largest number of bytes outside of segments before the pixels of a JPEG. Pillow reads them one by
one."""

SCANS: Final = 100
"""Largest number of scans of a JPEG. A scan of 30 bytes may cover all pixels. Encoders write about
ten scans."""

CHUNKS: Final = 65_536
"""Largest number of chunks of a PNG. Pillow needs some microseconds and a hundred bytes per chunk.
"""

STRIPS: Final = 131_072
"""Largest number of strips or tiles of a TIFF. Pillow creates a decoder for every strip and tile,
even outside the image."""

RUN_LENGTH_PIXELS: Final = 10_000_000
"""Largest number of pixels of a run-length encoded BMP. Pillow decodes such a file in Python."""


FRAME_BLOCKS: Final = 100_000
"""Blocks of the first frame of a GIF that are walked. Encoders write blocks of 255 bytes."""

BOXES: Final = 4_096
"""Largest number of boxes of a HEIC or AVIF that state a size or a rotation."""

MAX_PIXELS: Final = 100_000_000
"""Largest width times height of an image of a command, if the variable below is not set."""

TOO_MANY: Final = "are more than the {} allowed (FLEDGE_MAX_PIXELS)"

VARIABLE: Final = "FLEDGE_MAX_PIXELS"


def max_pixels_of_commands() -> int:
    """Return the largest width times height of an image that commands decode.

    Raises:
        OptionError: The environment variable FLEDGE_MAX_PIXELS is no whole number in its range.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return MAX_PIXELS
    if re.fullmatch("[0-9]{2,10}", text) and 64 <= int(text) <= 2**31:
        return int(text)
    raise OptionError(f"{VARIABLE} = {text[:20]!r}: use a whole number, 64 to {2**31}")


def raise_limit_of_pillow(max_pixels: int) -> None:
    """Make Pillow open images of up to `max_pixels` pixels."""
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, -(-max_pixels // 2))


def check_limits(data: bytes, max_pixels: int) -> None:
    """Check that the structure of an image file stays within the limits.

    Data in other formats, and data that is broken in other ways, pass without an error.

    Args:
        data: The encoded file.
        max_pixels: Largest accepted width times height.

    Raises:
        TooLarge: A tile of a TIFF or a run-length encoded BMP has too many pixels.
        BrokenImage: The number of segments, scans, chunks, strips, tiles or boxes is above the
            limit.
    """
    if data.startswith(b"\xff\xd8\xff"):
        _jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _png(data)
    elif data.startswith((b"II", b"MM")):
        _tiff(data, max_pixels)
    elif data.startswith(b"BM"):
        _bmp(data, max_pixels)
    elif data[4:8] == b"ftyp":
        found = data.count(b"ispe\0\0\0\0") + data.count(b"irot")
        _check_count("sizes and rotations", BOXES, found)


def _check_count(what: str, limit: int, found: int) -> None:
    if found > limit:
        raise BrokenImage(f"the image is broken: more than {limit} {what}")


def _jpeg(data: bytes) -> None:
    frame, components, end, between = 0, b"", 2, 0
    for number, (marker, at) in enumerate(jpeg_markers(data)):
        _check_count("segments before the picture", SEGMENTS, number)
        between += at - 2 - end
        _check_count("bytes between segments", BETWEEN, between)
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker in FRAMES:
            frame, components = marker, data[at + 7 : at + 8]
        if marker == SCAN:
            single = data[at + 2 : at + 3] == components and frame not in PROGRESSIVE
            break
    else:
        _check_count("bytes between segments", BETWEEN, between + len(data) - end)
        return
    # Scans are counted exactly only if the first is not the only one and a rough count is too high.
    if not single and data.count(b"\xff\xda") > SCANS:
        scans = 0
        for number, (marker, _) in enumerate(jpeg_markers(data)):
            _check_count("segments", ALL_SEGMENTS, number)
            scans += marker == SCAN
            _check_count("scans", SCANS, scans)


# Markers of segments that have a length, as in Pillow, and of the end.
_MARKER: Final = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
SCAN, _END = 0xDA, 0xD9
FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
ARITHMETIC: Final = frozenset(range(0xC9, 0xD0)) - {0xCC}
PROGRESSIVE: Final = (0xC2, 0xC6, 0xCA, 0xCE)


def jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the segment markers of a JPEG up to the end of the image.

    An end marker before the first scan is skipped, as in Pillow.

    Yields:
        The marker's second byte, and the offset of the segment's length field in `data`.
    """
    at, scanning = 2, False
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        scanning |= marker == SCAN
        if marker != _END:
            yield marker, at
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
        elif scanning:
            return


def _png(data: bytes) -> None:
    for number, _ in enumerate(png_chunks(data), 1):
        _check_count("chunks", CHUNKS, number)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, offset of the content and length of each chunk of a PNG before its end."""
    at = 8
    while at < len(data) and (kind := data[at + 4 : at + 8]) != b"IEND":
        size = int.from_bytes(data[at : at + 4], "big")
        yield kind, at + 8, min(size, len(data) - at)
        at += 12 + size


def gif_blocks(data: bytes, most: int) -> int:
    """Count the blocks of a GIF's extensions before its second frame; stop at `most`.

    Also returns `most` if the first frame has more than `FRAME_BLOCKS` blocks.
    """
    at, frames, found = 13 + _colours(data[10:11]), 0, 0
    while at < len(data) and found < most:
        kind = data[at]
        if kind == 0x21:
            at += 2
        elif kind == 0x2C and not frames:
            frames = 1
            at += 11 + _colours(data[at + 9 : at + 10])
        elif kind in (0x2C, 0x3B):
            break
        else:  # Pillow passes over other bytes
            at, found = at + 1, found + 1
            continue
        blocks = 0
        while at < len(data) and (size := data[at]):
            at, blocks = at + 1 + size, blocks + 1
            if blocks > (most if kind == 0x21 else FRAME_BLOCKS):
                return most
        at += 1
        found += blocks + 1 if kind == 0x21 else 0
    return min(found, most)


def _colours(flags: bytes) -> int:
    """Return the bytes of a GIF's table of colours."""
    return 3 << (1 + (flags[0] & 7)) if flags and flags[0] & 128 else 0


def _tiff(data: bytes, max_pixels: int) -> None:
    width = height = 0
    for entry in (one for big in variants(data) for one in tiff_entries(data, big)):
        if entry.tag in OFFSETS:
            _check_count("strips or tiles", STRIPS, entry.number)
        # If a tag is repeated, Pillow takes its last entry and libtiff its first: use the largest.
        width = max(width, entry.value * (entry.tag == 322))
        height = max(height, entry.value * (entry.tag == 323))
    if width * height > max_pixels:
        raise TooLarge(f"tiles of {width} x {height} pixels {TOO_MANY.format(max_pixels)}")


_ORIENTATION: Final = 0x0112
_MAX_EXIF_TEXT: Final = 2**18  # characters; EXIF of a JPEG has at most 64 KB


def has_one_orientation(info: Mapping[Any, Any]) -> bool:
    """Return whether the EXIF data of an image has at most a few values as its orientation.

    Pillow makes an object of each value, of which there may be millions. Also false where the tags
    share so many bytes that reading them takes hundreds of megabytes.

    Args:
        info: `Image.info` of an image that is no TIFF.
    """
    text = str(info.get("Raw profile type exif", ""))
    if len(text) > _MAX_EXIF_TEXT:
        return False
    exif = info.get("exif", b"")
    if not exif and text:
        try:
            exif = bytes.fromhex("".join(text.split("\n")[3:]))  # as Pillow reads it
        except ValueError:
            return True  # Pillow raises the same error
    exif = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    if not exif:
        return True
    if tags_share_bytes(exif):
        return False
    try:
        counts = [one.number for one in tiff_entries(exif, False) if one.tag == _ORIENTATION]
    except BrokenImage:
        return False
    return max(counts, default=0) <= 16


def _bmp(data: bytes, max_pixels: int) -> None:
    try:
        size, width, height, code = struct.unpack_from("<IIi4xI", data, 14)
    except struct.error:
        return
    if size >= 40 and code in (1, 2):
        limit = min(max_pixels, RUN_LENGTH_PIXELS)
        if width * abs(height) > limit:
            found = f"{width} x {abs(height)} pixels in run-length code"
            remedy = (
                f" ({VARIABLE})" if limit == max_pixels else "; save it without run-length code"
            )
            raise TooLarge(f"{found} are more than the {limit} allowed{remedy}")
