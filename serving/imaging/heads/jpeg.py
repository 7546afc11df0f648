"""Read the head of a JPEG: size, coefficients that the decoder keeps, and unusual metadata."""

from __future__ import annotations

import struct
from typing import Final

from serving.imaging.heads.head import LARGE_EXIF, Head
from serving.imaging.heads.tiff import tags_share_bytes
from serving.imaging.limits import ARITHMETIC, FRAMES, PROGRESSIVE, SCAN, jpeg_markers

TRANSFORM: Final = 12.0
"""Nanoseconds per pixel of the cosine transform, the colour conversion and what goes with them."""


def read(data: bytes) -> Head | None:
    """Read the head of a JPEG up to its first scan; None if there is none."""
    width = height = 0
    coefficients, components, progressive, rotated, profile = 0.0, b"", False, False, False
    exif = resources = 0
    arithmetic = shared = False
    for marker, at in jpeg_markers(data):
        size = int.from_bytes(data[at : at + 2], "big")
        if marker in FRAMES:
            # Pillow and libjpeg may take different frames of a broken file: the largest counts.
            tall, wide, count = struct.unpack(">HHB", data[at + 3 : at + 8].ljust(5, b"\0"))
            if tall * wide >= width * height:
                width, height = wide, tall
            progressive |= marker in PROGRESSIVE
            arithmetic |= marker in ARITHMETIC
            components = data[at + 7 : at + 8]
            factors = [data[at + 9 + 3 * one : at + 10 + 3 * one] for one in range(count)]
            coefficients = max(coefficients, _coefficients([f[0] for f in factors if f]))
        elif marker == 0xE1:
            rotated = True  # by EXIF, or by XMP
            exif += size
            if data[at + 2 : at + 8] == b"Exif\0\0":
                shared |= tags_share_bytes(data[at + 8 : at + size])
        elif marker == 0xED:  # of Photoshop: Pillow reads its resources in Python
            resources += data.count(b"8BIM", at, at + size)
        elif marker == 0xE2:
            profile |= data[at + 2 : at + 13] == b"ICC_PROFILE"
            if data[at + 2 : at + 6] == b"MPF\0":
                shared |= tags_share_bytes(data[at + 6 : at + size])
        elif marker == SCAN:
            several = progressive or data[at + 2 : at + 3] != components
            # An empty scan takes 0.2 ns per pixel. Encoders write about ten scans.
            scans = data.count(b"\xff\xda") if several else 1
            decoder = coefficients if several else 0.0
            nanoseconds = TRANSFORM + (15.0 + 0.5 * scans) * several
            return Head(
                width,
                height,
                decoder,
                profile,
                rotated,
                nanoseconds,
                # Any number of pixels may follow from no bytes, each at the cost of a whole one.
                unusual=exif > LARGE_EXIF or arithmetic or shared,
                opening=resources * 1e-6,
                pixel=4.0 if components == b"\4" else 1.0,
                scalable=True,
            )
    return None


def _coefficients(factors: list[int]) -> float:
    """Return the bytes per pixel of the coefficients, 2 bytes for each sample.

    Args:
        factors: Sampling factors of each component: 4 bits horizontally, 4 bits vertically.
    """
    sizes = [(max(1, one >> 4), max(1, one & 15)) for one in factors]
    widest = max((wide for wide, _ in sizes), default=1)
    tallest = max((tall for _, tall in sizes), default=1)
    return sum(2 * wide * tall / (widest * tallest) for wide, tall in sizes)
