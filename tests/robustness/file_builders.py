"""Build image files chunk by chunk, so that any part can be made wrong."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from tests.robustness.scene import SCENE, SIZE, Pixels

COLOURS = bytes(SCENE[[0, 0, -1, -1], [0, -1, 0, -1]])
"""The scene's four colours as a palette, RGB."""

# PNG

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


def chunk(kind: bytes, body: bytes = b"", crc: int | None = None) -> bytes:
    check = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def header(width: int, height: int, depth: int, colour: int, interlace: int = 0) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return chunk(b"IHDR", body)


def rows(samples: npt.NDArray[np.generic], depth: int) -> bytes:
    """Pack samples [height, width] or [height, width, channels]; each row starts with filter 0."""
    lines = samples.reshape(len(samples), -1)
    if depth == 16:
        return b"".join(b"\0" + line.astype(">u2").tobytes() for line in lines)
    bits = (lines.astype(np.uint8)[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    packed = np.packbits(bits.reshape(len(lines), -1), axis=1)
    return b"".join(b"\0" + line.tobytes() for line in packed)


def png(
    samples: npt.NDArray[np.generic],
    depth: int,
    colour: int,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A complete PNG with additional chunks `before` and `after` IDAT."""
    body = chunk(b"IDAT", zlib.compress(rows(samples, depth)))
    head = header(samples.shape[1], samples.shape[0], depth, colour)
    return PNG_MAGIC + head + before + body + after + chunk(b"IEND")


PLTE = chunk(b"PLTE", COLOURS)


# JPEG and RIFF


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, len(body) + 2) + body


def into_jpeg(data: bytes, *segments: bytes) -> bytes:
    """Insert segments after SOI."""
    return data[:2] + b"".join(segments) + data[2:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


# GIF


def sub_blocks(data: bytes) -> bytes:
    parts = [data[at : at + 255] for at in range(0, len(data), 255)]
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def gif_frame(
    indices: Pixels,
    palette: bytes = b"",
    *,
    at: tuple[int, int] = (0, 0),
    control: bytes = b"",
    flags: int = 0,
    claims: tuple[int, int] | None = None,
) -> bytes:
    """An image block with an optional local palette of 4 colours and a preceding control block.

    LZW codes are 8 bits wide and the table is cleared before they grow, so that each is a byte.
    """
    width, height = claims or (indices.shape[1], indices.shape[0])
    own = 0x80 | 1 if palette else 0
    plain = indices.tobytes()
    codes = b"".join(b"\x80" + plain[i : i + 126] for i in range(0, len(plain), 126)) + b"\x81"
    descriptor = struct.pack("<HHHHB", *at, width, height, flags | own)
    return control + b"," + descriptor + palette + b"\7" + sub_blocks(codes)


def gif(
    *blocks: bytes,
    palette: bytes = b"",
    size: tuple[int, int] = SIZE,
    version: bytes = b"89a",
    end: bytes = b";",
) -> bytes:
    screen = struct.pack("<HHBBB", *size, 0x80 | 1 if palette else 0, 0, 0)
    return b"GIF" + version + screen + palette + b"".join(blocks) + end


def gif_control(disposal: int = 0, transparent: int | None = None) -> bytes:
    flags = disposal << 2 | (transparent is not None)
    return b"!\xf9\4" + struct.pack("<BHB", flags, 10, transparent or 0) + b"\0"


# TIFF

SHORT, LONG, LONG8 = 3, 4, 16
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 11: 4, 16: 8}
Tag = tuple[int, int, list[int]]


def tiff(
    tags: list[Tag], *strips: bytes, order: str = "<", big: bool = False, tiled: bool = False
) -> bytes:
    """A TIFF with its directory after the data. tags: (number, type, values), without offsets."""
    word, head = (LONG8, 16) if big else (LONG, 8)
    offsets, data = [], b""
    for strip in strips:
        offsets.append(head + len(data))
        data += strip + b"\0" * (len(strip) % 2)
    offsets_tag, length = (324, 325) if tiled else (273, 279)
    entries = sorted(
        [*tags, (offsets_tag, word, offsets), (length, word, [len(strip) for strip in strips])]
    )
    pointer = "Q" if big else "I"
    entry_size, start = (20, head + len(data)) if big else (12, head + len(data))
    overflow_start = start + (8 if big else 2) + entry_size * len(entries) + (8 if big else 4)
    inline = 8 if big else 4
    directory, overflow = b"", b""
    for number, kind, values in entries:
        letter = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 7: "B", 11: "f", 16: "Q"}[kind]
        raw = struct.pack(f"{order}{len(values)}{letter}", *values)
        count = len(raw) // _BYTES[kind]
        if len(raw) > inline:
            raw, overflow = (
                struct.pack(order + pointer, overflow_start + len(overflow)),
                overflow + raw,
            )
        directory += struct.pack(f"{order}HH{pointer}", number, kind, count) + raw.ljust(
            inline, b"\0"
        )
    byte_order = {"<": b"II", ">": b"MM"}[order]
    if big:
        first = byte_order + struct.pack(order + "HHHQ", 43, 8, 0, start)
        count = struct.pack(order + "Q", len(entries))
    else:
        first = byte_order + struct.pack(order + "HI", 42, start)
        count = struct.pack(order + "H", len(entries))
    return first + data + count + directory + bytes(inline) + overflow


def tags(
    bits: list[int], photometric: int, *more: Tag, size: tuple[int, int] = SIZE, rows: int = 0
) -> list[Tag]:
    """The required tags of an uncompressed TIFF, and `more`."""
    return [
        (256, LONG, [size[0]]),
        (257, LONG, [size[1]]),
        (258, SHORT, bits),
        (259, SHORT, [1]),
        (262, SHORT, [photometric]),
        (277, SHORT, [len(bits)]),
        (278, LONG, [rows or size[1]]),
        *more,
    ]
