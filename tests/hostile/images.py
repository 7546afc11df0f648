"""Builders of pictures that are cheap to send and expensive to decode."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

from tests.robustness import file_builders, plugin_formats
from tests.robustness.file_builders import chunk

Builder = Callable[[int, int], bytes]
"""Function of width and height in pixels."""


def progressive_jpeg(width: int, height: int, scans: int = 1, exif: bool = False) -> bytes:
    """A progressive JPEG of empty scans: some hundred bytes for any size."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", progressive=True, subsampling=0)
    data = file.getvalue()
    frame = data.index(b"\xff\xc2")
    data = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    data = data[:second] + data[first:second] * (scans - 1) + b"\xff\xd9"
    if exif:
        turned = Image.Exif()
        turned[0x0112] = 6
        data = file_builders.into_jpeg(data, file_builders.segment(0xE1, turned.tobytes()))
    return data


def arithmetic_jpeg(width: int, height: int, marker: int = 0xC9) -> bytes:
    """A grey JPEG in arithmetic code of no bytes: every pixel costs, and none is sent.

    Args:
        width, height: Size in pixels.
        marker: 0xC9 for sequential, 0xCA for progressive.
    """
    table = file_builders.segment(0xDB, b"\0" + b"\1" * 64)
    frame = file_builders.segment(marker, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
    last = 63 if marker == 0xC9 else 0
    scan = file_builders.segment(0xDA, bytes([1, 1, 0, 0, last, 0]))
    return b"\xff\xd8" + table + frame + scan + bytes(64) + b"\xff\xd9"


def jpeg_of_segments(count: int) -> bytes:
    """A small progressive JPEG with empty segments behind a scan, and a comment like 101 scans."""
    data = progressive_jpeg(64, 64)
    comment = file_builders.segment(0xFE, b"\xff\xda" * 101)
    return data[:-2] + comment + b"\xff\xe0\0\2" * count + b"\xff\xd9"


def png_of(packed: bytes, width: int, height: int, piece: int = 2**20) -> bytes:
    """A PNG in RGB of compressed data, in chunks of `piece` bytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pieces = (packed[at : at + piece] for at in range(0, len(packed), piece))
    chunks = (chunk(b"IHDR", head), *(chunk(b"IDAT", one) for one in pieces), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png(
    width: int, height: int, depth: int = 8, colour: int = 2, extra: bytes = b"", interlace: int = 0
) -> bytes:
    """A black PNG; `extra` are chunks before the pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" + bytes((width * channels * depth + 7) // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + extra
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


def saved(mode: str, kind: str, **options: object) -> Builder:
    """A builder of pictures of one colour, as Pillow saves them."""

    def build(width: int, height: int) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (width, height)).save(file, kind, **options)
        return file.getvalue()

    return build


def profile_of_shared_elements(count: int, element: bytes | None = None) -> bytes:
    """An ICC profile whose tag D2B0 lists `count` stages at the place of one element."""
    if element is None:
        identity = struct.pack(">12f", 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
        element = b"matf\0\0\0\0" + struct.pack(">HH", 3, 3) + identity
    head = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, count)
    tag = head + struct.pack(">II", len(head) + 8 * count, len(element)) * count + element
    return profile_with({b"D2B0": tag})


def profile_with(tags: dict[bytes, bytes], space: bytes = b"RGB ") -> bytes:
    """An ICC profile of version 4 with the given tags."""
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        tag += b"\0" * (-len(tag) % 4)
        table += name + struct.pack(">II", at + len(body), len(tag))
        body += tag
    head = struct.pack(">I4sI", at + len(body), b"lcms", 0x04300000) + b"scnr" + space + b"XYZ "
    head += bytes(12) + b"acsp" + b"APPL" + bytes(24) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + table + body


def png_with_profile(profile: bytes) -> bytes:
    """A small PNG with a colour profile."""
    return png(64, 64, extra=chunk(b"iCCP", b"x\0\0" + zlib.compress(profile, 9)))


def fax_tiff(width: int, height: int, bits: bytes, compression: int = 4) -> bytes:
    """A TIFF of one strip in fax code; libtiff writes a line to stderr for each broken row."""
    entries = {256: width, 257: height, 258: 1, 259: compression, 262: 0, 277: 1, 278: height}
    entries |= {273: 8, 279: len(bits)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    head = struct.pack("<2sHI", b"II", 42, 8 + len(bits))
    return head + bits + struct.pack("<H", len(entries)) + table + bytes(4)


def noisy_tiff(compression: int = 4) -> bytes:
    """A TIFF of 350 KB, of which libtiff writes tens of megabytes to stderr."""
    return fax_tiff(16, 400_000, bytes(int("0000001" * 8, 2).to_bytes(7)) * 50_000, compression)


WORST: dict[str, Builder] = {
    "jpeg-progressive": progressive_jpeg,
    "jpeg-progressive-turned": lambda w, h: progressive_jpeg(w, h, exif=True),
    "jpeg-99-scans": lambda w, h: progressive_jpeg(w, h, scans=94),
    "jpeg-cmyk": saved("CMYK", "JPEG", progressive=True),
    "png-rgb": png,
    "png-rgba-16-bit": lambda w, h: png(w, h, 16, 6),
    "png-grey-16-bit-key": lambda w, h: png(w, h, 16, 0, chunk(b"tRNS", b"\0\1")),
    "png-grey-alpha": lambda w, h: png(w, h, 8, 4),
    "png-palette-alpha": lambda w, h: png(
        w, h, 8, 3, chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", b"\0")
    ),
    "webp-lossless": saved("RGB", "WEBP", lossless=True),
    "webp-alpha": saved("RGBA", "WEBP", method=0),
    "gif": saved("P", "GIF"),
    "bmp-grey": saved("L", "BMP"),
    "tiff-float": saved("F", "TIFF", compression="tiff_deflate"),
    "tiff-one-strip": saved("RGBA", "TIFF", compression="tiff_deflate", strip_size=2**30),
    "avif": saved("RGB", "AVIF", speed=10),
    **(
        {"heic-alpha": lambda w, h: plugin_formats.heic(Image.new("RGBA", (w, h)), quality=10)}
        if plugin_formats.HAS_HEIF
        else {}
    ),
    **(
        {"jxl-alpha": lambda w, h: plugin_formats.jpeg_xl(Image.new("RGBA", (w, h)), effort=1)}
        if plugin_formats.HAS_JXL
        else {}
    ),
}
"""For each format the pictures that need most for their number of pixels."""
