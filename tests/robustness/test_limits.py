"""Decompression bombs and files with millions of parts are refused fast, with little memory."""

import json
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from serving.errors import BrokenImage, TooLarge
from serving.imaging import limits
from serving.imaging.decode import decode
from tests.robustness import sizes
from tests.robustness.bmps import PALETTE, RLE8, bmp
from tests.robustness.file_builders import (
    PNG_MAGIC,
    RGB,
    chunk,
    header,
    into_jpeg,
    rows,
    segment,
    tags,
    tiff,
)
from tests.robustness.jpegs import many_scans, with_stated_size
from tests.robustness.scene import BEST_QUALITY, SCENE, encode, encode_best, scene
from tests.support.live_server import ROOT

PLAIN = encode_best(scene(), "JPEG")
# Decodes the files in a process whose address space may grow by 200 MB.
MEASURE = """
import json, resource, sys, time
from serving.errors import FledgeError
from serving.imaging.decode import decode
from tests.robustness import sizes, test_limits
files = {item.name: item.data for item in sizes.decompression_bombs()}
files |= test_limits.repeated_parts()
decode(test_limits.PLAIN)
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
allowed = status("VmSize") + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
before, found = status("VmHWM"), {}
for name, data in files.items():
    start = time.process_time()
    try:
        decode(data)
        code = None
    except FledgeError as error:
        code = error.code
    found[name] = (code, time.process_time() - start)
json.dump({"found": found, "grown": status("VmHWM") - before}, sys.stdout)
"""


def repeated_parts() -> dict[str, bytes]:
    """Files with hundreds of thousands of empty parts."""
    idat = chunk(b"IDAT", zlib.compress(rows(SCENE, 8)))
    png = PNG_MAGIC + header(64, 32, 8, RGB)
    many = limits.STRIPS + 1
    strips = [(273, 4, [8] * many), (279, 4, [8] * many)]
    progressive = many_scans()
    return {
        "jpeg-segments": into_jpeg(PLAIN, segment(0xE5, b"") * 1_000_000),
        "jpeg-segments-behind-the-end": into_jpeg(
            PLAIN, b"\xff\xd9", segment(0xE5, b"") * 1_000_000
        ),
        # A marker without a length in Pillow, but with one in the standard.
        "jpeg-segments-hidden": into_jpeg(
            PLAIN, (b"\xff\xf0\xff\xff" + segment(0xE5, b"") * 16_383) * 50
        ),
        "jpeg-exif": into_jpeg(PLAIN, segment(0xE1, b"Exif\0\0" + bytes(10)) * 200_000),
        "jpeg-scans": progressive.replace(
            b"\xff\xc2\0\x0b\x08\0\x20\0\x40", b"\xff\xc2\0\x0b\x08\x26\0\x26\0"
        ),
        "jpeg-scans-of-one-colour": PLAIN[: PLAIN.index(b"\xff\xda")]
        + (segment(0xDA, b"\1\1\0\0\x3f\0") + bytes(4)) * 500,
        "png-chunks": png + chunk(b"juNk") * 500_000 + idat,
        "png-chunks-behind": png + idat + chunk(b"juNk") * 500_000,
        "tiff-strips": tiff([*tags([8], 1, rows=1), *strips]),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_are_refused_within_half_a_second_and_30_mb() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    codes = {name: code for name, (code, _) in measured["found"].items()}
    assert codes == {
        item.name: "too-large" for item in sizes.decompression_bombs()
    } | dict.fromkeys(repeated_parts(), "broken-image")
    slow = {name: seconds for name, (_, seconds) in measured["found"].items() if seconds > 0.5}
    assert slow == {}
    assert measured["grown"] < 30_000_000


def test_max_pixels_also_raises_the_limit_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # restored at the end
    large = sizes.png_claiming(11_000, 10_000)
    with pytest.raises(TooLarge):
        decode(large)
    with pytest.raises(BrokenImage):  # decoded, and found to be truncated
        decode(large, max_pixels=110_000_000)
    with pytest.raises(TooLarge):
        decode(large)


def test_files_at_the_limits_are_decoded() -> None:
    at_limit = into_jpeg(PLAIN, segment(0xE5, b"") * (limits.SEGMENTS - 20))
    assert decode(at_limit).applied == ()
    scans = encode(scene(), "JPEG", progressive=True, **BEST_QUALITY["JPEG"])
    last_scan = scans.rindex(b"\xff\xda")
    count = scans.count(b"\xff\xda")
    at_limit = scans[:-2] + scans[last_scan:-2] * (limits.SCANS - count) + scans[-2:]
    decode(at_limit)
    with pytest.raises(BrokenImage, match=f"more than {limits.SCANS} scans"):
        decode(at_limit[:-2] + scans[last_scan:])


def test_scan_markers_outside_the_scans_are_not_counted() -> None:
    markers = b"\xff\xda" * 1000
    for data in (into_jpeg(PLAIN, segment(0xE5, markers)), PLAIN + markers):
        assert decode(data).image.size == (64, 32)


def test_run_length_bmps_are_limited_by_max_pixels() -> None:
    lines = b"\1\1\0\0" * 100
    assert decode(bmp(lines, 8, RLE8, size=(100, 100), palette=PALETTE)).applied == ()
    with pytest.raises(TooLarge, match="run-length"):
        decode(bmp(lines, 8, RLE8, size=(100, 100), palette=PALETTE), max_pixels=9_999)


@pytest.mark.parametrize(
    "data",
    [b"II", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**64 - 1)],
)
def test_headers_too_short_for_the_limits_are_passed_to_the_decoder(data: bytes) -> None:
    limits.check_limits(data, 1)
    limits.check_limits(b"BM" + data, 1)
    limits.check_limits(b"\xff\xd8\xff" + data, 1)


def test_a_jpeg_that_states_a_smaller_size_is_decoded() -> None:
    assert decode(with_stated_size(64, 16)).image.size == (64, 16)
