"""The decoder against OpenCV on every file of the odd-image corpus that can be decoded.

OpenCV reads the same formats with code of its own (BMP, GIF, EXIF, colour conversion, layout of
samples) and its own builds of the codecs. Each file is read as OpenCV stores it; this module then
scales deep samples, composites alpha on white and applies the orientation, in plain NumPy. The
pixels are equal within `TOLERANCE`, or the file is explained in `EXPLAINED`.
"""

from __future__ import annotations

from fnmatch import fnmatch

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from serving.imaging import formats
from serving.imaging.decode import decode
from tests.robustness import corpus
from tests.robustness.scene import Item, Pixels

TOLERANCE = 1
"""Largest difference of a channel, of 255: CMYK and YCbCr are rounded, and alpha is composited."""

EXPLAINED = {
    "icc-*": "OpenCV ignores colour profiles",
    "xmp-6-*": "OpenCV ignores an orientation in XMP",
    "orientation-[2-8]-AVIF": "OpenCV ignores the orientation of AVIF",
    "exif-byte-*": "OpenCV takes an orientation of a wrong type; it is ignored here",
    "exif-unknown-type-*": "OpenCV takes an orientation of a wrong type; it is ignored here",
    "exif-rational-*": "OpenCV ignores an orientation that is a fraction",
    "exif-float-*": "OpenCV ignores an orientation that is a fraction",
    "tiff-orientation-as-float": "OpenCV ignores an orientation that is a fraction",
    "*-grey-png-keyed": "OpenCV ignores the transparent colour of a grey PNG",
    "1-bit-png-keyed": "OpenCV ignores the transparent colour of a grey PNG",
    "grey-and-alpha-tiff*": "OpenCV ignores the alpha of a grey TIFF",
    "palette-and-alpha-tiff": "OpenCV ignores the alpha of a TIFF with a palette",
    "12-bit-tiff": "OpenCV takes 12 bits for the lowest of 16, and the image is dark",
    "lab-tiff": "libtiff does not adapt the white of CIELAB (D50) to that of sRGB (D65)",
    "png-animated-default": "OpenCV takes the first frame of the animation, not the still image",
    "gif-without-palette": "the format leaves the colours open: greys here, black in OpenCV",
    "gif-first-frame-covers-a-corner": "OpenCV paints the area outside of the frame",
    "bmp-16-bit*": "OpenCV multiplies 5 bits by 8, so that white has 248 of 255",
}
"""Differing pixels: pattern of the names of files -> the reason."""

UNREAD = {
    "cmyk-tiff-16-bit": "OpenCV does not read 16-bit CMYK",
    "gif-disposal-7*": "OpenCV refuses an undefined disposal",
    "gif-frame-beyond-the-screen": "OpenCV refuses a frame larger than the screen",
    "gif-garbage-between-blocks": "OpenCV refuses what is no block",
    "gif-without-an-end": "OpenCV refuses a GIF without its end mark",
    "gif-zero-size-screen": "OpenCV refuses a screen of 0 pixels; the frame's size is taken here",
    "png-idat-wrong-crc": "OpenCV refuses a wrong checksum of pixels",
    "png-too-few-rows": "OpenCV refuses missing rows at the end; they are black here",
    "png-unknown-chunks": "OpenCV refuses unknown chunks that are marked as critical",
    "png-without-an-end": "OpenCV refuses a PNG without its end mark",
    "tiff-tiles*": "OpenCV refuses tiles that state more bytes than they have pixels",
}
"""Files that OpenCV does not read: pattern of the names -> the reason."""

REFUSED = {
    "bmp-invalid-fields": "masks of colours that overlap; the colours are open",
    "bmp-rle8-*": "OpenCV leaves missing pixels black",
    "bmp-unknown-header": "a header of a length that no version of the format has",
    "jpeg-hundreds-of-scans": "the limit of scans",
    "jpeg-thousands-of-segments": "the limit of segments",
    "other-format-*": "formats that are not served",
    "png-compressed-text-bomb": "the limit of text",
    "png-profile-bomb": "the limit of a colour profile",
    "png-wrong-crc-before": "a wrong checksum before the pixels may be a wrong palette",
    "tiff-64-bit-big-endian": "Pillow does not read it",
    "tiff-compression-1234": "an unknown compression, which OpenCV leaves black",
    "tiff-lzw-of-noise": "broken data, which OpenCV leaves black",
}
"""Files that OpenCV reads and that are refused here: pattern of the names -> the reason."""


