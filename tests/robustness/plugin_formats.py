"""HEIC and JPEG XL: orientation, transparency, depth, profiles, several images, broken files."""

from __future__ import annotations

import importlib
import importlib.util
import io
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from tests.robustness import icc_profiles
from tests.robustness.orientation import ORIENTATION, exif_directory, stored_pixels
from tests.robustness.scene import (
    QUARTERS,
    SCENE,
    WHITE,
    Item,
    bad,
    encode_best,
    good,
    greys,
    quarters,
    scene,
)

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
HAS_JXL = importlib.util.find_spec("pillow_jxl") is not None


def items() -> list[Item]:
    return [*(heics() if HAS_HEIF else ()), *(jpeg_xls() if HAS_JXL else ())]


def heic(image: Image.Image, **options: object) -> bytes:
    """A HEIC by libheif and x265, with as little loss as they make."""
    importlib.import_module("pillow_heif").register_heif_opener()
    file = io.BytesIO()
    best: dict[str, object] = {"quality": 95, "chroma": 444, **options}
    image.save(file, "HEIF", **best)
    return file.getvalue()


def heic_of_10_bits() -> bytes:
    package = importlib.import_module("pillow_heif")
    deep = (SCENE.astype(np.uint16) * 257).tobytes()
    file = io.BytesIO()
    package.from_bytes("RGB;16", (64, 32), deep).save(file, quality=95, chroma=444)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    return b"Exif\0\0" + exif_directory(3, 1, struct.pack("<H", orientation))


