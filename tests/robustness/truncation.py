"""Truncated files: cut at every tenth of their length."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.robustness.scene import Item, bad, encode, encode_best, noise

NOISE = noise(7)


def complete_files() -> dict[str, bytes]:
    grey = Image.fromarray(np.asarray(NOISE)[..., 0])
    return {
        "jpeg": encode(NOISE, "JPEG"),
        "jpeg-progressive": encode(NOISE, "JPEG", progressive=True),
        "jpeg-restarts": encode(NOISE, "JPEG", restart_marker_blocks=2),
        "png": encode(NOISE, "PNG"),
        "png-16-bit": encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"),
        "webp": encode(NOISE, "WEBP"),
        "webp-lossless": encode_best(NOISE, "WEBP"),
        "webp-animated": encode(NOISE, "WEBP", save_all=True, append_images=[noise(8)]),
        "gif": encode(NOISE, "GIF"),
        "bmp": encode(NOISE, "BMP"),
        "bmp-8-bit": encode(grey, "BMP"),
        "tiff": encode(NOISE, "TIFF"),
        "tiff-tiff_lzw": encode(NOISE, "TIFF", compression="tiff_lzw"),
        "tiff-tiff_adobe_deflate": encode(NOISE, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-packbits": encode(NOISE, "TIFF", compression="packbits"),
        "tiff-jpeg": encode(NOISE, "TIFF", compression="jpeg"),
        "avif": encode(NOISE, "AVIF"),
    }


def items() -> list[Item]:
    return [
        bad(f"cut-{tenths}0%-{name}", data[: len(data) * tenths // 10])
        for name, data in complete_files().items()
        for tenths in range(1, 10)
    ]
