"""Small files that would cost much are refused at once, and take next to no memory."""

import json
import struct
import subprocess
import sys
import zlib

import pytest

from serving.errors import BrokenImage, TooLarge
from serving.imaging import decode as images
from serving.imaging import limits
from tests.robustness import sizes
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
from tests.robustness.jpegs import many_scans, resized
from tests.robustness.scene import FINE, SCENE, encode, fine, scene
from tests.support.live_server import ROOT

PLAIN = fine(scene(), "JPEG")
# Decodes bombs where no memory can be had: 200 MB beyond what the process has when it starts.
MEASURE = """
import json, resource, sys, time
from serving.errors import FledgeError
from serving.imaging.decode import decode
from tests.robustness import sizes, test_limits
files = {item.name: item.data for item in sizes.bombs()} | test_limits.floods()
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


def floods() -> dict[str, bytes]:
    """Megabytes of parts that hold nothing."""
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
        # A marker that has no length for Pillow, and one for who reads the standard.
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
def test_bombs_are_refused_fast_and_cheaply() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    codes = {name: code for name, (code, _) in measured["found"].items()}
    assert codes == {item.name: "too-large" for item in sizes.bombs()} | dict.fromkeys(
        floods(), "broken-image"
    )
    slow = {name: seconds for name, (_, seconds) in measured["found"].items() if seconds > 0.5}
    assert slow == {}
    assert measured["grown"] < 30_000_000


def test_who_allows_more_pixels_gets_them_from_pillow_too() -> None:
    large = sizes.png_of(11_000, 10_000)
    with pytest.raises(TooLarge):
        images.decode(large)
    with pytest.raises(BrokenImage):  # the data are missing, and that was looked at
        images.decode(large, max_pixels=110_000_000)
    with pytest.raises(TooLarge):
        images.decode(large)


def test_what_is_just_allowed_is_decoded() -> None:
    fits = into_jpeg(PLAIN, segment(0xE5, b"") * (limits.SEGMENTS - 20))
    assert images.decode(fits).applied == ()
    scans = encode(scene(), "JPEG", progressive=True, **FINE["JPEG"])
    last = scans.rindex(b"\xff\xda")
    known = scans.count(b"\xff\xda")
    fits = scans[:-2] + scans[last:-2] * (limits.SCANS - known) + scans[-2:]
    images.decode(fits)
    with pytest.raises(BrokenImage, match=f"more than {limits.SCANS} scans"):
        images.decode(fits[:-2] + scans[last:])


def test_marks_of_scans_outside_of_the_scans_are_not_counted() -> None:
    marks = b"\xff\xda" * 1000
    for data in (into_jpeg(PLAIN, segment(0xE5, marks)), PLAIN + marks):
        assert images.decode(data).image.size == (64, 32)


def test_a_large_picture_in_run_lengths_is_a_matter_of_pixels() -> None:
    from tests.robustness.bmps import QUADS, RLE8, bmp

    lines = b"\1\1\0\0" * 100
    assert images.decode(bmp(lines, 8, RLE8, size=(100, 100), palette=QUADS)).applied == ()
    with pytest.raises(TooLarge, match="run-length"):
        images.decode(bmp(lines, 8, RLE8, size=(100, 100), palette=QUADS), max_pixels=9_999)


@pytest.mark.parametrize(
    "data",
    [b"II", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**64 - 1)],
)
def test_what_is_too_short_to_be_judged_is_left_to_the_decoder(data: bytes) -> None:
    limits.refuse(data, 1)
    limits.refuse(b"BM" + data, 1)
    limits.refuse(b"\xff\xd8\xff" + data, 1)


def test_a_jpeg_that_claims_less_is_no_bomb() -> None:
    assert images.decode(resized(64, 16)).image.size == (64, 16)
