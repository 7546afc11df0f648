"""BMP: depths, headers, run-length encoding and bit fields."""

from __future__ import annotations

import struct

import numpy as np

from tests.robustness.file_builders import COLOURS
from tests.robustness.scene import (
    INDICES,
    QUARTERS,
    SCENE,
    SIZE,
    WHITE,
    Item,
    bad,
    encode,
    good,
    noise,
    quarters,
    scene,
)

RAW, RLE8, RLE4, FIELDS, JPEG = range(5)
BGR = SCENE[..., ::-1]
ALPHA = "alpha-on-background"
PALETTE = b"".join(COLOURS[at : at + 3][::-1] + b"\0" for at in range(0, 12, 3))
BOTTOM_UP = INDICES[::-1]


def bmp(
    pixels: bytes,
    bits: int,
    code: int = RAW,
    *,
    size: tuple[int, int] = SIZE,
    palette: bytes = b"",
    masks: tuple[int, ...] = (),
    header: int = 40,
    colours: int | None = None,
) -> bytes:
    """A BMP file. masks: after the first 40 bytes of the header, inside it or behind it."""
    words = (*size, 1, bits, code, len(pixels), 2835, 2835)
    stated = len(palette) // 4 if colours is None else colours
    head = struct.pack("<IiiHHIIii", header, *words) + struct.pack("<II", stated, 0)
    head = (head + struct.pack(f"<{len(masks)}I", *masks)).ljust(header, b"\0")
    start = 14 + len(head) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start) + head + palette + pixels


def pack_indices(indices: np.ndarray, bits: int) -> bytes:
    """Rows of `bits` per pixel, bottom row first."""
    planes = (indices[::-1, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.reshape(len(indices), -1), axis=1).tobytes()


def pack_16_bit(red: int, green: int, blue: int) -> bytes:
    """16 bits per pixel, with the given numbers of bits per channel."""
    scaled = (
        (SCENE[::-1].astype(int) * (2 ** np.array([red, green, blue]) - 1) / 255)
        .round()
        .astype(int)
    )
    words = scaled[..., 0] << green + blue | scaled[..., 1] << blue | scaled[..., 2]
    return words.astype("<u2").tobytes()


def run_lengths(indices: np.ndarray, four: bool = False) -> bytes:
    rows = []
    for row in indices[::-1]:
        cuts = np.flatnonzero(np.diff(row)) + 1
        runs = [(len(run), int(run[0])) for run in np.split(row, cuts)]
        rows.append(
            b"".join(bytes([count, value * 17 if four else value]) for count, value in runs)
        )
    return b"\0\0".join(rows) + b"\0\1"


def absolute_mode(indices: np.ndarray) -> bytes:
    """RLE8 data in absolute mode: literal bytes."""
    return (
        b"".join(bytes([0, len(row)]) + row.tobytes() + b"\0\0" for row in indices[::-1]) + b"\0\1"
    )


def with_fourth_byte(last: np.ndarray | int) -> bytes:
    spare = np.broadcast_to(np.asarray(last, np.uint8), SCENE.shape[:2])
    return np.dstack([BGR, spare])[::-1].tobytes()


def items() -> list[Item]:
    eight, plain = BOTTOM_UP.tobytes(), BGR[::-1].tobytes()
    core = (
        struct.pack("<2sIHHI", b"BM", 0, 0, 0, 26) + struct.pack("<IHHHH", 12, *SIZE, 1, 24) + plain
    )
    alpha = quarters([0, 255, 255, 0])
    rgba = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    on_white = (WHITE, *QUARTERS[1:3], WHITE)
    return [
        good("bmp-by-pillow", encode(scene(), "BMP")),
        good(
            "bmp-1-bit",
            bmp(pack_indices(INDICES % 2, 1), 1, palette=PALETTE[:8]),
            colours=QUARTERS[:2] * 2,
        ),
        good("bmp-4-bit", bmp(pack_indices(INDICES, 4), 4, palette=PALETTE)),
        good("bmp-8-bit", bmp(eight, 8, palette=PALETTE)),
        good("bmp-16-bit", bmp(pack_16_bit(5, 5, 5), 16), tolerance=8),
        good(
            "bmp-16-bit-565",
            bmp(pack_16_bit(5, 6, 5), 16, FIELDS, masks=(0xF800, 0x7E0, 0x1F)),
            tolerance=8,
        ),
        good("bmp-24-bit", bmp(plain, 24)),
        good("bmp-24-bit-top-down", bmp(BGR.tobytes(), 24, size=(64, -32))),
        good("bmp-8-bit-top-down", bmp(INDICES.tobytes(), 8, size=(64, -32), palette=PALETTE)),
        good("bmp-32-bit", bmp(with_fourth_byte(0), 32)),
        good("bmp-32-bit-fields", bmp(with_fourth_byte(0), 32, FIELDS, masks=rgba[:3])),
        good(
            "bmp-v4-alpha",
            bmp(with_fourth_byte(alpha), 32, FIELDS, masks=rgba, header=108),
            ALPHA,
            colours=on_white,
        ),
        good(
            "bmp-v5-alpha",
            bmp(with_fourth_byte(alpha), 32, FIELDS, masks=rgba, header=124),
            ALPHA,
            colours=on_white,
        ),
        good(
            "bmp-v5-opaque", bmp(with_fourth_byte(255), 32, FIELDS, masks=rgba, header=124), ALPHA
        ),
        good("bmp-v5", bmp(plain, 24, header=124)),
        good("bmp-os2", core),
        good("bmp-rle8", bmp(run_lengths(INDICES), 8, RLE8, palette=PALETTE)),
        good("bmp-rle8-literal", bmp(absolute_mode(INDICES), 8, RLE8, palette=PALETTE)),
        good("bmp-rle4", bmp(run_lengths(INDICES, four=True), 4, RLE4, palette=PALETTE)),
        good("bmp-odd-width", encode(scene().crop((0, 0, 63, 32)), "BMP"), size=(63, 32)),
        good("bmp-trailing-garbage", bmp(plain, 24) + bytes(999)),
        good("bmp-gap-before-the-pixels", with_gap(bmp(plain, 24), 64)),
        bad("bmp-rle8-too-short", bmp(run_lengths(INDICES[16:]), 8, RLE8, palette=PALETTE)),
        bad("bmp-rle8-without-pixels", bmp(b"\0\1", 8, RLE8, palette=PALETTE)),
        bad("bmp-with-a-jpeg-inside", bmp(encode(noise(), "JPEG"), 24, JPEG)),
        bad("bmp-invalid-fields", bmp(with_fourth_byte(0), 32, FIELDS, masks=(1, 2, 4))),
        bad("bmp-64-bit", bmp(bytes(64 * 32 * 8), 64)),
        bad("bmp-too-few-rows", bmp(plain[:-192], 24)),
        bad("bmp-zero-width", bmp(plain, 24, size=(0, 32)), "not-an-image"),
        bad("bmp-unknown-header", bmp(plain, 24, header=41)),
    ]


def with_gap(data: bytes, gap: int) -> bytes:
    return data[:10] + struct.pack("<I", 54 + gap) + data[14:54] + bytes(gap) + data[54:]
