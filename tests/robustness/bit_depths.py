"""Samples with other depths than 8 bits: scaled by their range, not clipped."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.robustness.file_builders import (
    GREY,
    GREY_ALPHA,
    RGB,
    SHORT,
    chunk,
    png,
    tags,
    tiff,
)
from tests.robustness.scene import (
    QUARTERS,
    RED,
    WHITE,
    YELLOW,
    Item,
    bad,
    encode,
    good,
    greys,
    quarters,
)

DEEP, FLOAT, ALPHA = "16-bit-scaled", "float-scaled", "alpha-on-background"
STEPS = (0, 85, 170, 255)
RAMP = quarters([value * 257 for value in STEPS], np.uint16)
DARK = quarters([0, 2570, 5140, 7710], np.uint16)


def to_16_bit(colours: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """8-bit colours as quarters of 16-bit samples."""
    return quarters([[value * 257 for value in colour] for colour in colours], np.uint16)


def grey_tiff(samples: np.ndarray, bits: int, photometric: int, form: int, order: str) -> bytes:
    kind = samples.dtype.newbyteorder(order)
    return tiff(
        tags([bits], photometric, (339, SHORT, [form])), samples.astype(kind).tobytes(), order=order
    )


def pack_12_bit(samples: np.ndarray) -> bytes:
    """Pairs of 12-bit samples packed in three bytes."""
    first, second = samples[:, ::2].astype(int), samples[:, 1::2].astype(int)
    three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    return three.astype(np.uint8).tobytes()


def trns_colour(*samples: int) -> bytes:
    """A tRNS chunk: the transparent colour (colour key)."""
    return chunk(b"tRNS", np.array(samples, ">u2").tobytes())


def floats(*values: float) -> bytes:
    return grey_tiff(quarters(list(values), np.float32), 32, 1, 3, "<")


def sixteen_bit_items() -> list[Item]:
    ramp, dark = greys(*STEPS), greys(0, 10, 20, 30)
    inverse, signed = greys(*STEPS[::-1]), greys(0, 42, 85, 127)
    halves = quarters([0, 10_880, 21_760, 32_639], np.int16)
    return [
        good("16-bit-grey-png", png(RAMP, 16, GREY), DEEP, colours=ramp),
        good("16-bit-grey-png-dark", png(DARK, 16, GREY), DEEP, colours=dark),
        good("16-bit-grey-png-black", png(RAMP * 0, 16, GREY), DEEP, colours=greys(0, 0, 0, 0)),
        good("8-bit-grey-png-dark", png(DARK // 257, 8, GREY), colours=dark),
        good("16-bit-grey-tiff", grey_tiff(RAMP, 16, 1, 1, "<"), DEEP, colours=ramp),
        good("16-bit-grey-tiff-big-endian", grey_tiff(RAMP, 16, 1, 1, ">"), DEEP, colours=ramp),
        good("16-bit-grey-tiff-dark", grey_tiff(DARK, 16, 1, 1, ">"), DEEP, colours=dark),
        good("16-bit-white-is-zero", grey_tiff(RAMP, 16, 0, 1, "<"), DEEP, colours=inverse),
        good("16-bit-signed-tiff", grey_tiff(halves, 16, 1, 2, "<"), DEEP, colours=signed),
        good(
            "16-bit-deflated-tiff",
            encode(Image.fromarray(RAMP), "TIFF", compression="tiff_adobe_deflate"),
            DEEP,
            colours=ramp,
        ),
        good("16-bit-rgb-png", png(to_16_bit(QUARTERS), 16, RGB)),
        good(
            "16-bit-rgb-tiff", tiff(tags([16] * 3, 2), to_16_bit(QUARTERS).astype("<u2").tobytes())
        ),
        good(
            "16-bit-rgb-tiff-big-endian",
            tiff(tags([16] * 3, 2), to_16_bit(QUARTERS).astype(">u2").tobytes(), order=">"),
        ),
        good(
            "16-bit-rgba-png",
            png(
                to_16_bit(tuple((*c, a) for c, a in zip(QUARTERS, (0, 255, 255, 0), strict=True))),
                16,
                6,
            ),
            ALPHA,
            colours=(WHITE, *QUARTERS[1:3], WHITE),
        ),
        good(
            "16-bit-grey-and-alpha-png",
            png(to_16_bit(((9, 0), (85, 255), (170, 255), (255, 255))), 16, GREY_ALPHA),
            ALPHA,
            colours=greys(255, *STEPS[1:]),
        ),
    ]


def colour_key_items() -> list[Item]:
    """PNGs with a colour key: only that colour is transparent, not the neighbouring values."""
    neighbours = quarters([21_845, 21_846, 0, 65_535], np.uint16)
    return [
        good(
            "16-bit-grey-png-keyed",
            png(neighbours, 16, GREY, trns_colour(21_845)),
            DEEP,
            ALPHA,
            colours=greys(255, 85, 0, 255),
        ),
        good(
            "16-bit-rgb-png-keyed",
            png(to_16_bit(QUARTERS), 16, RGB, trns_colour(*(value * 257 for value in RED))),
            ALPHA,
            colours=(WHITE, *QUARTERS[1:]),
        ),
        good(
            "16-bit-rgb-png-keyed-unused-colour",
            png(to_16_bit(QUARTERS), 16, RGB, trns_colour(*RED)),
            ALPHA,
        ),
        *(
            good(
                f"{depth}-bit-grey-png-keyed",
                png(quarters([0, 1, top - 1, top]), depth, GREY, trns_colour(1)),
                ALPHA,
                colours=greys(0, 255, (top - 1) * 255 // top, 255),
            )
            for depth, top in ((2, 3), (4, 15), (8, 255))
        ),
        good(
            "1-bit-png-keyed",
            png(quarters([0, 1, 1, 0]), 1, GREY, trns_colour(0)),
            ALPHA,
            colours=greys(255, 255, 255, 255),
        ),
        good(
            "rgb-png-keyed",
            png(quarters(list(QUARTERS)), 8, RGB, trns_colour(*YELLOW)),
            ALPHA,
            colours=(*QUARTERS[:3], WHITE),
        ),
    ]


def items() -> list[Item]:
    ramp = greys(*STEPS)
    ramp_12_bit = quarters([0, 1365, 2730, 4095], np.uint16)
    found = [*sixteen_bit_items(), *colour_key_items()]
    found += [
        good(f"{depth}-bit-grey-png", png(quarters([0, 1, 1, top]), depth, GREY), colours=colours)
        for depth, top, colours in (
            (1, 1, greys(0, 255, 255, 255)),
            (2, 3, greys(0, 85, 85, 255)),
            (4, 15, greys(0, 17, 17, 255)),
        )
    ]
    found += [
        good(
            "1-bit-tiff", encode(Image.fromarray(RAMP > 0), "TIFF"), colours=greys(0, 255, 255, 255)
        ),
        good(
            "1-bit-tiff-white-is-zero",
            tiff(tags([1], 0), pack_1_bit(RAMP > 0)),
            colours=greys(255, 0, 0, 0),
        ),
        good("12-bit-tiff", tiff(tags([12], 1), pack_12_bit(ramp_12_bit)), DEEP, colours=ramp),
        good(
            "32-bit-tiff-in-16-bits",
            grey_tiff(RAMP.astype(np.int32), 32, 1, 2, "<"),
            DEEP,
            colours=ramp,
        ),
        good(
            "32-bit-tiff-big-endian",
            grey_tiff(RAMP.astype(np.int32), 32, 1, 2, ">"),
            DEEP,
            colours=ramp,
        ),
        good(
            "32-bit-tiff-beyond-16-bits",
            grey_tiff(RAMP.astype(np.int32) * 1000, 32, 1, 2, "<"),
            DEEP,
            colours=ramp,
        ),
        good(
            "32-bit-tiff-below-zero",
            grey_tiff(RAMP.astype(np.int32) * 1000 - 40_000_000, 32, 1, 2, "<"),
            DEEP,
            colours=ramp,
        ),
        good("float-tiff-to-1", floats(0, 1 / 3, 2 / 3, 1), FLOAT, colours=ramp),
        good("float-tiff-to-255", floats(0, 85, 170, 255), FLOAT, colours=ramp),
        good("float-tiff-to-65535", floats(0, 21_845, 43_690, 65_535), FLOAT, colours=ramp),
        good("float-tiff-above-65535", floats(0, 1e9, 2e9, 3e9), FLOAT, colours=ramp),
        good(
            "float-tiff-below-zero",
            floats(-1.5, -0.5, 0.5, 1),
            FLOAT,
            colours=greys(0, 102, 204, 255),
        ),
        good("float-tiff-flat", floats(0, 0, 0, 0), FLOAT, colours=greys(0, 0, 0, 0)),
        good("float-tiff-largest", floats(0, 0, 0, 3.4e38), FLOAT, colours=greys(0, 0, 0, 255)),
        bad("float-tiff-not-a-number", floats(0, 1, float("nan"), 1)),
        bad("float-tiff-infinity", floats(0, 1, 1, float("-inf"))),
        good(
            "8-bit-tiff-white-is-zero",
            tiff(tags([8], 0), quarters(list(STEPS)).tobytes()),
            colours=greys(*STEPS[::-1]),
        ),
        # Sample formats that Pillow does not support.
        bad("64-bit-float-tiff", grey_tiff(RAMP.astype(np.float64), 64, 1, 3, "<")),
        bad("16-bit-float-tiff", grey_tiff(DARK.astype(np.float16), 16, 1, 3, "<")),
        bad(
            "32-bit-rgb-tiff", tiff(tags([32] * 3, 2), to_16_bit(QUARTERS).astype("<u4").tobytes())
        ),
    ]
    return found


def pack_1_bit(bits: np.ndarray) -> bytes:
    """1 bit per sample, packed as in TIFF."""
    return np.packbits(bits, axis=1).tobytes()
