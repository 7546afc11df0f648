"""Limits on the structure of image files: the last accepted and the first refused value of each.

`tests/robustness/test_limits.py` has the files that these limits are for.
"""

from __future__ import annotations

import struct

import pytest
from PIL import Image

from serving.errors import BrokenImage, TooLarge
from serving.imaging.limits import (
    check_limits,
    has_one_orientation,
    png_chunks,
    raise_limit_of_pillow,
)

PIXELS = 10_000


def refusal(data: bytes, max_pixels: int = PIXELS) -> str | None:
    try:
        check_limits(data, max_pixels)
    except (BrokenImage, TooLarge) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(autouse=True)
def _limit_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)


@pytest.mark.parametrize(
    ("before", "max_pixels", "after"), [(50, 101, 51), (50, 99, 50), (None, 4, 2), (50, 0, 50)]
)
def test_the_limit_of_pillow_is_only_increased(
    before: int | None, max_pixels: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)
    raise_limit_of_pillow(max_pixels)
    assert after == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\x89PN", b"I", b"B", b"RIFF", b"GIF89a"])
def test_other_data_passes(data: bytes) -> None:
    assert refusal(data) is None


# ---- JPEG

START, END, SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
MANY_SCANS = "BrokenImage: the image is broken: more than 100 scans"
MANY_SEGMENTS = "BrokenImage: the image is broken: more than 1000 segments before the picture"


def segment(marker: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(payload)) + payload


def frame(marker: int = 0xC0, components: int = 3) -> bytes:
    return segment(marker, struct.pack(">BHHB", 8, 1, 1, components) + b"abc")


def scan(components: int = 1) -> bytes:
    return segment(SCAN, bytes([components])) + b"pixels\xff\x00\xff\xd0"


@pytest.mark.parametrize("marker", [0xE0, 0xEF, 0xFE, 0xC4, 0xDB, 0xC0, 0xCC])
def test_a_jpeg_has_at_most_1000_segments_before_its_scan(marker: int) -> None:
    one = segment(marker, b"\xff\xe0\xff\xd9 seven")
    assert refusal(START + one * 1000 + scan()) is None
    assert refusal(START + one * 1001 + scan()) == MANY_SEGMENTS
    assert refusal(START + one * 1001) is None  # as many as with a scan, and Pillow refuses it
    assert refusal(START + one * 1002) == MANY_SEGMENTS


def test_a_segment_that_states_no_length_counts() -> None:
    empty = b"\xff\xe0\0\0"
    assert refusal(START + empty * 1000 + scan()) is None
    assert refusal(START + empty * 1001 + scan()) == MANY_SEGMENTS


def test_segments_after_the_first_scan_are_not_counted() -> None:
    assert refusal(START + scan() + segment(0xE0) * 2000 + scan()) is None


@pytest.mark.parametrize("marker", [0xC2, 0xC6, 0xCA, 0xCE])
def test_a_progressive_jpeg_has_at_most_100_scans(marker: int) -> None:
    assert refusal(START + frame(marker) + scan(3) * 100 + END) is None
    assert refusal(START + frame(marker) + scan(3) * 101 + END) == MANY_SCANS


@pytest.mark.parametrize("marker", [0xC0, 0xC1, 0xC3, 0xC5, 0xC7, 0xC9, 0xCB, 0xCD, 0xCF])
def test_other_jpegs_have_at_most_100_scans_unless_the_first_has_all_components(
    marker: int,
) -> None:
    assert refusal(START + frame(marker) + scan(1) * 100) is None
    assert refusal(START + frame(marker) + scan(1) * 101) == MANY_SCANS
    assert refusal(START + frame(marker) + scan(3) * 101) is None
    assert refusal(START + frame(marker, 1) + scan(1) * 101) is None


def test_the_last_frame_before_the_scan_decides() -> None:
    scans = scan(3) * 101
    assert refusal(START + frame(0xC2) + frame(0xC0) + scans) is None
    assert refusal(START + frame(0xC0) + frame(0xC2) + scans) == MANY_SCANS
    assert refusal(START + frame(0xC0, 3) + frame(0xC0, 1) + scans) == MANY_SCANS
    assert refusal(START + scans) == MANY_SCANS
    # Tables are no frames, although their markers lie among those of frames.
    tables = segment(0xC4, b"abcdefgh") + segment(0xCC, b"abcdefgh") + segment(0xDB, b"abcdefgh")
    assert refusal(START + frame(0xC0) + tables + scans) is None
    assert refusal(START + frame(0xC2) + tables + scans) == MANY_SCANS


def test_only_scans_before_the_end_count() -> None:
    half = scan() * 51
    assert refusal(START + frame() + half + half) == MANY_SCANS
    assert refusal(START + frame() + half + END + half) is None
    assert refusal(START + END + frame() + half + half) == MANY_SCANS  # skipped, as in Pillow
    hidden = segment(0xE1, b"\xff\xda" * 200)
    assert refusal(START + frame() + scan() * 100 + hidden) is None
    assert refusal(START + frame() + hidden + scan() * 101) == MANY_SCANS


# ---- PNG

