"""Decode encoded images to upright RGB pixels, for training, export, scoring and serving.

Conversions such as rotating by the EXIF orientation or scaling from 16 bits are listed in
`Decoded.applied`, which is part of the JSON answer.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from PIL import Image, ImageFile, UnidentifiedImageError

from serving.errors import BrokenImage, EmptyBody, NotAnImage, TooLarge, UnsupportedFormat
from serving.imaging import colours, cost, formats, isolated, plugins, reduced
from serving.imaging.formats import FORMATS
from serving.imaging.limits import (
    TOO_MANY,
    VARIABLE,
    check_limits,
    has_one_orientation,
    max_pixels_of_commands,
    raise_limit_of_pillow,
)
from serving.imaging.preprocess import Box, Preprocess

MAX_BYTES: Final = 20_000_000

# A truncated file must be an error, even if another library in the process has allowed it.
ImageFile.LOAD_TRUNCATED_IMAGES = False

# Pillow warns about unusual metadata, which is irrelevant here. The filter is global because
# `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Exceptions that Pillow's plug-ins raise for corrupt data, found by fuzzing all of `FORMATS`.
_CORRUPT: Final = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, RuntimeError),
    *(ArithmeticError, struct.error),
)

_ORIENTATION: Final = 0x0112
# The transposition that turns an image of each EXIF orientation upright.
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

FULL: Final = Preprocess()
"""Preprocessing that reduces nothing, and composites transparent images on white."""

decoders: Final = isolated.DecoderPool()
"""Processes that decode expensive or unusual images."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image and the conversions that were applied to it.

    Attributes:
        image: Image of mode RGB, 8 bits per channel, with the EXIF orientation applied. It may be
            a reduced one; see `Preprocess.decode`.
        applied: Names of the conversions, such as "exif-orientation" or "16-bit-scaled".
        mode: Pillow's mode of the file, such as RGB, L or CMYK.
        size: Width and height of the upright picture before it was reduced.
        area: The box of `image` that the picture covers: left, top, right and bottom in pixels.
    """

    image: Image.Image
    applied: tuple[str, ...]
    mode: str
    size: tuple[int, int]
    area: Box


def decode(
    data: bytes,
    *,
    max_pixels: int | None = None,
    preprocess: Preprocess = FULL,
) -> Decoded:
    """Decode one image. The format is recognised by the content.

    An image whose head states a high cost, or that may need more than its head states, is decoded
    in a process of its own; see `serving.imaging.isolated`.

    Args:
        data: The encoded file.
        max_pixels: Largest accepted width times height, checked before any pixel is decoded. None:
            `limits.max_pixels_of_commands`.
        preprocess: Preprocessing that follows: its background, and how far the image may be
            reduced while it is decoded.

    Raises:
        EmptyBody: `data` is empty.
        NotAnImage: `data` is not in a known image format.
        UnsupportedFormat: The format is known, but is not read, or not without a package.
        TooLarge: The image has more than `max_pixels` pixels, or needs too much memory.
        BrokenImage: The data is truncated or corrupt.
        DeadlineExceeded: Decoding took more than `isolated.MAX_SECONDS`.
    """
    max_pixels = max_pixels or max_pixels_of_commands()
    estimated = check(data, max_pixels, preprocess=preprocess)
    if not estimated.isolated:
        try:
            return decode_here(data, max_pixels=max_pixels, preprocess=preprocess, stated=estimated)
        except LargerThanStated:
            pass
    memory = memory_limit(estimated, max_pixels)
    request = {
        "max_pixels": max_pixels,
        "preprocess": preprocess.to_dict(),
        "too_large": memory_message(estimated, memory),
    }
    answer = decoders.decode(data, request, memory=memory)
    return Decoded(
        Image.fromarray(answer.pixels), answer.applied, answer.mode, answer.size, answer.area
    )


def check(data: bytes, max_pixels: int, views: int = 1, preprocess: Preprocess = FULL) -> cost.Cost:
    """Check structure and size of an image by the head of its file; return what decoding costs.

    Args:
        data: The encoded file.
        max_pixels: Largest accepted width times height.
        views: Number of TTA views (crops, possibly mirrored) that are cut from the image.
        preprocess: As in `decode`.

    Raises:
        EmptyBody: `data` is empty.
        UnsupportedFormat: The format needs a package that is not installed.
        TooLarge: The image has more than `max_pixels` pixels.
        BrokenImage: The structure is beyond the limits of `serving.imaging.limits`.
    """
    if not data:
        raise EmptyBody("it is empty: 0 bytes, where an image should be")
    formats.check_installed(data)
    check_limits(data, max_pixels)
    estimated = cost.estimate(data, views, preprocess)
    _check_size(estimated.width, estimated.height, max_pixels)
    return estimated


def memory_limit(estimated: cost.Cost, max_pixels: int) -> int:
    """Return the bytes that a decoder process may take for an image.

    A file that doesn't state its size may have `max_pixels` pixels.
    """
    return estimated.bytes if estimated.pixels else cost.MAX_BYTES_PER_PIXEL * max_pixels


def memory_message(estimated: cost.Cost, memory: int, setting: str = "") -> str:
    """Return the message for an image that needs more memory than it may take.

    Args:
        estimated: Result of `check`.
        memory: Bytes that decoding may take.
        setting: The setting that limits `memory`, if it is less than `memory_limit`.
    """
    megabytes = f"the {memory >> 20} MB"
    if estimated.pixels:
        what = f"{estimated.width} x {estimated.height} pixels"
        remedy = f"allowed ({setting})" if setting else "that such a file should need; save it anew"
    else:
        what = "the image, whose size can't be read beforehand,"
        remedy = f"allowed ({setting or VARIABLE})"
    return f"decoding {what} needs more than {megabytes} {remedy}"


class LargerThanStated(Exception):
    """The file has more pixels than its head stated, or pixels that can be reduced less."""


def decode_here(
    data: bytes,
    *,
    max_pixels: int,
    preprocess: Preprocess = FULL,
    stated: cost.Cost | None = None,
    too_large: str = "",
) -> Decoded:
    """Decode one image in this process, after `check`.

    Args:
        data: The encoded file.
        max_pixels: Largest accepted width times height.
        preprocess: Preprocessing that follows: its background, and how far the image may be
            reduced while it is decoded.
        stated: Result of `check`, or None if the image may have more pixels than stated.
        too_large: Message where the memory of this process is not enough. "": one with the size.

    Raises:
        LargerThanStated: The image has more pixels than `stated`, or can be reduced less.
        ImageError: As `decode`.
    """
    raise_limit_of_pillow(max_pixels)
    image = _open(data, max_pixels, too_large)
    (width, height), mode = image.size, image.mode
    _check_size(width, height, max_pixels)
    reduction = preprocess.reduction(width, height)
    if stated and (
        width * height > stated.pixels
        or reduction < preprocess.reduction(stated.width, stated.height)
    ):
        raise LargerThanStated
    applied: list[str] = []
    try:
        if getattr(image, "is_animated", False):
            applied.append("first-frame")
        scale = reduced.draft(image, reduction)
        # Pillow turns a TIFF upright while it loads it, so its orientation is read before loading.
        # The orientation of other formats is read after loading, because reading it may load the
        # pixels of a PNG, and `_read_orientation` would hide the errors.
        turned_by_pillow = _read_orientation(image) if image.format == "TIFF" else 1
        frame = _load(image)
        if scale == 1:
            width, height = image.size
        orientation = 1 if plugins.is_upright(image) else _read_orientation(image)
        applied += plugins.applied(image, data)
        size = image.size
        if frame:
            image = image.crop(frame)
        rest = 1 if frame else reduction // scale
        rgb = colours.to_rgb(image, preprocess.background, applied, rest)
        del image  # free its pixels before the next copy is made
        if frame:
            applied.append("alpha-on-background")
            canvas = Image.new("RGB", size, preprocess.background)
            canvas.paste(rgb, frame)
            rgb = canvas
        area = (0.0, 0.0, width / (scale * rest), height / (scale * rest))
        if (turn := _UPRIGHT.get(orientation)) is not None:
            area = reduced.transpose_box(area, rgb.size, turn)
            rgb = rgb.transpose(turn)
            if turn in reduced.SWAPPED:
                width, height = height, width
        if turned_by_pillow in _UPRIGHT or orientation in _UPRIGHT:
            applied.append("exif-orientation")
    except _CORRUPT as error:
        raise BrokenImage(f"the image is broken: {_reason(error)}") from error
    except MemoryError as error:
        raise TooLarge(too_large or _no_memory(f"{width} x {height} pixels")) from error
    return Decoded(rgb, tuple(dict.fromkeys(applied)), mode, (width, height), area)


def _no_memory(what: str) -> str:
    return f"decoding {what} needs more memory than this process can have"


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} pixels {TOO_MANY.format(max_pixels)}")


def read(
    path: Path,
    *,
    max_pixels: int | None = None,
    preprocess: Preprocess = FULL,
) -> Decoded:
    """Decode an image file, like `decode`. Error messages don't contain the path.

    Args:
        path: Path of the file.
        max_pixels: Largest accepted width times height. None: as `decode`.
        preprocess: Preprocessing that follows: its background, and how far the image may be
            reduced while it is decoded.

    Raises:
        ImageError: The file can't be read (`BrokenImage`), or `decode` raises an error.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise BrokenImage(error.strerror or str(error)) from error
    return decode(data, max_pixels=max_pixels, preprocess=preprocess)


