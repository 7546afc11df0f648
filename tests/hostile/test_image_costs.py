"""Pictures that cost far more than their size, each beside an ordinary one of the same kind.

What can cost much is decoded in a process of its own; what is decoded here costs what is estimated.
"""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from serving.errors import BrokenImage
from serving.imaging import cost, decode
from serving.imaging.limits import has_one_orientation
from tests.hostile import tiffs
from tests.hostile.images import arithmetic_jpeg, jpeg_of_segments, png, png_of, saved
from tests.hostile.tiffs import LONG, RATIONAL, SHORT
from tests.robustness.file_builders import chunk, into_jpeg, segment

PIXELS = 10**8


def seconds(data: bytes) -> float:
    """CPU time of decoding a picture in this process."""
    start = time.process_time()
    decode.decode_here(data, max_pixels=PIXELS)
    return time.process_time() - start


def isolated(data: bytes) -> bool:
    """Whether a picture is decoded in a process of its own."""
    return decode.check(data, PIXELS).isolated


# ---- TIFF: strips and tiles

STRIPS = {
    "deflate": (8, lambda size: tiffs.empty_blocks(size, bytes(100))),
    "deflate-old": (32946, lambda size: tiffs.empty_blocks(size, bytes(100))),
    "lzw": (5, lambda size: tiffs.clear_codes(size, 100)),
    "packbits": (32773, lambda size: b"\x80" * size + b"\x9d\0"),
}


@pytest.mark.parametrize("name", STRIPS)
def test_a_tiff_whose_strips_share_bytes_is_isolated(name: str) -> None:
    compression, build = STRIPS[name]
    assert isolated(tiffs.of_strips(build(10_000), 100, 100, compression))
    alone = tiffs.of_strips(build(100), 20, 100, compression, shared=False)
    assert not isolated(alone)
    assert decode.decode_here(alone, max_pixels=PIXELS).image.size == (100, 20)


def test_a_tiff_whose_strips_have_no_or_other_byte_counts_is_isolated() -> None:
    data = tiffs.of_strips(tiffs.clear_codes(100, 100), 20, 100, 5, shared=False)
    entry = data.index(b"\x17\1\4\0")
    for other in (b"\x17\2\4\0", b"\x17\1\x0c\0", b"\x11\1\4\0", b"\x17\1\4\0\x13\0\0\0"):
        assert isolated(data[:entry] + other + data[entry + len(other) :]), other
    assert isolated(data[: entry + 8] + b"\xf0\xff\xff\xff" + data[entry + 12 :])


def test_byte_counts_of_16_or_64_bits_are_read() -> None:
    strip = zlib.compress(np.random.default_rng(0).bytes(50_000))
    data = tiffs.of_strips(strip, 2, 50_000, 8, shared=False)
    assert not isolated(data)
    at = data.index(b"\x17\1\4\0\2\0\0\0")
    count = struct.pack("<H", len(strip)) * 2
    assert not isolated(data[:at] + b"\x17\1\3\0\2\0\0\0" + count + data[at + 12 :])
    huge = struct.pack("<2Q", 2**63, 2**63)
    entry = b"\x17\1\x10\0\2\0\0\0" + struct.pack("<I", len(data))
    assert isolated(data[:at] + entry + data[at + 12 :] + huge)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "I;16", "F", "P", "CMYK"])