PNG = b"\x89PNG\r\n\x1a\n"
MANY_CHUNKS = "BrokenImage: the image is broken: more than 65536 chunks"


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + b"sum!"


def test_a_png_has_at_most_65536_chunks_before_its_end() -> None:
    chunks = chunk(b"tEXt", b"12345") * 65536
    assert refusal(PNG + chunks + chunk(b"IEND") + chunks) is None
    assert refusal(PNG + chunks + b"\0") == MANY_CHUNKS  # even one that is cut short
    assert refusal(PNG + chunk(b"tEXt", chunks) + chunk(b"IDAT")) is None


# ---- TIFF

MANY_STRIPS = "BrokenImage: the image is broken: more than 131072 strips or tiles"
LARGE_TILES = (
    "TooLarge: tiles of {} x {} pixels are more than the 10000 allowed (FLEDGE_MAX_PIXELS)"
)
WIDTH, HEIGHT, STRIPS, TILES = 322, 323, 273, 324
KINDS = {"BYTE": 1, "SHORT": 3, "LONG": 4, "SBYTE": 6, "SSHORT": 8, "SLONG": 9, "unknown": 99}
SIZES = {"BYTE": 1, "SHORT": 2, "LONG": 4, "SBYTE": 1, "SSHORT": 2, "SLONG": 4}


def tiff(
    *entries: tuple[int, int, int],
    order: str = "<",
    big: bool = False,
    kind: str = "LONG",
    gap: int = 0,
    cut: int = 0,
) -> bytes:
    """A TIFF with a directory of entries (tag, count, value), and garbage after each value."""
    letters = b"II" if order == "<" else b"MM"
    size = SIZES.get(kind, 8 if big else 4)
    found = b""
    for tag, count, value in entries:
        field = value.to_bytes(size, "little" if order == "<" else "big")
        field += b"\xee" * ((8 if big else 4) - size)
        found += struct.pack(f"{order}HH{'Q' if big else 'I'}", tag, KINDS[kind], count) + field
    if big:
        head = letters + struct.pack(f"{order}HHHQ", 43, 8, 0, 16 + gap)
        data = head + b"\xee" * gap + struct.pack(f"{order}Q", len(entries)) + found
    else:
        head = letters + struct.pack(f"{order}HI", 42, 8 + gap)
        data = head + b"\xee" * gap + struct.pack(f"{order}H", len(entries)) + found
    return data[: len(data) - cut]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("tag", [STRIPS, TILES])
def test_a_tiff_has_at_most_131072_strips(order: str, big: bool, tag: int) -> None:
    for gap in (0, 3):
        kept = tiff((256, 2**20, 1), (tag, 131_072, 0), order=order, big=big, gap=gap)
        assert refusal(kept) is None
        data = tiff((256, 1, 1), (tag, 131_073, 0), (257, 1, 1), order=order, big=big, gap=gap)
        assert refusal(data) == MANY_STRIPS


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_a_number_of_strips_has_no_sign(order: str, big: bool) -> None:
    for count in (2**31, 2**32 - 1, *((2**63, 2**64 - 1) if big else ())):
        assert refusal(tiff((STRIPS, count, 0), order=order, big=big)) == MANY_STRIPS


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_of_a_tiff_has_at_most_max_pixels(order: str, big: bool, kind: str) -> None:
    options = {"order": order, "big": big, "kind": kind}
    side = 250
    assert refusal(tiff((WIDTH, 1, side), (HEIGHT, 1, 40), **options)) is None
    data = tiff((WIDTH, 1, side), (HEIGHT, 1, 41), **options)
    assert refusal(data) == LARGE_TILES.format(side, 41)
    assert refusal(data, 10_250) is None
    if kind not in ("BYTE", "SBYTE"):
        assert refusal(tiff((HEIGHT, 1, 1), (WIDTH, 1, 0x2711), **options)) is not None


def test_of_a_repeated_tag_the_largest_value_counts() -> None:
    for widths in ((400, 2), (2, 400)):
        entries = [(WIDTH, 1, width) for width in widths]
        assert refusal(tiff((HEIGHT, 1, 30), *entries)) == LARGE_TILES.format(400, 30)
        heights = [(HEIGHT, 1, width) for width in widths]
        assert refusal(tiff((WIDTH, 1, 30), *heights)) == LARGE_TILES.format(30, 400)
    assert refusal(tiff((WIDTH, 1, 2**31), (256, 1, 2**31), (257, 1, 2**31))) is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_big_tiff_is_read_as_pillow_and_as_libtiff_do(order: str) -> None:
    """Pillow's offsets have 64 bits if the third byte is 43, libtiff's if the 16-bit number is."""
    for big in (True, False):
        data = bytearray(tiff((STRIPS, 131_073, 0), order=order, big=big, gap=8))
        data[2:4] = b"\0+"
        assert refusal(bytes(data)) == MANY_STRIPS
        data[2:4] = b"+\0"
        assert refusal(bytes(data)) == (MANY_STRIPS if big else None)


