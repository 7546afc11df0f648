"""Judge colour profiles before the colour engine reads them.

A profile is a table of elements at stated offsets. lcms, the colour engine, follows the offsets as
they are, so that a profile of some hundred bytes can make it work for minutes or allocate
gigabytes: a list of 20,000 processing stages may name the same matrix. A profile passes if it has
only the kinds of elements that lcms needs for ICC version 2 and 4 profiles (ICC.1:2022), each of
them within the file and of the size that its own head states.
"""

from __future__ import annotations

import io
import struct
from collections import Counter
from typing import Final

from PIL import Image, ImageCms

MAX_BYTES: Final = 2**20
MAX_CMYK_BYTES: Final = 2**22
"""Largest profile, in bytes. Profiles of printers (CMYK) have tables of four dimensions."""

MAX_TAGS: Final = 100
MAX_SHARED: Final = 8
"""Largest number of tags, and of tags with the same element. Red, green and blue curves are often
one element."""

MAX_RECORDS: Final = 256
"""Largest number of languages in which a text is given."""

_SRGB: Final = ImageCms.createProfile("sRGB")

_HEADER: Final = 128
_CHANNELS: Final = 4  # CMYK is the largest colour space that images are converted from


def is_safe(profile: bytes) -> bool:
    """Return whether the colour engine can read a profile in a time that its size bounds.

    Args:
        profile: The whole ICC profile, as an image file contains it.
    """
    limit = MAX_CMYK_BYTES if profile[16:20] == b"CMYK" else MAX_BYTES
    if not _HEADER + 4 <= len(profile) <= limit or profile[36:40] != b"acsp":
        return False
    (count,) = struct.unpack_from(">I", profile, _HEADER)
    start = _HEADER + 4 + 12 * count
    if count > MAX_TAGS or start > len(profile):
        return False
    tags = list(struct.iter_unpack(">4sII", profile[_HEADER + 4 : start]))
    shared = Counter(offset for _, offset, _ in tags)
    if any(number > MAX_SHARED for number in shared.values()):
        return False
    return all(
        offset >= _HEADER
        and offset + size <= len(profile)
        and _is_safe_tag(name, profile[offset : offset + size])
        for name, offset, size in tags
    )


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert an image of mode RGB, CMYK or L from its safe profile to sRGB, mode RGB.

    Returns None if the profile is sRGB already, or does not fit the image.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # a broken profile is ignored, like other broken metadata


def _is_safe_tag(name: bytes, element: bytes) -> bool:
    # Multi-process elements of floating-point numbers: no photo needs them, and their stages may
    # share their data.
    if name[:3] in (b"D2B", b"B2D"):
        return False
    kind = element[:4]
    if kind in (b"mft1", b"mft2"):
        return _is_safe_table(element, kind)
    if kind in (b"mAB ", b"mBA "):
        return _is_safe_pipeline(element)
    # Of these tags, lcms needs no other kind.
    if name[:3] in (b"A2B", b"B2A", b"pre", b"gam") or kind == b"mpet":
        return False
    if kind == b"mluc":
        records = element[8:12]
        return len(records) == 4 and int.from_bytes(records, "big") <= MAX_RECORDS
    if kind == b"curv":
        count = int.from_bytes(element[8:12], "big")
        return len(element) >= 12 + 2 * count
    return True  # the size of other kinds is fixed, or that of the tag


def _is_safe_table(element: bytes, kind: bytes) -> bool:
    """Check a look-up table of 8 or 16 bits: channels, grid and the stated sizes."""
    if len(element) < 52:
        return False
    inputs, outputs, grid = element[8:11]
    if not (1 <= inputs <= _CHANNELS and 1 <= outputs <= _CHANNELS and grid >= 2):
        return False
    if kind == b"mft1":
        return bool(48 + 256 * (inputs + outputs) + grid**inputs * outputs <= len(element))
    entries, exits = struct.unpack_from(">HH", element, 48)
    samples = entries * inputs + grid**inputs * outputs + exits * outputs
    return bool(52 + 2 * samples <= len(element))


def _is_safe_pipeline(element: bytes) -> bool:
    """Check a pipeline of curves, matrix and look-up table: channels, offsets and the table."""
    if len(element) < 32:
        return False
    inputs, outputs = element[8:10]
    if not (1 <= inputs <= _CHANNELS and 1 <= outputs <= _CHANNELS):
        return False
    offsets = struct.unpack_from(">5I", element, 12)
    if any(offset > len(element) - 12 for offset in offsets):
        return False
    table = offsets[3]
    if not table:
        return True
    if len(element) < table + 20:
        return False
    nodes = outputs * max(1, element[table + 16])
    for points in element[table : table + inputs]:
        nodes *= points
    return bool(nodes and table + 20 + nodes <= len(element))