@pytest.mark.parametrize("kind", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("big", [False, True])
def test_ordinary_tiffs_are_decoded_here(mode: str, kind: str | None, big: bool) -> None:
    image = Image.effect_mandelbrot((700, 500), (-3, -2.5, 2, 2.5), 20)
    deep = mode in ("I;16", "F")
    image = Image.new(mode, image.size) if deep else image.convert("RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF", compression=kind, big_tiff=big, dpi=(72, 72))
    assert not isolated(file.getvalue())


def test_the_pixels_of_a_tile_outside_of_the_picture_cost_time() -> None:
    data = tiffs.of_one_tile(tiffs.empty_blocks(0, bytes(8000 * 8000)), 8, tile=8000)
    assert isolated(data)
    assert cost.estimate(data).seconds > 0.5 > cost.estimate(tiffs.of_one_tile(b"", 8)).seconds


def test_a_jpeg_in_a_tile_costs_its_coefficients() -> None:
    file = io.BytesIO()
    Image.new("L", (4000, 4000)).save(file, "JPEG", progressive=True)
    estimated = cost.estimate(tiffs.of_one_tile(file.getvalue(), 7))
    assert estimated.isolated
    assert estimated.bytes > 3 * 4000 * 4000
    assert estimated.seconds > 0.15


# ---- TIFF: tags


@pytest.mark.parametrize("tag", [34665, 34853])
@pytest.mark.parametrize("kind", [SHORT, RATIONAL])
def test_a_directory_of_many_values_is_isolated(tag: int, kind: int) -> None:
    assert isolated(tiffs.with_directory(tag, kind, 200_000))
    assert not isolated(tiffs.with_directory(tag, kind, 100))
    assert not isolated(tiffs.with_directory(tag, 7, 200_000))  # such as a maker's note


def test_directories_in_a_directory_are_walked_and_bounded() -> None:
    start = 8 + 64 * 64
    many = tiffs.directory({50000: (RATIONAL, 20_000, bytes(160_000))}, start + 18)
    inner = tiffs.directory({40965: tiffs.numbers(LONG, start + 18)}, start)
    assert isolated(tiffs.grey({34665: tiffs.numbers(LONG, start)}, inner + many))
    loop = tiffs.directory({40965: tiffs.numbers(LONG, start)}, start)
    assert isolated(tiffs.grey({34665: tiffs.numbers(LONG, start)}, loop))


@pytest.mark.parametrize("tag", [320, 700, 33723, 34377, 34675, 37724])
def test_a_long_tag_is_bytes_or_its_values_count(tag: int) -> None:
    for kind in (SHORT, RATIONAL):
        assert isolated(tiffs.with_tag(tag, kind, 200_000))
    for kind in (1, 7):
        assert not isolated(tiffs.with_tag(tag, kind, 200_000))


def test_tags_that_share_bytes_are_isolated() -> None:
    data = tiffs.grey({one: (7, 100_000, bytes(100_000)) for one in (700, 34377)})
    assert not isolated(data)
    at = data.index(b"\x49\x86\x07\0")
    assert isolated(data[: at + 4] + b"\0\0\4\0" + data[at + 8 :])


@pytest.mark.parametrize("kind", [2, SHORT, RATIONAL])
def test_a_profile_of_numbers_is_ignored(kind: int) -> None:
    assert decode.decode(tiffs.with_tag(34675, kind, 300)).applied[:1] == ("icc-ignored",)


# ---- JPEG


@pytest.mark.parametrize("marker", [0xC9, 0xCA])
def test_a_jpeg_in_arithmetic_code_is_isolated(marker: int) -> None:
    data = arithmetic_jpeg(64, 48, marker)
    assert isolated(data)
    assert decode.decode(data).image.size == (64, 48)


@pytest.mark.parametrize("marker", [0xCB, 0xCD, 0xCE, 0xCF])
def test_further_arithmetic_code_is_isolated_too(marker: int) -> None:
    assert isolated(arithmetic_jpeg(64, 48, marker))
    with pytest.raises(BrokenImage):
        decode.decode(arithmetic_jpeg(64, 48, marker))


def test_segments_between_scans_are_walked_up_to_a_limit() -> None:
    start = time.process_time()
    with pytest.raises(BrokenImage, match=r"more than 10000 segments$"):
        decode.check(jpeg_of_segments(2_000_000), PIXELS)
    assert time.process_time() - start < 0.5
    assert not isolated(jpeg_of_segments(5_000))


# ---- PNG and others


def test_the_compressed_bytes_of_a_png_cost_time() -> None:
    pixels = bytes(64 * (1 + 64 * 3))
    assert isolated(png_of(tiffs.empty_blocks(12_000_000, pixels), 64, 64))
    data = png_of(tiffs.empty_blocks(2_000_000, pixels), 64, 64)
    assert not isolated(data)
    assert min(seconds(data) for _ in range(3)) < 3 * cost.estimate(data).seconds


def test_the_chunks_of_a_png_cost_time() -> None:
    data = png(64, 64, extra=chunk(b"teSt", b"") * 50_000)
    assert not isolated(data)
    assert min(seconds(data) for _ in range(3)) < 3 * cost.estimate(data).seconds


def test_boxes_are_walked_up_to_a_limit() -> None:
    start = time.process_time()
    for box in (b"ispe\0\0\0\0", b"irot"):
        with pytest.raises(BrokenImage, match=r"more than 4096 sizes and rotations$"):
            decode.check(b"\0\0\0\x18ftypavif" + box * 2_000_000, PIXELS)
    boxes = struct.pack(">I4s", 8, b"free") * 2_000_000
    assert cost.estimate(b"\0\0\0\x0cJXL \r\n\x87\n" + boxes).isolated
    assert time.process_time() - start < 0.5


def of_blocks(number: int, before: bool = True, size: int = 1) -> bytes:
    """A GIF with a comment of blocks of `size` bytes before or behind its only frame."""
    data = saved("P", "GIF")(64, 64)
    at = data.index(b",") if before else len(data) - 1
    return data[:at] + b"!\xfe" + (bytes([size]) + b"x" * size) * number + b"\0" + data[at:]


@pytest.mark.parametrize("before", [True, False])
def test_a_gif_of_many_comments_is_isolated(before: bool) -> None:
    assert isolated(of_blocks(100_000, before))
    assert not isolated(of_blocks(1000, before, 255))
    data = of_blocks(1, before)
    at = data.index(b"!\xfe")
    assert isolated(data[:at] + b"!\xfe\1x\0" * 100_000 + data[at:])
    assert not isolated(saved("P", "GIF")(2000, 2000))


def test_resources_of_photoshop_cost_time() -> None:
    resources = segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000)
    data = into_jpeg(saved("RGB", "JPEG")(64, 64), *[resources] * 290)
    assert isolated(data)
    assert not isolated(into_jpeg(saved("RGB", "JPEG")(64, 64), resources))


