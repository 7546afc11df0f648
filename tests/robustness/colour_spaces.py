"""Colours that are not red, green and blue: inks, and light apart from colour."""

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
    fine,
    good,
    greys,
    scene,
)


def items() -> list[Item]:
    cmyk = scene().convert("CMYK")
    said = "cmyk-to-rgb"
    plain = fine(cmyk, "JPEG")
    mark = plain.index(b"\xff\xee\x00\x0eAdobe")
    unmarked = plain[:mark] + plain[mark + 16 :]
    # As stored: luminance and chrominance of the inverse colours, and no black.
    ycck = Image.merge(
        "CMYK", [*inverse(Image.fromarray(255 - SCENE)), Image.new("L", scene().size)]
    )
    luminous = bytearray(fine(ycck, "JPEG"))
    luminous[luminous.index(b"Adobe") + 11] = 2
    deep = np.asarray(cmyk).astype("<u2") * 257
    return [
        good("cmyk-jpeg", plain, said, tolerance=10),
        good("cmyk-jpeg-unmarked", unmarked, said, tolerance=10),
        good("ycck-jpeg", bytes(luminous), said, tolerance=10),
        good("cmyk-tiff", fine(cmyk, "TIFF"), said),
        good("cmyk-tiff-16-bit", tiff(tags([16] * 4, 5), deep.tobytes()), said),
        good(
            "cmyk-tiff-black",
            fine(Image.new("CMYK", (64, 32), (0, 0, 0, 255)), "TIFF"),
            said,
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


def inverse(image: Image.Image) -> list[Image.Image]:
    return [band.point(lambda value: 255 - value) for band in image.convert("YCbCr").split()]


def lab() -> Image.Image:
    profiles_ = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    transform = ImageCms.buildTransform(*profiles_, "RGB", "LAB")
    return ImageCms.applyTransform(scene(), transform)  # type: ignore[return-value]
