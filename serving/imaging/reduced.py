"""Decode JPEGs at a reduced size, and follow the picture's box when a reduced image is turned."""

from __future__ import annotations

from typing import Final

from PIL import Image
from PIL.Image import Transpose

from serving.imaging.preprocess import Box, dct_scale

SWAPPED: Final = frozenset(
    {Transpose.TRANSPOSE, Transpose.TRANSVERSE, Transpose.ROTATE_90, Transpose.ROTATE_270}
)
"""The transpositions that swap width and height."""

# Whether x and y of a transposed image are counted from the other end of the original axis.
_MIRRORED: Final = {
    Transpose.FLIP_LEFT_RIGHT: (True, False),
    Transpose.FLIP_TOP_BOTTOM: (False, True),
    Transpose.ROTATE_180: (True, True),
    Transpose.TRANSPOSE: (False, False),
    Transpose.TRANSVERSE: (True, True),
    Transpose.ROTATE_90: (False, True),
    Transpose.ROTATE_270: (True, False),
}


def draft(image: Image.Image, reduction: int) -> int:
    """Let a JPEG that is open, but not loaded, be decoded smaller by its cosine transform.

    Args:
        image: Image of any format; others than JPEG are left alone.
        reduction: The integer by which it may be reduced.

    Returns:
        The integer by which it will be reduced, at most `reduction`.
    """
    scale = dct_scale(reduction)
    if scale == 1 or image.format not in ("JPEG", "MPO"):
        return 1
    width, height = image.size
    drafted = image.draft(None, (max(1, width // scale), max(1, height // scale)))
    return scale if drafted else 1


def transpose_box(box: Box, size: tuple[int, int], turn: Transpose) -> Box:
    """Return where a box of an image of a size (width, height) is after the transposition."""
    (left, top, right, bottom), (width, height) = box, size
    if turn in SWAPPED:
        left, top, right, bottom, width, height = top, left, bottom, right, height, width
    mirrored_x, mirrored_y = _MIRRORED[turn]
    if mirrored_x:
        left, right = width - right, width - left
    if mirrored_y:
        top, bottom = height - bottom, height - top
    return (left, top, right, bottom)
