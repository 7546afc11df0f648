"""JPEG: coding modes, segments, frame headers, scans."""

from __future__ import annotations

import struct

from PIL import Image

from tests.robustness.file_builders import into_jpeg, segment
from tests.robustness.scene import (
    QUARTERS,
    Item,
    bad,
    encode,
    encode_best,
    good,
    greys,
    scene,
)

PLAIN = encode_best(scene(), "JPEG")
GREYS = scene().convert("L")
SHADES = greys(*(int(GREYS.getpixel(place)) for place in ((0, 0), (63, 0), (0, 31), (63, 31))))  # type: ignore[arg-type]

# Four arithmetic-coded blocks (SOF9), which Pillow cannot write.
ARITHMETIC = (
    b"\xff\xd8"
    + segment(0xDB, b"\0" + bytes([16] * 64))
    + segment(0xC9, struct.pack(">BHHBBBB", 8, 16, 16, 1, 1, 0x11, 0))
    + segment(0xDA, b"\1\1\0\0\x3f\0")
    + bytes.fromhex("d28104713db2")
    + b"\xff\xd9"
)


def with_stated_size(width: int, height: int, data: bytes = PLAIN) -> bytes:
    """Change the size in the frame header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def without_segments(marker: int, data: bytes = PLAIN) -> bytes:
    """Remove all segments with a marker."""
    head, at = data[:2], 2
    while data[at + 1] != 0xDA:
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        head += b"" if data[at + 1] == marker else data[at : at + length]
        at += length
    return head + data[at:]


def scan_start(data: bytes = PLAIN) -> int:
    """Offset of the first entropy-coded byte."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def with_precision(bits: int) -> bytes:
    at = PLAIN.index(b"\xff\xc0") + 4
    return PLAIN[:at] + bytes([bits]) + PLAIN[at + 1 :]


def mpo() -> bytes:
    """A multi-picture file, as of a stereo camera: two JPEGs and an index."""
    return encode(
        scene(),
        "MPO",
        save_all=True,
        append_images=[scene().rotate(180)],
        quality=95,
        subsampling=0,
    )


def items() -> list[Item]:
    many = b"".join(segment(0xE4, bytes(65_000)) for _ in range(20))
    index = mpo().index(b"MPF\0")
    broken_index = mpo()[: index + 4] + b"\xff" * 40 + mpo()[index + 44 :]
    data = {
        "baseline": PLAIN,
        "progressive": encode_best(scene(), "JPEG", progressive=True),
        "optimised": encode_best(scene(), "JPEG", optimize=True),
        "restarts": encode_best(scene(), "JPEG", restart_marker_blocks=1),
        "restarts-by-row": encode_best(scene(), "JPEG", restart_marker_rows=1),
        "subsampling-422": encode(scene(), "JPEG", quality=95, subsampling="4:2:2"),
        "subsampling-420": encode(scene(), "JPEG", quality=95, subsampling="4:2:0"),
        "subsampling-411": encode(scene(), "JPEG", quality=95, subsampling="4:1:1"),
        "trailing-garbage": PLAIN + b"\0\1\2 rubbish \xff\xd8\xff" * 50,
        "two-jpegs": PLAIN + encode_best(scene().rotate(180), "JPEG"),
        "megabyte-of-segments": into_jpeg(PLAIN, many),
        "every-app-segment": into_jpeg(PLAIN, *(segment(0xE0 + n, b"?" * n) for n in range(16))),
        "comment": into_jpeg(PLAIN, segment(0xFE, b"\0\xff\xd9 a comment \xff\xda")),
        "fill-bytes": PLAIN[:2] + b"\xff" * 100 + PLAIN[2:],
        "garbage-between-segments": PLAIN[:20] + b"\0\1\2\3" + PLAIN[20:],
        "photo-in-a-segment": into_jpeg(
            PLAIN, segment(0xE5, encode_best(scene().rotate(180), "JPEG"))
        ),
        "without-jfif": without_segments(0xE0),
        "without-huffman-tables": without_segments(0xC4),
        "zip-behind": PLAIN + b"PK\3\4" + bytes(26) + b"PK\5\6" + bytes(18),
        "script-in-a-comment": into_jpeg(PLAIN, segment(0xFE, b"*/=alert(1);/*")),
        "broken-mpf-index": broken_index,
    }
    found = [good(f"jpeg-{name}", value, tolerance=10) for name, value in data.items()]
    found += [
        good("jpeg-grey", encode_best(GREYS, "JPEG"), colours=SHADES),
        good("jpeg-grey-progressive", encode_best(GREYS, "JPEG", progressive=True), colours=SHADES),
        good("jpeg-arithmetic", ARITHMETIC, size=(16, 16), colours=greys(254, 0, 64, 192)),
        good("jpeg-mpo-two-frames", mpo(), "first-frame", tolerance=10),
        good(
            "jpeg-quality-1",
            encode(Image.new("L", (64, 32), 200), "JPEG", quality=1),
            colours=greys(200, 200, 200, 200),
            tolerance=20,
        ),
        good(
            "jpeg-smaller-than-its-data",
            with_stated_size(64, 16),
            size=(64, 16),
            colours=QUARTERS[:2] * 2,
            tolerance=10,
        ),
        # libjpeg fills missing data before EOI with grey, without an error.
        good(
            "jpeg-larger-than-its-data",
            with_stated_size(64, 64),
            size=(64, 64),
            colours=(*QUARTERS[2:], *greys(128, 128)),
            tolerance=10,
        ),
        bad("jpeg-leading-garbage", b"\0" + PLAIN, "not-an-image"),
        bad("jpeg-leading-line-break", b"\r\n" + PLAIN, "not-an-image"),
        bad("jpeg-zero-height", with_stated_size(64, 0)),
        bad("jpeg-zero-width", with_stated_size(0, 32)),
        bad("jpeg-12-bit", with_precision(12)),
        bad("jpeg-lossless-differential", PLAIN.replace(b"\xff\xc0", b"\xff\xc7", 1)),
        bad("jpeg-without-a-frame", without_segments(0xC0)),
        bad("jpeg-without-quantisation", without_segments(0xDB)),
        bad("jpeg-without-a-scan", PLAIN[: PLAIN.index(b"\xff\xda")]),
        bad("jpeg-empty-scan", PLAIN[: scan_start()]),
        bad(
            "jpeg-five-colours",
            PLAIN.replace(b"\x08\x00\x20\x00\x40\x03", b"\x08\x00\x20\x00\x40\x05", 1),
        ),
        bad("jpeg-arithmetic-cut-short", ARITHMETIC[:-6]),
        bad("jpeg-start-only", b"\xff\xd8\xff"),
        bad("jpeg-start-and-end", b"\xff\xd8\xff\xd9"),
        bad("jpeg-endless-segment", PLAIN[:2] + b"\xff\xe1\xff\xff" + PLAIN[2:]),
        bad(
            "jpeg-thousands-of-segments",
            into_jpeg(PLAIN, segment(0xE1, b"Exif\0\0" + bytes(9)) * 2000),
        ),
        bad("jpeg-hundreds-of-scans", many_scans()),
    ]
    return found


def many_scans() -> bytes:
    """A progressive JPEG that repeats its last scan 200 times."""
    data = encode(GREYS, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 200 + data[-2:]
