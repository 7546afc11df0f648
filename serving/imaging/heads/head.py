"""What the head of an image file states about the cost of decoding it."""

from __future__ import annotations

from typing import Final, NamedTuple

LARGE_EXIF: Final = 2**17
"""Bytes of EXIF above which a file is unusual."""


class Head(NamedTuple):
    """What the head of a file states.

    Attributes:
        width, height: Size in pixels.
        decoder: Bytes per pixel that the decoder has beside the image that it returns.
        converted: Whether alpha, a profile or deep samples are converted after decoding.
        rotated: Whether the file may have an EXIF orientation.
        nanoseconds: CPU time per pixel.
        metadata: Bytes of decompressed metadata.
        opening: Seconds of CPU time that opening the file takes, whatever its pixels.
        pixel: Bytes per pixel of the decoded image, if it is not RGB.
        unusual: As `Cost.unusual`.
        scalable: Whether the decoder can give a smaller image at less cost.
        whole: Whether the image is converted or turned before it is reduced.
    """

    width: int
    height: int
    decoder: float = 0.0
    converted: bool = False
    rotated: bool = False
    nanoseconds: float = 15.0
    metadata: int = 0
    unusual: bool = False
    opening: float = 0.0
    pixel: float = 1.0
    scalable: bool = False
    whole: bool = False
