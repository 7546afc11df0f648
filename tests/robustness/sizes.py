"""Extreme shapes, and decompression bombs: files whose header claims far too many pixels."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from tests.robustness.bmps import RLE4, RLE8, bmp
from tests.robustness.file_builders import (
    COLOURS,
    GREY,
    LONG,
    PNG_MAGIC,
    SHORT,
    Tag,
    chunk,
    gif,
    gif_control,
    gif_frame,
    header,
    riff,
    tags,
    tiff,
)
from tests.robustness.jpegs import with_stated_size
from tests.robustness.scene import (
    INDICES,
    RED,
    Item,
    bad,
    encode,
    encode_best,
    good,
    greys,
    noise,
    scene,
)

SIDE = 60_000
SHAPES = ((1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (3, 3), (10_000, 2), (2, 10_000))
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def png_claiming(width: int, height: int) -> bytes:
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return PNG_MAGIC + header(width, height, 8, GREY) + body + chunk(b"IEND")


def webp_claiming(width: int, height: int) -> bytes:
    picture = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(40)
    return riff((b"VP8L", picture))


def webp_canvas_claiming(side: int) -> bytes:
    canvas = struct.pack("<B3x", 2) + (side - 1).to_bytes(3, "little") * 2
    picture = encode_best(scene(), "WEBP")[12:]
    frame = bytes(6) + b"\x3f\0\0\x1f\0\0" + bytes(4)
    return riff((b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", frame + picture))


def avif_claiming(width: int, height: int) -> bytes:
    plain = encode_best(scene(), "AVIF")
    at = plain.index(b"ispe") + 8
    return plain[:at] + struct.pack(">II", width, height) + plain[at + 8 :]


def one_tile(side: int, *more: Tag) -> bytes:
    """A black TIFF of the usual size in one deflated tile of side x side."""
    packed = zlib.compress(bytes(min(side * side, 100_000)))
    kept = [tag for tag in tags([8], 1) if tag[0] not in (259, 278)]
    sides = [(259, SHORT, [8]), (322, SHORT, [side]), (323, SHORT, [side])]
    return tiff([*kept, *sides, *more], packed, tiled=True)


def decompression_bombs() -> list[Item]:
    """Files of at most a few thousand bytes that claim more pixels than the limit."""
    frame = gif_frame(INDICES, claims=(SIDE, SIDE))
    rows = b"\1\0\0\0" * 1000
    quads = bytes(16)
    claims = {
        "png": png_claiming(SIDE, SIDE),
        "png-wide": png_claiming(2**31 - 1, 1),
        "png-tall": png_claiming(1, 2**31 - 1),
        "png-largest": png_claiming(2**31 - 1, 2**31 - 1),
        "png-one-row-too-many": png_claiming(10_000, 10_001),
        "gif-screen": gif(gif_frame(INDICES), palette=COLOURS, size=(SIDE, SIDE)),
        "gif-frame": gif(frame, palette=COLOURS),
        **{
            f"gif-frame-of-disposal-{disposal}": gif(
                gif_frame(INDICES, claims=(SIDE, SIDE), control=gif_control(disposal, key)),
                palette=COLOURS,
            )
            for disposal, key in ((2, None), (2, 1), (3, 1))
        },
        "gif-frame-far-away": gif(gif_frame(INDICES, at=(SIDE, SIDE)), palette=COLOURS),
        "jpeg": with_stated_size(SIDE, SIDE),
        "jpeg-progressive": with_stated_size(
            SIDE,
            SIDE,
            encode_best(scene(), "JPEG", progressive=True).replace(b"\xff\xc2", b"\xff\xc0", 1),
        ),
        "webp-lossless": webp_claiming(16_384, 16_384),
        "webp-canvas": webp_canvas_claiming(SIDE),
        "webp-canvas-largest": webp_canvas_claiming(2**16 - 1),
        "bmp": bmp(bytes(1000), 24, size=(SIDE, SIDE)),
        "bmp-top-down": bmp(bytes(1000), 24, size=(SIDE, -SIDE)),
        "bmp-rle8": bmp(rows, 8, RLE8, size=(10_000, 1001), palette=quads),
        "bmp-rle4-top-down": bmp(rows, 4, RLE4, size=(10_000, -1001), palette=quads),
        "tiff": tiff(tags([8], 1, size=(SIDE, SIDE)), bytes(1000)),
        "tiff-64-bit": tiff(tags([8], 1, size=(2**31, 2**31)), bytes(1000), big=True),
        "tiff-tile": one_tile(40_000),
        # Of two tags Pillow uses the last and libtiff the first.
        "tiff-tile-stated-twice": one_tile(40_000, (322, LONG, [16]), (323, LONG, [16])),
        "avif": avif_claiming(12_000, 12_000),
    }
    return [bad(f"bomb-{name}", data, "too-large") for name, data in claims.items()]


def items() -> list[Item]:
    found = [
        good(
            f"{width}x{height}-{kind}",
            encode(Image.new("RGB", (width, height), RED), kind),
            size=(width, height),
            colours=(RED,) * 4,
            tolerance=12,
        )
        for kind in KINDS
        for width, height in SHAPES
    ]
    noisy = noise(1, (10_000, 2))
    found += [
        good("10000x2-noise", encode_best(noisy, "PNG"), size=(10_000, 2), colours=()),
        bad("avif-60000x60000", avif_claiming(SIDE, SIDE), "too-large"),
        good("tiff-tile-larger-than-the-picture", one_tile(256), colours=greys(0, 0, 0, 0)),
        *decompression_bombs(),
    ]
    return found
