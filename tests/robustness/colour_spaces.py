"""Colour spaces other than RGB: CMYK, YCCK, YCbCr, Lab."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

from tests.robustness.file_builders import (
    SHORT,
    tags,
    tiff,
)
from tests.robustness.scene import (
    SCENE,
    Item,
    encode,
    encode_best,
    good,
    greys,
    scene,
)

CMYK = "cmyk-to-rgb"


def items() -> list[Item]:
    cmyk = scene().convert("CMYK")
    plain = encode_best(cmyk, "JPEG")
    mark = plain.index(b"\xff\xee\x00\x0eAdobe")
    without_marker = plain[:mark] + plain[mark + 16 :]
    # YCCK as stored: YCbCr of the inverted colours, and no black.
    ycck = Image.merge(
        "CMYK", [*inverted_ycbcr(Image.fromarray(255 - SCENE)), Image.new("L", scene().size)]
    )
    ycck_jpeg = bytearray(encode_best(ycck, "JPEG"))
    ycck_jpeg[ycck_jpeg.index(b"Adobe") + 11] = 2
    cmyk_16_bit = np.asarray(cmyk).astype("<u2") * 257
    return [
        good("cmyk-jpeg", plain, CMYK, tolerance=10),
        good("cmyk-jpeg-unmarked", without_marker, CMYK, tolerance=10),
        good("ycck-jpeg", bytes(ycck_jpeg), CMYK, tolerance=10),
        good("cmyk-tiff", encode_best(cmyk, "TIFF"), CMYK),
        good("cmyk-tiff-16-bit", tiff(tags([16] * 4, 5), cmyk_16_bit.tobytes()), CMYK),
        good(
            "cmyk-tiff-black",
            encode_best(Image.new("CMYK", (64, 32), (0, 0, 0, 255)), "TIFF"),
            CMYK,
            colours=greys(0, 0, 0, 0),
        ),
        good("rgb-jpeg", encode(scene(), "JPEG", quality=95, keep_rgb=True), tolerance=8),
        good(
            "ycbcr-tiff",
            tiff(
                tags([8] * 3, 6, (530, SHORT, [1, 1])),
                np.asarray(scene().convert("YCbCr")).tobytes(),
            ),
            "ycbcr-to-rgb",
            tolerance=4,
        ),
        good("lab-tiff", tiff(tags([8] * 3, 8), lab().tobytes()), "lab-to-rgb", tolerance=10),
    ]


def inverted_ycbcr(image: Image.Image) -> list[Image.Image]:
    return [band.point(lambda value: 255 - value) for band in image.convert("YCbCr").split()]


def lab() -> Image.Image:
    profiles_ = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    transform = ImageCms.buildTransform(*profiles_, "RGB", "LAB")
    return ImageCms.applyTransform(scene(), transform)  # type: ignore[return-value]
