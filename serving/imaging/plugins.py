"""Open HEIC and JPEG XL by optional plug-ins of Pillow, with one thread and no thumbnails.

The plug-ins are loaded in decoder processes alone (`serving.imaging.isolated`): all images of these
formats are decoded there. Their libraries apply the orientation that the format itself states; the
one in EXIF data repeats it and is ignored, as the standards say.
"""

from __future__ import annotations

import importlib
import io
import re
from typing import Any, Final

from PIL import Image, UnidentifiedImageError

from serving.errors import BrokenImage, UnsupportedFormat
from serving.imaging.formats import OptionalFormat, optional_format
from serving.imaging.heads import plugins as heads

# Bytes per sample of Pillow's modes, times the number of channels.
_PIXEL_BYTES: Final = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 2, "F": 4}

# Description of the profile that libjxl makes for sRGB: space, white point, primaries, intent and
# transfer function.
_SRGB: Final = re.compile(
    b"|".join(
        f"{space}_D65_{primaries}{intent}_SRG".encode("utf-16-be")
        for space, primaries in (("RGB", "SRG_"), ("Gra", ""))
        for intent in ("Per", "Rel", "Sat", "Abs")
    )
)


def load(data: bytes) -> None:
    """Load the plug-in that opens an image, if it is of an optional format."""
    found = optional_format(data)
    if found and found.installed:
        _register(found)


def _register(kind: OptionalFormat) -> None:
    package: Any = importlib.import_module(kind.package)
    if kind.plugin == "HEIF":
        package.register_heif_opener(
            decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
        )
    else:
        package.JpegXLImagePlugin.DECODE_THREADS = 0


def open_image(data: bytes, kind: OptionalFormat) -> Image.Image:
    """Open an image of an optional format.

    Args:
        data: The encoded file.
        kind: Its format, whose package is installed.

    Raises:
        UnsupportedFormat: The image has several frames, or colours, that the plug-in does not read.
        BrokenImage: The data is truncated or corrupt.
    """
    _register(kind)
    if kind.plugin == "JXL":
        head = heads.jpeg_xl(data)
        if head and head.animated:
            raise UnsupportedFormat("an animated JPEG XL is not read; save one of its frames")
    try:
        image = Image.open(io.BytesIO(data), formats=(kind.plugin,))
    except (UnidentifiedImageError, RuntimeError):
        raise BrokenImage(
            f"the image is broken: of {kind.name}, but cut short, damaged or of an unusual kind"
        ) from None
    except BaseException as error:
        # How a panic of a package in Rust is raised.
        if type(error).__name__ != "PanicException":
            raise
        raise BrokenImage(f"the image is broken: of {kind.name}, but of an unknown kind") from None
    if kind.plugin == "JXL":
        _check_jpeg_xl(image)
    return image


def _check_jpeg_xl(image: Any) -> None:
    """Refuse what the plug-in takes for something else; drop the profile of sRGB."""
    if image.jpeg:
        return
    profile = image.info.get("icc_profile", b"")
    expected = image.width * image.height * _PIXEL_BYTES.get(image.mode, 0)
    # The plug-in states 8 bits for grey with alpha of any depth, and RGB for CMYK.
    if len(image._data) != expected or profile[16:20] == b"CMYK":
        raise UnsupportedFormat(
            "a JPEG XL in CMYK, or in grey with alpha and more than 8 bits, is not read; save it "
            "as PNG"
        )
    if _SRGB.search(profile):
        del image.info["icc_profile"]


def is_upright(image: Image.Image) -> bool:
    """Return whether the decoder has applied the orientation, so that EXIF must not do it again.

    A JPEG in a JPEG XL is given back as it was, with an orientation in EXIF that applies.
    """
    return image.format == "HEIF" or (image.format == "JXL" and not getattr(image, "jpeg", False))


def applied(image: Image.Image, data: bytes) -> list[str]:
    """Return the names of the conversions that the decoder has made; see `decode.Decoded`.

    Args:
        image: An image that `open_image` returned; of another one, nothing is returned.
        data: The encoded file.
    """
    if not is_upright(image):
        return []
    is_heif = image.format == "HEIF"
    head = heads.heif(data) if is_heif else heads.jpeg_xl(data)
    depth = image.info.get("bit_depth", 8) if is_heif else head.depth if head else 8
    found = ["exif-orientation"] if head and head.turned else []
    # Deep samples in grey are scaled by `decode`.
    return [*found, "16-bit-scaled"] if depth > 8 and image.mode not in ("I;16", "F") else found