def read_bytes(path: Path) -> bytes:
    """Read the content of a regular file.

    Raises:
        OSError: The file can't be read, or is no regular file: reading a pipe might never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("no regular file")
    return path.read_bytes()


def _open(data: bytes, max_pixels: int, too_large: str) -> Image.Image:
    optional = formats.optional_format(data)
    try:
        if optional:
            return plugins.open_image(data, optional)
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        pass
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+ pixels", str(error))
        what = found[0] if found else "the image's pixels"
        raise TooLarge(f"{what} {TOO_MANY.format(max_pixels)}") from error
    except MemoryError as error:
        raise TooLarge(too_large or _no_memory("the image")) from error
    except _CORRUPT as error:
        raise BrokenImage(f"the image is broken: {_reason(error)}") from error
    if served := formats.served(data):
        raise BrokenImage(f"the image is broken: of {served}, but cut short or of an unknown kind")
    if unsupported := formats.unsupported(data):
        raise UnsupportedFormat(f"{unsupported} is not read; use one of {formats.readable()}")
    raise NotAnImage(f"no image that Fledge reads ({formats.readable()})")


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 (upright) if EXIF is missing, broken or invalid."""
    try:
        if not has_one_orientation(image.info):
            return 1
        stated = image.getexif().get(_ORIENTATION, 1)
        return int(stated) if stated in _UPRIGHT else 1
    except _CORRUPT:
        return 1


def _load(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Load the pixels, and convert the transparent colour of a PNG to 8 bits.

    Returns:
        The box of a GIF's first frame if it is smaller than the image; else None. The area outside
        the box should be transparent, but Pillow paints it with palette colour 0, so the caller
        needs the box.
    """
    tile = next(iter(getattr(image, "tile", ())), None)
    if image.mode == "P" and image.palette is None:
        raise ValueError("there is no palette")
    image.load()
    key = image.info.get("transparency")
    if tile and image.format == "PNG" and key is not None:
        # The file states the transparent colour in its own bit depth, which Pillow has converted.
        if tile.args in ("L;2", "L;4"):
            top = 3 if tile.args == "L;2" else 15
            image.info["transparency"] = (key & top) * 255 // top
        elif tile.args == "RGB;16B":
            image.info["transparency"] = tuple(sample >> 8 for sample in key)
    if tile and image.format == "GIF" and key is None and tile.extents != (0, 0, *image.size):
        return cast("tuple[int, int, int, int]", tile.extents)
    return None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
