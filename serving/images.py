"""Encoded bytes -> upright RGB pixels. The one decoder: training, scoring and serving call it.

Whatever is done to an image beyond decoding is said in `Decoded.applied`, which travels with the
answer, so that nothing about the pixels is silent.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from serving.errors import BrokenImage, EmptyBody, NotAnImage, TooLarge, UnsupportedFormat

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow plug-ins that an upload may reach. EPS, PSD and the like are never opened."""

SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)
"""Extensions by which folders are searched. Only the search looks at names; decoding never does."""

MAX_PIXELS: Final = 100_000_000
MAX_BYTES: Final = 20_000_000

# A truncated file must be an error here whatever the embedding application set.
ImageFile.LOAD_TRUNCATED_IMAGES = False

# Pillow refuses by a number of pixels of its own; here `max_pixels` decides, before any is decoded.
Image.MAX_IMAGE_PIXELS = None

# Pillow warns about odd metadata; here the pixels decide. Once for the process:
# `warnings.catch_warnings` around a decode is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

# What Pillow's plug-ins raise over corrupt data, found by fuzzing all of `FORMATS`.
_CORRUPT: Final = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)

_ORIENTATION: Final = 0x0112
# What brings each EXIF orientation upright.
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_STRIP: Final = 2**20  # samples that are scaled at a time

_SRGB: Final = ImageCms.createProfile("sRGB")


@dataclass(frozen=True)
class Decoded:
    """An upright picture and what was done to make it one.

    image: mode RGB, 8 bits a channel, EXIF orientation applied.
    applied: names such as "exif-orientation", "alpha-on-background", "16-bit-scaled".
    """

    image: Image.Image
    applied: tuple[str, ...]


def decode(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Decoded:
    """Decode one image of any supported format, told by content and never by name.

    Args:
        data: The file's bytes.
        max_pixels: Width times height that is still accepted; checked before any pixel is decoded.
        background: RGB, 0 to 255, put under transparent images.

    Raises:
        EmptyBody: `data` is empty.
        NotAnImage: Pillow recognises no image in `data`.
        UnsupportedFormat: A format outside `FORMATS`.
        TooLarge: More than `max_pixels` pixels.
        BrokenImage: Truncated or corrupt data.
    """
    if not data:
        raise EmptyBody("it is empty: 0 bytes, where an image should be")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} pixels are more than the {max_pixels} allowed")
    applied: list[str] = []
    try:
        if getattr(image, "is_animated", False):
            applied.append("first-frame")
        # TIFF is upright once loaded. Others are asked then: of a PNG this may load the pixels,
        # and those have to be loaded where their errors count.
        stored = _orientation(image) if image.format == "TIFF" else 1
        image.load()
        remaining = _orientation(image)
        rgb = _to_rgb(image, background, applied)
        if remaining in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[remaining])
        if stored in _UPRIGHT or remaining in _UPRIGHT:
            applied.append("exif-orientation")
    except _CORRUPT as error:
        raise BrokenImage(f"the image is broken: {_reason(error)}") from error
    except MemoryError as error:
        raise TooLarge("the image needs more memory than is allowed") from error
    return Decoded(rgb, tuple(applied))


def read(
    path: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Decoded:
    """Decode the file at `path`; errors as `decode`, and `BrokenImage` when it can't be read.

    They don't name the path: who asks for a photo names it.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise BrokenImage(error.strerror or str(error)) from error
    return decode(data, max_pixels=max_pixels, background=background)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; a pipe, which might never end, is refused as one that can't be read.

    Raises:
        OSError: It can't be read, or is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("no regular file")
    return path.read_bytes()


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        pass
    except _CORRUPT as error:
        raise BrokenImage(f"the image is broken: {_reason(error)}") from error
    served = next((name for name, magic in _SERVED_MAGIC.items() if magic.match(data)), None)
    if served:
        raise BrokenImage(f"the image is broken: it begins as {served} and its header is cut short")
    name = _foreign_format(data)
    if name:
        raise UnsupportedFormat(f"{name} is not read; use one of {', '.join(FORMATS)}")
    raise NotAnImage(f"no image that Fledge reads ({', '.join(FORMATS)})")


def _orientation(image: Image.Image) -> int:
    """What EXIF states; 1, upright, where it is broken or states nothing that makes sense."""
    try:
        stated = image.getexif().get(_ORIENTATION, 1)
    except _CORRUPT:
        return 1
    return stated if isinstance(stated, int) else 1


# BMP is not among them: two letters, with which a text may begin.
_SERVED_MAGIC: Final = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
}

_FOREIGN_MAGIC: Final = {
    b"%!PS": "EPS",
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"icns": "ICNS",
    b"DDS ": "DDS",
    b"qoif": "QOI",
}

# Prolog, comments and doctype may stand before the root element.
_SVG: Final = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][^>]*>\s*)*<(?:svg:)?svg[\s>]")


def _foreign_format(data: bytes) -> str | None:
    """Name a format by its first bytes, without letting its parser near them."""
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "HEIC"
    if _SVG.match(data[:4096]):
        return "SVG"
    return next((name for magic, name in _FOREIGN_MAGIC.items() if data.startswith(magic)), None)


def _to_rgb(
    image: Image.Image, background: tuple[int, int, int], applied: list[str]
) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        applied.append("16-bit-scaled" if image.mode != "F" else "float-scaled")
        return _scale_deep(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    profile = image.info.get("icc_profile")
    if image.mode == "P" and profile:
        image = image.convert("RGBA" if has_alpha else "RGB")  # a profile speaks of colours
    if has_alpha:
        applied.append("alpha-on-background")
        rgba = image.convert("RGBA")
        flat = Image.new("RGB", image.size, background)
        flat.paste(rgba, mask=rgba.getchannel("A"))
        image = flat
    if profile and image.mode in ("RGB", "CMYK", "L"):
        converted = _to_srgb(image, profile)
        if converted is not None:
            applied.append("icc-to-srgb")
            return converted
    if image.mode not in ("RGB", "L", "1", "P"):  # those convert without loss
        applied.append(f"{image.mode.lower()}-to-rgb")
    return image.convert("RGB")


def _scale_deep(image: Image.Image) -> Image.Image:
    """Bring samples deeper than 8 bits to 0..255 by range; Pillow's own convert clips to white."""
    low, high = 0.0, 65535.0
    if image.mode in ("F", "I"):
        ends = np.array([(strip.min(), strip.max()) for _, strip in _strips(image)])
        if not np.isfinite(ends).all():
            raise ValueError("samples are not finite")
        low, high = min(0.0, ends.min()), ends.max()
        # Known integer ranges first: stretching a dark photo to white would be a change of light.
        high = next((top for top in (1.0, 255.0, 65535.0) if high <= top), high)
    scaled = np.empty((image.height, image.width), np.uint8)
    for rows, strip in _strips(image):
        strip -= low
        strip *= 255.0 / (high - low)
        scaled[rows] = np.rint(strip, out=strip)
    return Image.fromarray(scaled).convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    """The samples in float64, some rows at a time: a whole picture would take 8 bytes a pixel."""
    step = max(1, _STRIP // image.width)
    for top in range(0, image.height, step):
        rows = slice(top, min(top + step, image.height))
        with np.errstate(invalid="ignore"):  # a signalling NaN is for the caller to find
            strip = np.array(image.crop((0, rows.start, image.width, rows.stop)), np.float64)
        yield rows, strip


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # a broken profile is metadata, not pixels


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:120]