def test_a_directory_at_byte_43_makes_no_big_tiff() -> None:
    """The offset's first byte is a plus sign."""
    directory = tiff((STRIPS, 131_073, 0), big=True)[16:]
    data = tiff(gap=35).ljust(64, b"\0") + directory
    offset = (64).to_bytes(8, "little")
    assert data[4:5] == b"+"
    assert refusal(data[:8] + offset + data[16:]) is None
    assert refusal(b"II+\0" + data[4:8] + offset + data[16:]) == MANY_STRIPS


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_a_directory_that_is_cut_short_is_read_up_to_its_last_whole_entry(
    order: str, big: bool
) -> None:
    entries = ((STRIPS, 131_073, 0), (256, 1, 1))
    size = len(tiff(*entries, big=big)) - len(tiff(entries[0], big=big))
    for cut in (0, 1, size - 1, size):
        assert refusal(tiff(*entries, order=order, big=big, cut=cut)) == MANY_STRIPS
    assert refusal(tiff(*entries, order=order, big=big, cut=size + 1)) is None
    for cut in range(size + 1, len(tiff(*entries, big=big)) - 2):
        assert refusal(tiff(*entries, order=order, big=big, cut=cut)) is None
    # A directory beyond the end, and a stated number of entries above the number that are there.
    assert refusal(tiff(*entries, order=order, big=big, gap=9)[:12]) is None
    far = b"II*\0\xff\xff\xff\xff" if not big else b"II+\0\x08\0\0\0" + b"\xff" * 8
    assert refusal(far + b"\0" * 40) is None
    if big:  # an offset of 64 bits is not counted from the end, either
        data = tiff(*entries, order=order, big=True) + b"\0" * 8
        before = (2**64 - len(data) + 16).to_bytes(8, "little" if order == "<" else "big")
        assert refusal(data[:8] + before + data[16:]) is None


# ---- BMP

RLE8, RLE4 = 1, 2


def bmp(width: int, height: int, code: int = RLE8, size: int = 40) -> bytes:
    return b"BM" + b"\0" * 12 + struct.pack("<IIiHHI", size, width, height, 1, 8, code)


@pytest.mark.parametrize("code", [RLE8, RLE4])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_run_length_encoded_bmp_has_at_most_max_pixels(code: int, sign: int) -> None:
    assert refusal(bmp(100, 100 * sign, code)) is None
    assert refusal(bmp(101, 100 * sign, code)) == (
        "TooLarge: 101 x 100 pixels in run-length code are more than the 10000 allowed "
        "(FLEDGE_MAX_PIXELS)"
    )
    assert refusal(bmp(10_000, 1000 * sign, code), 10**9) is None
    assert refusal(bmp(10_000, 1001 * sign, code), 10**9) == (
        "TooLarge: 10000 x 1001 pixels in run-length code are more than the 10000000 allowed; "
        "save it without run-length code"
    )


def test_other_bmps_are_left_to_the_decoder() -> None:
    for code in (0, 3, 4):
        assert refusal(bmp(101, 100, code)) is None
    assert refusal(bmp(101, 100, size=12)) is None
    assert refusal(bmp(101, 100, size=39)) is None
    assert refusal(bmp(101, 100, size=124)) is not None
    assert refusal(bmp(101, 100)[:-1]) is None


def exif(kind: int, count: int, value: int = 6) -> bytes:
    entry = struct.pack("<HHII", 274, kind, count, value)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, True),
        ({"exif": b""}, True),
        ({"exif": b"Exif\0\0"}, True),
        ({"exif": b"MM"}, True),
        ({"exif": exif(3, 1)}, True),
        ({"exif": exif(3, 1)[6:]}, True),
        ({"exif": exif(5, 16)}, True),
        ({"exif": exif(5, 17)}, False),
        ({"exif": exif(5, 2_400_000)}, False),
        ({"Raw profile type exif": "\nexif\n  10\n" + "00" * 10}, True),
        ({"Raw profile type exif": "00" * 2**18}, False),
    ],
)
def test_an_orientation_has_few_values(info: dict[str, object], expected: bool) -> None:
    assert has_one_orientation(info) == expected


def test_bytes_between_segments_and_entries_of_a_directory_are_limited() -> None:
    assert refusal(START + b"\xff" * 65_000 + frame() + scan()) is None
    many = "BrokenImage: the image is broken: more than 65536 bytes between segments"
    assert refusal(START + b"\xff" * 66_000 + frame() + scan()) == many
    assert refusal(START + b"\xff\xd0" * 66_000) == many
    table = b"II*\0" + struct.pack("<IH", 8, 4097) + bytes(12 * 4097)
    assert (
        refusal(table)
        == "BrokenImage: the image is broken: more than 4096 entries of its directory"
    )


def test_what_follows_the_end_of_a_png_is_no_chunk() -> None:
    def chunk(kind: bytes, body: bytes = b"") -> bytes:
        return struct.pack(">I", len(body)) + kind + body + bytes(4)

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"IDAT", b"pixels")
    chunks = [(b"IHDR", 16, 13), (b"IDAT", 41, 6)]
    assert list(png_chunks(data)) == chunks
    assert list(png_chunks(data + chunk(b"IEND") + bytes(12_000))) == chunks
