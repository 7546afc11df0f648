"""WebP and AVIF: lossless, lossy, animated, broken chunks."""

from __future__ import annotations

import struct

from PIL import Image

from tests.robustness.file_builders import riff
from tests.robustness.scene import (
    SIZE,
    WHITE,
    Item,
    bad,
    encode,
    encode_best,
    good,
    scene,
)

FIRST = "first-frame"


def items() -> list[Item]:
    return [*webps(), *avifs()]


def webps() -> list[Item]:
    lossless, lossy = encode_best(scene(), "WEBP"), encode(scene(), "WEBP", quality=95)
    moving = encode(
        scene(), "WEBP", save_all=True, append_images=[scene().rotate(180)], lossless=True
    )
    clear = encode(
        Image.new("RGBA", SIZE),
        "WEBP",
        save_all=True,
        append_images=[scene().convert("RGBA")],
        lossless=True,
    )
    picture = lossless[20:]
    return [
        good("webp-lossless", lossless),
        good("webp-lossy", lossy, tolerance=16),
        good("webp-animated", moving, FIRST),
        good(
            "webp-animated-transparent", clear, FIRST, "alpha-on-background", colours=(WHITE,) * 4
        ),
        good("webp-trailing-garbage", lossless + bytes(100)),
        good("webp-unknown-chunk", extended(lossless, (b"what", b"?" * 9))),
        good("webp-broken-exif", extended(lossless, (b"EXIF", b"?"), flags=8)),
        bad(
            "webp-without-a-picture", riff((b"VP8X", struct.pack("<B3x", 0) + b"\x3f\0\0\x1f\0\0"))
        ),
        bad("webp-header-only", lossless[:12]),
        bad("webp-of-unknown-kind", lossless.replace(b"VP8L", b"VP9L", 1)),
        bad("webp-canvas-of-another-size", extended(lossless, size=(65, 32))),
        bad("webp-picture-of-zeros", riff((b"VP8L", picture[:5] + bytes(len(picture) - 5)))),
        bad(
            "riff-wave",
            b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(28),
            "not-an-image",
        ),
    ]


def extended(
    data: bytes, *more: tuple[bytes, bytes], flags: int = 0, size: tuple[int, int] = SIZE
) -> bytes:
    """A simple WebP with an extended header (VP8X)."""
    canvas = (size[0] - 1).to_bytes(3, "little") + (size[1] - 1).to_bytes(3, "little")
    length = struct.unpack_from("<I", data, 16)[0]
    picture = (data[12:16], data[20 : 20 + length])
    return riff((b"VP8X", struct.pack("<B3x", flags) + canvas), picture, *more)


def avifs() -> list[Item]:
    plain = encode_best(scene(), "AVIF")
    moving = encode(
        scene(),
        "AVIF",
        save_all=True,
        append_images=[scene().rotate(180)],
        quality=95,
        subsampling="4:4:4",
        speed=10,
    )
    return [
        good("avif", plain, tolerance=8),
        good("avif-animated", moving, FIRST, tolerance=8),
        good("avif-named-mif1", plain.replace(b"ftypavif", b"ftypmif1", 1), tolerance=8),
        good("avif-trailing-garbage", plain + bytes(100), tolerance=8),
        bad("avif-without-a-codec", plain.replace(b"av1C", b"free", 1)),
        bad("avif-header-only", plain[:32]),
        bad("avif-named-mif1-header-only", plain.replace(b"ftypavif", b"ftypmif1", 1)[:48]),
    ]