def test_the_chunks_of_a_webp_cost_memory() -> None:
    data = saved("RGB", "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")(64, 64)
    many = data + struct.pack("<4sI", b"abcd", 0) * 1_000_000
    many = b"RIFF" + struct.pack("<I", len(many) - 8) + many[8:]
    assert cost.estimate(many).bytes > 40_000_000
    assert decode.decode(many).image.size == (64, 64)


def shared_tags(count: int) -> bytes:
    """Directory of tags that are all the same 60,000 bytes."""
    entries = b"".join(struct.pack("<HHII", one, 7, 60_000, 8) for one in range(1, count + 1))
    head = struct.pack("<2sHIH", b"II", 42, 8, count)
    return (head + entries + bytes(4)).ljust(65_000, b"\0")


@pytest.mark.parametrize(("marker", "name"), [(0xE1, b"Exif\0\0"), (0xE2, b"MPF\0")])
def test_tags_of_a_jpeg_that_share_bytes_are_isolated(marker: int, name: bytes) -> None:
    small = saved("RGB", "JPEG")(64, 64)
    assert isolated(into_jpeg(small, segment(marker, name + shared_tags(4000))))
    assert not isolated(into_jpeg(small, segment(marker, name + shared_tags(1))))


def test_exif_whose_tags_share_bytes_is_ignored() -> None:
    for info in (
        {"exif": b"Exif\0\0" + shared_tags(4000)},
        {"Raw profile type exif": f"\nexif\n65000\n{shared_tags(4000).hex()}"},
    ):
        assert not has_one_orientation(info)
    assert has_one_orientation({"exif": b"Exif\0\0" + shared_tags(1)})
