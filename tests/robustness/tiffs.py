"""TIFF: byte orders, compressions, strips, tiles, planes, broken directories."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from tests.robustness.file_builders import LONG, SHORT, tags, tiff
from tests.robustness.scene import (
    BLACK,
    SCENE,
    SIZE,
    WHITE,
    Item,
    bad,
    encode,
    good,
    scene,
)

FIRST = "first-frame"
RAW = SCENE.tobytes()


def tiles(side: int) -> list[bytes]:
    """The scene in square tiles, zero-padded at the border."""
    width, height = (-(-length // side) * side for length in SIZE)
    padded = np.zeros((height, width, 3), np.uint8)
    padded[: SIZE[1], : SIZE[0]] = SCENE
    return [
        padded[y : y + side, x : x + side].tobytes()
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def tile_tags(width: int, height: int) -> list[tuple[int, int, list[int]]]:
    kept = [tag for tag in tags([8] * 3, 2) if tag[0] != 278]
    return [*kept, (322, LONG, [width]), (323, LONG, [height])]


def with_next_directory(data: bytes, to: int) -> bytes:
    """Set the offset of the next directory."""
    start = struct.unpack_from("<I", data, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    return data[:end] + struct.pack("<I", to) + data[end + 4 :]


def compressed(kind: str, image: Image.Image | None = None) -> bytes:
    return encode(image or scene(), "TIFF", compression=kind)


def items() -> list[Item]:
    plain = tiff(tags([8] * 3, 2), RAW)
    big = tiff(tags([8] * 3, 2), RAW, big=True)
    black_and_white = Image.fromarray(SCENE[..., 0] > 100)
    two = (WHITE, BLACK, BLACK, WHITE)
    planes = [SCENE[..., band].tobytes() for band in range(3)]
    return [
        good("tiff", plain),
        good("tiff-big-endian", tiff(tags([8] * 3, 2), RAW, order=">")),
        good("tiff-64-bit", big),
        good("tiff-64-bit-by-pillow", encode(scene(), "TIFF", big_tiff=True)),
        good(
            "tiff-strips",
            tiff(tags([8] * 3, 2, rows=5), *(SCENE[y : y + 5].tobytes() for y in range(0, 32, 5))),
        ),
        good("tiff-planes", tiff(tags([8] * 3, 2, (284, SHORT, [2])), *planes)),
        good("tiff-tiles", tiff(tile_tags(16, 16), *tiles(16), tiled=True)),
        good("tiff-tiles-over-the-border", tiff(tile_tags(48, 48), *tiles(48), tiled=True)),
        *(
            good(f"tiff-{kind}", compressed(kind))
            for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
        ),
        good("tiff-jpeg", compressed("jpeg"), tolerance=16),
        *(
            good(f"tiff-{kind}", compressed(kind, black_and_white), colours=two)
            for kind in ("group3", "group4", "tiff_ccitt")
        ),
        good(
            "tiff-two-pages",
            encode(scene(), "TIFF", save_all=True, append_images=[scene().rotate(180)]),
            FIRST,
        ),
        good(
            "tiff-next-page-is-itself",
            with_next_directory(plain, struct.unpack_from("<I", plain, 4)[0]),
        ),
        good("tiff-next-page-is-nowhere", with_next_directory(plain, 2**31), FIRST),
        good("tiff-trailing-garbage", plain + bytes(1000)),
        good("tiff-unknown-tags", tiff(tags([8] * 3, 2, (65_000, 7, [1, 2, 3, 4, 5])), RAW)),
        good(
            "tiff-resolution-zero",
            tiff(tags([8] * 3, 2, (282, 11, [0]), (283, 11, [0])), RAW),
        ),
        # Pillow reads it as a 32-bit TIFF.
        bad("tiff-64-bit-big-endian", tiff(tags([8] * 3, 2), RAW, order=">", big=True)),
        bad("tiff-without-a-directory", plain[:8]),
        bad("tiff-directory-is-nowhere", plain[:4] + b"\xff\xff\xff\x7f" + plain[8:]),
        bad("tiff-directory-is-the-header", plain[:4] + bytes(4) + plain[8:]),
        bad("tiff-without-strips", tiff(tags([8] * 3, 2))),
        bad(
            "tiff-strip-is-nowhere",
            tiff(tags([8] * 3, 2), RAW).replace(
                struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 1, 2**31 - 1)
            ),
        ),
        bad("tiff-too-few-bytes", tiff(tags([8] * 3, 2), RAW[:99])),
        bad("tiff-without-a-width", tiff(tags([8] * 3, 2)[1:], RAW)),
        bad("tiff-zero-width", tiff(tags([8] * 3, 2, size=(0, 32)), RAW)),
        bad("tiff-width-of-text", tiff([(256, 2, [54, 52, 0]), *tags([8] * 3, 2)[1:]], RAW)),
        bad("tiff-3-bits", tiff(tags([3] * 3, 2), RAW)),
        bad(
            "tiff-compression-1234",
            tiff([(259, SHORT, [1234]), *(tag for tag in tags([8] * 3, 2) if tag[0] != 259)], RAW),
        ),
        bad(
            "tiff-lzw-of-noise",
            tiff(
                [(259, SHORT, [5]), *(tag for tag in tags([8] * 3, 2) if tag[0] != 259)],
                bytes(range(256)) * 8,
            ),
        ),
        bad("tiff-seven-samples", tiff(tags([8] * 7, 2), RAW * 3)),
        bad("tiff-zero-size-tiles", tiff(tile_tags(0, 0), RAW, tiled=True)),
        bad("tiff-64-bit-endless", big[:8] + struct.pack("<Q", 2**63) + big[16:]),
    ]
