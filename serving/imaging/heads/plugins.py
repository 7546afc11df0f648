"""Read the heads of HEIC, AVIF and JPEG XL files: size, depth, and what makes a file unusual.

Only fixed fields are read; nothing is decoded. Sources: ISO/IEC 23008-12 (HEIF) and 18181-1 and -2
(JPEG XL).
"""

from __future__ import annotations

import re
import struct
from typing import Final, NamedTuple


class PluginHead(NamedTuple):
    """What the head of a file states.

    Attributes:
        width, height: Size in pixels.
        depth: Bits per sample.
        turned: Whether the decoder rotates or mirrors the image.
        animated: Whether the file has several frames.
    """

    width: int
    height: int
    depth: int = 8
    turned: bool = False
    animated: bool = False


def heif(data: bytes) -> PluginHead | None:
    """Read the head of a HEIC or AVIF; return None if it states no size.

    The largest image item counts: a grid of tiles has an item for the whole.
    """
    width = height = at = 0
    while (at := data.find(b"ispe\0\0\0\0", at) + 8) > 7:
        wide, tall = struct.unpack(">II", data[at : at + 8].ljust(8, b"\0"))
        if wide * tall > width * height:
            width, height = wide, tall
    items = data[: max(data.find(b"mdat"), 0) or len(data)]
    # The property of a rotation has a byte with the number of quarter turns.
    turns = (items[at.end() : at.end() + 1] for at in re.finditer(b"irot", items))
    turned = b"imir" in items or any(turn and turn[0] & 3 for turn in turns)
    return PluginHead(width, height, turned=turned) if width else None


# Boxes before the pixels of a JPEG XL that are walked. Encoders write some ten.
_BOXES: Final = 1_000
_RATIOS: Final = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def jpeg_xl(data: bytes) -> PluginHead | None:
    """Read the head of a JPEG XL; return None if there is none, or if it has a preview."""
    start = 0 if data.startswith(b"\xff\x0a") else _codestream(data)
    bits = _Bits(data[start + 2 : start + 66])
    if start < 0 or data[start : start + 2] != b"\xff\x0a":
        return None
    width, height = _size(bits)
    if bits.take(1):  # all fields have their default
        return PluginHead(width, height)
    turned = animated = False
    if bits.take(1):
        turned = bits.take(3) != 0
        if bits.take(1):  # an intrinsic size
            _size(bits)
        if bits.take(1):
            return None
        animated = bool(bits.take(1))
        if animated:
            return PluginHead(width, height, 8, turned, animated)
    is_float = bits.take(1)
    depth = (
        bits.choose((32, 0), (16, 0), (24, 0), (1, 6))
        if is_float
        else bits.choose((8, 0), (10, 0), (12, 0), (1, 6))
    )
    return PluginHead(width, height, depth, turned)


def _codestream(data: bytes) -> int:
    """Return the offset of the codestream in a container of boxes, or -1."""
    at = 0
    for _ in range(_BOXES):
        if at + 8 > len(data):
            break
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind == b"jxlc":
            return at + head
        if kind == b"jxlp":
            return at + head + 4
        if size < head:  # 0: up to the end of the file
            break
        at += size
    return -1


class _Bits:
    """Reads the fields of a JPEG XL codestream: the lowest bit of the first byte comes first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        found = self._value & ((1 << count) - 1)
        self._value >>= count
        return found

    def choose(self, *kinds: tuple[int, int]) -> int:
        """Read a number in one of four kinds: an offset, and the bits of what is added to it."""
        offset, count = kinds[self.take(2)]
        return offset + self.take(count)


def _size(bits: _Bits) -> tuple[int, int]:
    small = bits.take(1)
    height = _side(bits, small)
    ratio = bits.take(3)
    if not ratio:
        return _side(bits, small), height
    numerator, denominator = _RATIOS[ratio - 1]
    return height * numerator // denominator, height


def _side(bits: _Bits, small: int) -> int:
    return 8 * (1 + bits.take(5)) if small else bits.choose((1, 9), (1, 13), (1, 18), (1, 30))