def heics() -> list[Item]:
    plain = heic(scene())
    clear = np.dstack([SCENE, quarters([255, 0, 255, 255])])
    lying = heic(scene(), exif=exif(1))
    found = [
        good("heic", plain, tolerance=8),
        good("heic-of-half-colours", heic(scene(), chroma=420), tolerance=12),
        good("heic-grey", heic(Image.fromarray(quarters([20, 90, 160, 230]))),  # type: ignore[arg-type]
             colours=greys(20, 90, 160, 230), tolerance=8),
        good("heic-transparent", heic(Image.fromarray(clear)), "alpha-on-background",
             colours=(QUARTERS[0], WHITE, *QUARTERS[2:]), tolerance=8),
        good("heic-10-bits", heic_of_10_bits(), "16-bit-scaled", tolerance=8),
        good("heic-tiles", heic(scene().resize((128, 64), 0), tile_size=64), size=(128, 64),
             tolerance=8),
        good("heic-several", heic(scene(), save_all=True, append_images=[scene().rotate(180)],
                                  primary_index=0), "first-frame", tolerance=8),
        good("heic-second-is-primary", heic(scene().rotate(180), save_all=True,
                                            append_images=[scene()], primary_index=1),
             "first-frame", tolerance=8),
        good("heic-profile", heic(scene(), icc_profile=icc_profiles.rgb(2.2, swapped=True)),
             "icc-to-srgb", colours=tuple((g, r, b) for r, g, b in QUARTERS), tolerance=12),
        good("heic-unsafe-profile", heic(scene(), icc_profile=b"no profile at all"),
             "icc-ignored", tolerance=8),
        # A HEIC's own rotation counts; the one in EXIF is for information.
        good("heic-exif-says-6", lying.replace(exif(1)[6:], exif(6)[6:]), tolerance=8),
        good("heic-trailing-garbage", plain + bytes(100), tolerance=8),
        bad("heic-without-a-codec", plain.replace(b"hvcC", b"free", 1)),
        bad("heic-header-only", plain[:32]),
        bad("heic-half", plain[: len(plain) // 2]),
        good("heic-without-a-size", plain.replace(b"ispe", b"free"), tolerance=8),
        bad("heic-named-mif1-header-only", plain.replace(b"ftypheic", b"ftypmif1", 1)[:40]),
        bad("heic-too-large", plain.replace(b"ispe\0\0\0\0\0\0\0@", b"ispe\0\0\0\0\x7f\0\0@"),
            "too-large"),
    ]  # fmt: skip
    found += [
        good(
            f"heic-turned-{orientation}",
            heic(Image.fromarray(stored_pixels(orientation)), exif=exif(orientation)),
            *([ORIENTATION] if orientation > 1 else []),
            tolerance=8,
        )
        for orientation in range(1, 9)
    ]
    return found


def jpeg_xl(image: Image.Image, **options: object) -> bytes:
    importlib.import_module("pillow_jxl")
    file = io.BytesIO()
    image.save(file, "JXL", **{"lossless": True, **options})
    return file.getvalue()


def jpeg_in_jpeg_xl(jpeg: bytes) -> bytes:
    """A JPEG XL from which the JPEG can be made again, byte by byte."""
    importlib.import_module("pillow_jxl")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "a.jpg"
        path.write_bytes(jpeg)
        file = io.BytesIO()
        with Image.open(path) as image:
            image.save(file, "JXL", lossless_jpeg=True)
    return file.getvalue()


class Bits:
    """Writes the fields of a JPEG XL's head: the lowest bit of the first byte first."""

    def __init__(self) -> None:
        self.value = self.count = 0

    def put(self, *fields: tuple[int, int]) -> Bits:
        """Add numbers: (value, number of bits)."""
        for value, count in fields:
            self.value |= value << self.count
            self.count += count
        return self

    def bytes(self) -> bytes:
        return self.value.to_bytes((self.count + 7) // 8, "little")


def head(width: int, height: int, *fields: tuple[int, int]) -> bytes:
    """The signature and the size of a JPEG XL, and more fields, without an image."""
    size = Bits().put((0, 1), (3, 2), (height - 1, 30), (0, 3), (3, 2), (width - 1, 30))
    return b"\xff\x0a" + size.put(*fields).bytes()


def jpeg_xls() -> list[Item]:
    plain = jpeg_xl(scene())
    clear = np.dstack([SCENE, quarters([255, 0, 255, 255])])
    grey = Image.fromarray(quarters([20, 90, 160, 230]))  # type: ignore[arg-type]
    deep = Image.fromarray(quarters([5140, 23130, 41120, 59110], np.uint16))  # type: ignore[arg-type]
    turned = Image.fromarray(stored_pixels(6))
    return [
        good("jxl", plain),
        good("jxl-lossy", jpeg_xl(scene(), lossless=False, quality=95), tolerance=12),
        good("jxl-container", jpeg_xl(scene(), use_container=True)),
        good("jxl-grey", jpeg_xl(grey), colours=greys(20, 90, 160, 230)),
        good("jxl-transparent", jpeg_xl(Image.fromarray(clear)), "alpha-on-background",
             colours=(QUARTERS[0], WHITE, *QUARTERS[2:])),
        # The encoder states that such samples are linear in light.
        good("jxl-grey-16-bits", jpeg_xl(deep), "16-bit-scaled", "icc-to-srgb",
             colours=tuple(map(icc_profiles.linear_to_srgb, greys(20, 90, 160, 230)))),
        good("jxl-of-a-jpeg", jpeg_in_jpeg_xl(encode_best(scene(), "JPEG")), tolerance=8),
        good("jxl-of-a-turned-jpeg",
             jpeg_in_jpeg_xl(encode_best(turned, "JPEG", exif=exif(6))), ORIENTATION, tolerance=8),
        # JPEG XL states its orientation itself; the one in EXIF is for information.
        good("jxl-exif-says-6", jpeg_xl(scene(), exif=exif(6))),
        good("jxl-trailing-garbage", plain + bytes(100)),
        bad("jxl-signature-only", plain[:2]),
        bad("jxl-half", plain[: len(plain) // 2]),
        bad("jxl-container-only", b"\0\0\0\x0cJXL \r\n\x87\n"),
        bad("jxl-container-without-an-image", b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x08free"),
        bad("jxl-head-only", head(64, 32, (1, 1))),
        bad("jxl-too-large", head(2**30, 2**30, (1, 1)), "too-large"),
        bad("jxl-animated", head(64, 32, (0, 1), (1, 1), (0, 3), (0, 2), (1, 1)) + bytes(40),
            "unsupported-format"),
    ]  # fmt: skip
