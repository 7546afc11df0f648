"""PNG: chunks, checksums, interlacing, animation, bombs in compressed chunks."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from tests.robustness.file_builders import (
    GREY,
    PALETTE,
    PLTE,
    PNG_MAGIC,
    RGB,
    chunk,
    header,
    png,
    rows,
)
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
    scene,
)

FIRST, ALPHA = "first-frame", "alpha-on-background"
HEAD, END = header(*SIZE, 8, RGB), chunk(b"IEND")
PLAIN = zlib.compress(rows(SCENE, 8))
# First column and row of each pass, and the steps between its columns and rows.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def assemble(*body: bytes, head: bytes = HEAD) -> bytes:
    return PNG_MAGIC + head + b"".join(body) + END


def interlaced() -> bytes:
    passes = b"".join(rows(SCENE[y::down, x::right], 8) for x, y, right, down in ADAM7)
    return assemble(chunk(b"IDAT", zlib.compress(passes)), head=header(*SIZE, 8, RGB, 1))


def animated(*, default: bool = False, cut: bool = False) -> bytes:
    """An APNG of two frames; IDAT is the first one or, with `default`, not part of it."""
    turned = zlib.compress(rows(SCENE[::-1, ::-1], 8))

    def control(number: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, *SIZE, 0, 0, 1, 10, 0, 0))

    start = [] if default else [control(0)]
    frames = [
        control(n + len(start)) + chunk(b"fdAT", struct.pack(">I", n + 1 + len(start)) + turned)
        for n in (0, 2)[: 2 if default else 1]
    ]
    body = [chunk(b"acTL", struct.pack(">II", 2, 0)), *start, chunk(b"IDAT", PLAIN), *frames]
    data = assemble(*body)
    return data[: -len(turned)] if cut else data


def wrong_crc(kind: bytes, body: bytes) -> bytes:
    return chunk(kind, body, zlib.crc32(kind + body) ^ 1)


def with_flipped_bit() -> bytes:
    """Flip one bit of a pixel: the checksums of the deflate stream and the chunk are wrong."""
    stored = bytearray(zlib.compress(rows(SCENE, 8), 0))
    stored[1000] ^= 64
    body = bytes(stored)
    return assemble(chunk(b"IDAT", body, zlib.crc32(b"IDAT" + zlib.compress(rows(SCENE, 8), 0))))


def items() -> list[Item]:
    idat = chunk(b"IDAT", PLAIN)
    text = b"key\0" + b"a long story " * 100_000
    packed = b"key\0\0" + zlib.compress(bytes(6_000_000))
    bomb = b"key\0\0" + zlib.compress(bytes(20_000_000))
    narrow = header(64, 31, 8, RGB)
    broken_row = bytearray(rows(SCENE, 8))
    broken_row[193 * 5] = 9
    return [
        good("png", assemble(idat)),
        good("png-interlaced", interlaced()),
        good("png-interlaced-by-depth", png(INDICES, 2, PALETTE, PLTE)),
        good("png-stored", assemble(chunk(b"IDAT", zlib.compress(rows(SCENE, 8), 0)))),
        good("png-without-an-end", PNG_MAGIC + HEAD + idat),
        good("png-trailing-garbage", assemble(idat) + b"rubbish" * 100),
        good("png-padded-to-a-megabyte", assemble(idat).ljust(1_000_000, b"\0")),
        good("png-empty-idat", assemble(chunk(b"IDAT"), chunk(b"IDAT"), idat, chunk(b"IDAT"))),
        good(
            "png-idat-byte-by-byte",
            assemble(*(chunk(b"IDAT", PLAIN[i : i + 1]) for i in range(len(PLAIN)))),
        ),
        good("png-too-many-rows", assemble(idat, head=narrow), size=(64, 31)),
        good("png-idat-wrong-crc", assemble(wrong_crc(b"IDAT", PLAIN))),
        good("png-wrong-crc-behind", assemble(idat, wrong_crc(b"tEXt", b"a\0b"))),
        good("png-long-text", assemble(chunk(b"tEXt", text), idat)),
        good("png-compressed-text", assemble(chunk(b"zTXt", packed), idat)),
        good("png-compressed-text-behind", assemble(idat, chunk(b"zTXt", packed))),
        good("png-unknown-chunks", assemble(chunk(b"juNk", b"?"), idat, chunk(b"JUNK", b"?"))),
        good(
            "png-gamma-and-more",
            assemble(
                chunk(b"gAMA", struct.pack(">I", 45455)),
                chunk(b"sRGB", b"\0"),
                chunk(b"pHYs", struct.pack(">IIB", 0, 0, 1)),
                idat,
            ),
        ),
        good("png-palette-of-a-true-colour", assemble(PLTE, idat)),
        good("png-animated", animated(), FIRST),
        good("png-animated-default", animated(default=True), FIRST),
        good("png-animated-cut-short", animated(cut=True), FIRST),
        good(
            "png-animated-by-pillow",
            encode(scene(), "PNG", save_all=True, append_images=[scene().rotate(180)]),
            FIRST,
        ),
        good(
            "png-animated-transparent",
            encode(
                Image.new("RGBA", SIZE),
                "PNG",
                save_all=True,
                append_images=[scene().convert("RGBA")],
            ),
            FIRST,
            ALPHA,
            colours=(WHITE,) * 4,
        ),
        good(
            "png-index-out-of-the-palette",
            png(INDICES, 8, PALETTE, chunk(b"PLTE", PLTE[8:17])),
            colours=(*QUARTERS[:3], (0, 0, 0)),
        ),
        bad("png-wrong-crc-before", assemble(wrong_crc(b"tEXt", b"a\0b"), idat)),
        bad("png-header-wrong-crc", PNG_MAGIC + HEAD[:-1] + b"!" + idat + END),
        bad("png-flipped-bit", with_flipped_bit()),
        bad("png-compressed-text-bomb", assemble(chunk(b"zTXt", bomb), idat)),
        bad("png-profile-bomb", assemble(chunk(b"iCCP", bomb), idat)),
        # Pillow does not check the number of rows.
        good("png-too-few-rows", assemble(idat, head=header(64, 33, 8, RGB)), size=(64, 33)),
        bad("png-wider-than-its-rows", assemble(idat, head=header(80, 32, 8, RGB))),
        bad("png-zero-size", assemble(idat, head=header(0, 0, 8, RGB))),
        bad("png-zero-height", assemble(idat, head=header(64, 0, 8, RGB))),
        bad("png-depth-3", assemble(idat, head=header(*SIZE, 3, RGB))),
        bad("png-colour-7", assemble(idat, head=header(*SIZE, 8, 7))),
        bad("png-filter-9", assemble(chunk(b"IDAT", zlib.compress(bytes(broken_row))))),
        bad("png-without-idat", assemble()),
        bad("png-only-empty-idat", assemble(chunk(b"IDAT"))),
        bad("png-idat-not-deflated", assemble(chunk(b"IDAT", rows(SCENE, 8)))),
        bad("png-short-header", PNG_MAGIC + chunk(b"IHDR", HEAD[8:18]) + idat + END),
        bad("png-header-behind", PNG_MAGIC + idat + HEAD + END),
        bad("png-endless-chunk", PNG_MAGIC + HEAD + struct.pack(">I4s", 2**31 - 1, b"tEXt") + idat),
        bad("png-magic-only", PNG_MAGIC),
        bad(
            "png-iphone-cgbi",
            PNG_MAGIC
            + chunk(b"CgBI", b"\x50\0\x20\x02")
            + HEAD
            + chunk(b"IDAT", PLAIN[2:-4])
            + END,
        ),
        bad(
            "png-after-text-mode-transfer",
            (PNG_MAGIC + HEAD + idat + END).replace(b"\r\n", b"\n"),
            "not-an-image",
        ),
        bad("png-without-a-palette", png(INDICES, 8, PALETTE)),
        good(
            "png-grey-palette-ignored",
            png(INDICES, 8, GREY, PLTE),
            colours=tuple((v, v, v) for v in range(4)),
        ),
    ]
