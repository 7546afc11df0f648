"""Estimate from the head of an image file what decoding the file costs, in bytes and seconds.

The factors are upper bounds of what Pillow 13 was measured to need for each format, and include all
conversions of `serving.imaging.decode`. A test compares them with the peak memory of real files.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from serving.imaging.formats import optional_format
from serving.imaging.heads import jpeg, plugins
from serving.imaging.heads.head import LARGE_EXIF, Head
from serving.imaging.heads.tiff import (
    OFFSETS,
    metadata,
    strips_share_bytes,
    tiff_entries,
    variants,
)
from serving.imaging.limits import gif_blocks, png_chunks
from serving.imaging.preprocess import STRIP, Preprocess, dct_scale

IN_PROCESS_BYTES: Final = 2**27
IN_PROCESS_SECONDS: Final = 0.5
"""Largest cost of an image that is decoded in the process that needs it. A photo of 12 megapixels
is below both. Other images are decoded in a process of their own, which can be stopped."""

MAX_BYTES_PER_PIXEL: Final = 24
"""Largest peak memory of a format that may not state its size, in bytes per pixel: WebP, AVIF."""

# Bytes per pixel of an image in Pillow: RGB, RGBA, LA and CMYK have four.
_RGB: Final = 4.0
_ROTATED: Final = 2 * _RGB
# Peak of the conversions of alpha, colour keys, profiles and samples of more than 8 bits.
_CONVERTED: Final = 14.5
# Samples of more than 8 bits, scaled to 8, and their alpha.
_DEEP: Final = 2.0
# Bytes per pixel of a side of the weights that a resize keeps: two float64 for each pixel within
# the filter's radius.
_WEIGHTS: Final = {"bilinear": 16, "bicubic": 32, "lanczos": 48}
# Share that is left of the time of a JPEG's cosine transform where it is a half, a quarter or an
# eighth as large. Measured: 0.6, 0.45 and 0.37. What is read of the file stays.
_SCALED_SHARES: Final = {1: 1.0, 2: 0.65, 4: 0.45, 8: 0.4}
# Bytes per encoded byte: the buffer of the file, and Pillow's copies of its metadata.
_COPIES: Final = 2
# Bytes per pixel of the float64 samples of a strip, and of the largest strip.
_STRIP_SAMPLE: Final = 16
_STRIP_BYTES: Final = 2**24
# Decompressed metadata of a PNG: at most 1032 bytes per byte, 4 bytes per character, and Pillow's
# own limit of 64 million characters.
_INFLATED: Final = 1032
_CHARACTER: Final = 4
# Seconds per encoded byte of Deflate, beside those of any byte: a block may have tables of codes
# and no data. Real photos take a quarter of that.
_INFLATE_SECONDS: Final = 30e-9
_METADATA_BYTES: Final = 320 * 2**20
_TEXTS: Final = (b"tEXt", b"zTXt", b"iTXt")

# Values of a TIFF's tags above which a file is unusual.
_MANY_VALUES: Final = 4096

# Compressions of a TIFF that are decoded in this process: none, LZW, Deflate (two numbers) and
# PackBits. libtiff's other decoders go on after errors, of which each is a line on stderr (fax), or
# decode streams whose own heads state what they cost (JPEG, LZMA, Zstandard, WebP and others).
_COMPRESSION: Final = 259
_COMMON_COMPRESSIONS: Final = frozenset({1, 5, 8, 32946, 32773})
_DEFLATE: Final = frozenset({8, 32946})
_JPEGS: Final = frozenset({6, 7})
# Bytes of the dictionary of LZMA, and of the window of Zstandard, as encoders write them.
_DICTIONARIES: Final = {34925: 2**26 + 2**24, 50000: 2**27}

# Blocks of a GIF's extensions, such as comments, of each of which Pillow keeps an object.
_GIF_BLOCKS: Final = 4096

# Bytes of a chunk of a WebP, beside its own eight, for each byte.
_CHUNK_COPIES: Final = 4
# Bytes of the code tables of a lossless WebP as encoders write them.
_CODE_TABLES: Final = 2**25


@dataclass(frozen=True)
class Cost:
    """Upper bounds of what decoding an image costs.

    Attributes:
        width, height: Size in pixels; 0 if it can't be read from the head of the file.
        bytes: Peak memory in bytes, in addition to the encoded file.
        seconds: CPU time in seconds on a slow core; a rough bound.
        unusual: Whether the file may need more than its head states.
    """

    width: int = 0
    height: int = 0
    bytes: int = 0
    seconds: float = 0.0
    unusual: bool = False

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def isolated(self) -> bool:
        """Whether the image must be decoded in a process of its own."""
        expensive = self.bytes > IN_PROCESS_BYTES or self.seconds > IN_PROCESS_SECONDS
        return expensive or self.unusual


def estimate(data: bytes, views: int = 1, preprocess: Preprocess | None = None) -> Cost:
    """Estimate the cost of decoding an image and cutting its TTA views (crops, possibly mirrored).

    Nothing is decoded. A typical JPEG takes some 10 microseconds. Data that begins like no
    supported format costs nothing, because Pillow refuses it at once. A file of a supported format
    whose size can't be read is unusual.

    Args:
        data: The encoded file.
        views: Number of views that are cut from the decoded image.
        preprocess: Preprocessing, which may decode the image at a reduced size; None: as it is.
    """
    read = next((read for magic, read in _READERS.items() if data.startswith(magic)), None)
    if read is None and data[4:8] == b"ftyp":
        read = _heic if optional_format(data) else _avif
    if read is None:
        return Cost()
    head = read(data)
    if head is None or head.width <= 0 or head.height <= 0:
        return Cost(unusual=True)
    width, height = head.width, head.height
    reduction = preprocess.reduction(width, height) if preprocess else 1
    scale = dct_scale(reduction) if head.scalable else 1
    rest = 1 if head.whole else reduction // scale
    pixels = width * height
    decoded = -(-width // scale) * -(-height // scale)
    wide, tall = -(-width // (scale * rest)), -(-height // (scale * rest))
    reduced = wide * tall
    conversion = _CONVERTED if head.converted else _RGB + head.pixel
    if rest == 1:  # the conversions are made on the whole decoded image
        peak = decoded * max(conversion, _ROTATED if head.rotated else 0)
    else:
        strip = min(decoded, max(STRIP, reduction * width))
        peak = decoded * (_RGB + _DEEP * head.converted) + strip * conversion + reduced * _ROTATED
    if scale == 1:
        peak = max(peak, pixels * head.decoder + decoded * _RGB)
    else:
        peak += pixels * head.decoder
    resized = 0
    if preprocess:
        resized = _resized_pixels(preprocess, wide, tall)
        peak = max(peak, _RGB * (reduced + resized) + _view_bytes(preprocess, wide + tall, views))
    nanoseconds = head.nanoseconds - jpeg.TRANSFORM * (1 - _SCALED_SHARES[scale])
    seconds = (
        pixels * nanoseconds * 1e-9
        + decoded * (30 * head.converted + (rest > 1)) * 1e-9
        + (reduced * (5 * head.rotated + 4 * views) + resized * 4 * views) * 1e-9
        + len(data) * 20e-9
        + head.opening
    )
    strips = min(_STRIP_SAMPLE * decoded, _STRIP_BYTES) if head.converted else 0
    size = int(peak + strips) + _COPIES * len(data) + head.metadata
    return Cost(head.width, head.height, size, seconds, head.unusual)


def _resized_pixels(preprocess: Preprocess, width: int, height: int) -> int:
    """Return the pixels of a picture that is resized horizontally, and not yet vertically."""
    if preprocess.fit == "squish":
        return preprocess.size * height
    return max(preprocess.size * min(width, height), height if preprocess.fit == "pad" else 0)


def _view_bytes(preprocess: Preprocess, sides: int, views: int) -> int:
    """Return the bytes of the views, of their two copies, and of the filter's weights.

    Args:
        preprocess: Preprocessing.
        sides: Width plus height of the image in pixels.
        views: Number of views.
    """
    square = preprocess.size**2
    weights = _WEIGHTS[preprocess.interpolation] * sides + 48 * preprocess.size
    return square * (9 * views + 2 * int(_RGB)) + weights


def _png(data: bytes) -> Head | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    converted = colour & 4 != 0 or depth == 16
    rotated, metadata, inflated, heads, exif, chunks = False, 0, 0, 0, 0, 0
    for kind, at, size in png_chunks(data):
        chunks += 1
        heads += kind == b"IHDR"
        converted |= kind in (b"tRNS", b"iCCP")
        rotated |= kind in _TEXTS or kind == b"eXIf"  # a text may be EXIF
        exif += size * (kind == b"eXIf")
        if kind == b"iCCP":
            inflated += _INFLATED * size
            metadata += _INFLATED * size
        elif kind in _TEXTS:
            length = size * (_INFLATED if _is_packed(kind, data, at, size) else 1)
            inflated += length
            metadata += _CHARACTER * length
    channels = {0: 1, 2: 3, 4: 2, 6: 4}.get(colour, 1)
    nanoseconds = 10.0 + 7.0 * channels * max(1, depth // 8)
    return Head(
        width,
        height,
        converted=converted,
        rotated=rotated,
        nanoseconds=nanoseconds,
        metadata=min(metadata, _METADATA_BYTES),
        unusual=heads > 1 or exif > LARGE_EXIF,
        opening=inflated * 2e-9 + chunks * 5e-6 + len(data) * _INFLATE_SECONDS,
    )


def _is_packed(kind: bytes, data: bytes, at: int, size: int) -> bool:
    """Return whether the text of a PNG is compressed; of an iTXt, a byte after its name says so."""
    if kind == b"iTXt":
        end = data.find(b"\0", at, at + min(size, 80))
        return end < 0 or data[end + 1 : end + 2] != b"\0"
    return kind == b"zTXt"


def _webp(data: bytes) -> Head | None:
    kind, body = data[12:16], data[20:32]
    if data[8:12] != b"WEBP" or len(body) < 10:
        return None
    if kind == b"VP8X":
        width = 1 + int.from_bytes(body[4:7], "little")
        height = 1 + int.from_bytes(body[7:10], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width = int.from_bytes(body[6:8], "little") & 0x3FFF
        height = int.from_bytes(body[8:10], "little") & 0x3FFF
    else:
        return None
    # A lossless image, such as the transparency of a lossy one, may have any number of code tables.
    lossless = b"VP8L" in data or b"ALPH" in data or b"ANMF" in data
    # Two canvases of RGBA, the decoder's own buffers, and copies of the frame.
    tables = _CODE_TABLES * lossless + _CHUNK_COPIES * len(data) * (kind == b"VP8X")
    return Head(width, height, 18.5, False, True, 60.0, tables, lossless)


def _gif(data: bytes) -> Head | None:
    if len(data) < 10:
        return None
    width, height = struct.unpack_from("<HH", data, 6)
    # A block of one byte of pixels takes two bytes of the file.
    opening = len(data) * 80e-9
    unusual = gif_blocks(data, _GIF_BLOCKS) >= _GIF_BLOCKS
    return Head(width, height, 0.0, True, False, 15.0, opening=opening, unusual=unusual, whole=True)


def _bmp(data: bytes) -> Head | None:
    try:
        size, width, height = struct.unpack_from("<Iii", data, 14)
        if size == 12:
            width, height = struct.unpack_from("<HH", data, 18)
            code = 0
        else:
            (code,) = struct.unpack_from("<I", data, 30)
    except struct.error:
        return None
    # Pillow decodes run-length code in Python.
    packed = code in (1, 2)
    alpha = size > 40 or code in (3, 6)
    return Head(width, abs(height), 0.0, alpha, False, 500.0 if packed else 12.0, 0, packed)


def _tiff(data: bytes) -> Head | None:
    size: dict[int, int] = {}
    compressions: set[int] = set()
    strips = 0
    unusual = False
    # As in `limits`: Pillow and libtiff may disagree about the kind of file, and about entries that
    # are repeated. The largest value counts.
    for big in variants(data):
        for entry in tiff_entries(data, big):
            tag, value = entry.tag, entry.value
            if tag in OFFSETS:
                strips = max(strips, entry.number)
            if entry.number != 1:
                value = 64 if tag == 258 else 0  # bits of several samples are stored elsewhere
            size[tag] = max(size.get(tag, 0), value)
            if tag == _COMPRESSION:
                compressions.add(value)
        tags = metadata(data, big)
        unusual |= tags.values > _MANY_VALUES or tags.size > len(data)
        unusual |= not compressions <= {1} and strips_share_bytes(data, big)
    width, height = size.get(256, 0), size.get(257, 0)
    samples = min(size.get(277, 1), 64)
    depth = min(max(size.get(258, 8), 8), 64) if samples == 1 else 16
    raw = depth / 8 * samples
    # One strip or tile may have all rows, and be larger than the image.
    wide, tall = size.get(322, 0), size.get(323, 0)
    pixels = max(1, width * height)
    outside = -(-width // wide) * wide * -(-height // tall) * tall - pixels if wide * tall else 0
    # libjpeg may keep the coefficients of a tile, 2 bytes for each sample.
    decoder = raw * max(1.0, wide * tall / pixels) * (3 if compressions & _JPEGS else 1)
    return Head(
        width,
        height,
        decoder,
        converted=True,
        rotated=True,
        nanoseconds=15.0 + 5.0 * raw,
        metadata=400 * strips + max(_DICTIONARIES.get(one, 0) for one in compressions or {1}),
        unusual=unusual or not compressions <= _COMMON_COMPRESSIONS,
        whole=True,  # Pillow turns it
        opening=strips * 6e-6
        + outside * raw * 12e-9
        + len(data) * (_INFLATE_SECONDS if compressions & _DEFLATE else 0.0),
    )


def _avif(data: bytes) -> Head | None:
    # The coded frames may be larger than the items state, so that only the memory limit of a
    # process is a bound.
    head = plugins.heif(data)
    return head and Head(head.width, head.height, 20.0, False, True, 90.0, 0, True)


def _heic(data: bytes) -> Head | None:
    head = plugins.heif(data)
    return head and Head(head.width, head.height, 16.0, False, False, 200.0, 2**22, True)


def _jpeg_xl(data: bytes) -> Head | None:
    head = plugins.jpeg_xl(data)
    return head and Head(head.width, head.height, 32.0, True, True, 250.0, 2**22, True)


_READERS: Final[dict[bytes, Callable[[bytes], Head | None]]] = {
    b"\xff\xd8\xff": jpeg.read,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"GIF8": _gif,
    b"BM": _bmp,
    b"II": _tiff,
    b"MM": _tiff,
    b"\xff\x0a": _jpeg_xl,
    b"\0\0\0\x0cJXL ": _jpeg_xl,
}