def second_decoder(data: bytes, applied: tuple[str, ...] = ()) -> Pixels | None:
    """The image in OpenCV: RGB on white, upright; None if OpenCV does not read it."""
    encoded = np.frombuffer(data, np.uint8)
    stored = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    if stored is None:
        return None
    if "alpha-on-background" in applied or stored.dtype in (np.float32, np.int32):
        return as_rgb(stored, premultiplied=data[:2] in (b"II", b"MM"))
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB))


def as_rgb(stored: npt.NDArray[np.generic], *, premultiplied: bool) -> Pixels:
    """Convert samples in OpenCV's order to RGB of 8 bits, on white.

    premultiplied: Whether colours are multiplied by alpha, as libtiff returns them.
    """
    samples = np.atleast_3d(stored).astype(np.float64)
    if stored.dtype == np.uint16:
        samples *= 255 / 65535
    elif stored.dtype != np.uint8:
        # The usual range that contains the samples; see `serving.imaging.decode`.
        low, high = min(0.0, samples.min()), samples.max()
        high = next((top for top in (1.0, 255.0, 65535.0) if high <= top), high)
        samples = (samples - low) * (255 / (high - low))
    if samples.shape[2] == 4:
        share = samples[..., 3:] / 255
        colours = samples[..., :3] if premultiplied else samples[..., :3] * share
        samples = colours + 255 * (1 - share)
    if samples.shape[2] == 1:
        samples = samples.repeat(3, axis=2)
    return np.rint(samples[..., ::-1]).astype(np.uint8)


def compare(item: Item) -> str:
    """ "equal", "different" or "unread": what OpenCV makes of a file that is decoded here."""
    theirs = second_decoder(item.data, item.applied)
    if theirs is None:
        return "unread"
    ours = np.asarray(decode(item.data).image)
    if theirs.shape != ours.shape:
        return "different"
    difference = np.abs(theirs.astype(int) - ours.astype(int)).max()
    return "equal" if difference <= TOLERANCE else "different"


def matching(name: str, table: dict[str, str]) -> list[str]:
    return [pattern for pattern in table if fnmatch(name, pattern)]


# OpenCV reads neither HEIC nor JPEG XL.
ITEMS = [item for item in corpus.items() if formats.optional_format(item.data) is None]
GOOD = [item for item in ITEMS if item.code is None]
# Files beyond a limit of size would only take time and memory in OpenCV.
BAD = [item for item in ITEMS if item.code not in (None, "too-large")]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """By name: the comparison of each file that is decoded here."""
    return {item.name: compare(item) for item in GOOD}


def test_the_pixels_are_equal_or_explained(outcomes) -> None:
    assert len(outcomes) > 400
    wrong = {}
    for name, outcome in outcomes.items():
        explained = {"different": EXPLAINED, "unread": UNREAD}.get(outcome, {})
        if outcome != "equal" and len(matching(name, explained)) != 1:
            wrong[name] = outcome
    assert wrong == {}
    assert list(outcomes.values()).count("equal") >= 0.8 * len(outcomes)


@pytest.mark.parametrize(
    ("table", "outcome"),
    [(EXPLAINED, "different"), (UNREAD, "unread")],
    ids=["different", "unread"],
)
def test_every_explanation_is_needed(outcomes, table, outcome) -> None:
    found = {
        pattern
        for name, it in outcomes.items()
        if it == outcome
        for pattern in matching(name, table)
    }
    assert found == set(table)


def test_what_opencv_reads_and_is_refused_here_is_explained() -> None:
    read = {item.name for item in BAD if is_read(item.data)}
    assert {name for name in read if len(matching(name, REFUSED)) != 1} == set()
    assert {pattern for name in read for pattern in matching(name, REFUSED)} == set(REFUSED)


def is_read(data: bytes) -> bool:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
    except cv2.error:  # a limit, or no data
        return False
