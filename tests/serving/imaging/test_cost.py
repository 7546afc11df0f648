"""Estimates of what decoding costs, against what it does cost, and for heads that lie."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from serving.errors import BrokenImage, NotAnImage, TooLarge
from serving.imaging import cost, decode
from serving.imaging.isolated import DecoderPool
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import VIEWS
from tests.hostile.images import WORST, noisy_tiff, png, progressive_jpeg, saved
from tests.robustness.file_builders import chunk, into_jpeg, segment
from tests.support.fork_server import ROOT
from tests.support.tiny_bundle import photo

SIDE = 1600
FORMATS = {
    **WORST,
    "jpeg": saved("RGB", "JPEG"),
    "jpeg-grey": saved("L", "JPEG"),
    "png-grey": saved("L", "PNG"),
    "png-1-bit": saved("1", "PNG"),
    "webp": saved("RGB", "WEBP", method=0),
    "bmp": saved("RGB", "BMP"),
    "tiff": saved("RGB", "TIFF"),
    "tiff-cmyk": saved("CMYK", "TIFF", compression="tiff_lzw"),
    "avif-alpha": saved("RGBA", "AVIF", speed=10),
}
# Prints for each file the peak of resident memory while it is decoded, in bytes.
MEASURE = """
import json, sys
from pathlib import Path
from serving.imaging.decode import decode_here
from serving.utils.malloc import return_large_blocks

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024

return_large_blocks()
decode_here(Path(sys.argv[1]).read_bytes(), max_pixels=10**8)
peaks = []
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    decode_here(data, max_pixels=10**8)
    peaks.append(status("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_no_format_needs_more_memory_than_is_estimated(tmp_path: Path) -> None:
    for name, build in FORMATS.items():
        (tmp_path / name).write_bytes(build(SIDE, SIDE))
    paths = [str(tmp_path / name) for name in FORMATS]
    command = [sys.executable, "-c", MEASURE, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peaks = dict(zip(FORMATS, json.loads(done.stdout), strict=True))
    for name, peak in peaks.items():
        estimated = cost.estimate((tmp_path / name).read_bytes())
        assert estimated.pixels == SIDE * SIDE, name
        assert peak < estimated.bytes + 2 * 2**20, name
        assert estimated.bytes < 40 * SIDE * SIDE + 2**25, name


def test_a_picture_at_a_reduced_size_costs_less() -> None:
    data = saved("RGB", "JPEG")(4032, 3024)
    full, scaled = (
        cost.estimate(data, 1, Preprocess(decode=how, fit=fit))
        for how, fit in (("full", "crop"), ("scaled", "crop"))
    )
    assert 3 * scaled.bytes < full.bytes
    assert 1.2 * scaled.seconds < full.seconds
    assert (scaled.width, scaled.height) == (4032, 3024)


def test_squishing_a_long_picture_costs_the_rows_that_are_resized_first() -> None:
    """A picture of one column is widened to `size` columns before its rows are reduced."""
    data = png(1, 1_000_000)
    assert not cost.estimate(data, 1, Preprocess(fit="crop")).isolated
    squished = cost.estimate(data, 1, Preprocess(fit="squish"))
    assert squished.isolated
    assert squished.bytes > 4 * 224 * 1_000_000


def test_large_views_cost_their_bytes() -> None:
    data = photo(1, (600, 400))
    one, ten = (cost.estimate(data, views, Preprocess(size=4096)).bytes for views in (1, 10))
    assert ten - one >= 9 * 3 * 4096**2


def test_a_frame_that_can_be_reduced_less_than_the_one_stated_is_isolated() -> None:
    real = photo(1, (300, 6000))
    frame = segment(
        0xC0, b"\x08" + struct.pack(">HH", 6000, 6000) + real[real.index(b"\xff\xc0") + 9 :][:10]
    )
    data, preprocess = into_jpeg(real, frame), Preprocess(decode="scaled")
    stated = decode.check(data, 10**8, preprocess=preprocess)
    assert (stated.width, stated.height) == (6000, 6000)
    with pytest.raises(decode.LargerThanStated):
        decode.decode_here(data, max_pixels=10**8, stated=stated, preprocess=preprocess)
    for how in ("full", "scaled"):
        with pytest.raises(BrokenImage):
            decode.decode(data, preprocess=Preprocess(decode=how))


def test_common_photos_are_decoded_in_the_process() -> None:
    for size in ((640, 480), (4032, 3024)):
        for kind in ("JPEG", "PNG"):
            estimated = cost.estimate(saved("RGB", kind)(*size))
            assert (estimated.width, estimated.height) == size
            assert not estimated.isolated, (size, kind)
    assert not cost.estimate(progressive_jpeg(3000, 2000, exif=True), views=10).isolated


@pytest.mark.parametrize(
    "data",
    [
        progressive_jpeg(5000, 5000),
        progressive_jpeg(3000, 2500, scans=90),
        png(4000, 4000, 16, 6),
        saved("RGB", "AVIF")(20, 20),  # its frames may be larger than its head states
    ],
    ids=["jpeg", "scans", "png", "avif"],
)
def test_expensive_pictures_are_isolated(data: bytes) -> None:
    assert cost.estimate(data).isolated


def test_views_cost_time() -> None:
    data = photo(1, (600, 400))
    assert cost.estimate(data, 10).seconds > cost.estimate(data).seconds


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [1024, 2048])
def test_the_views_of_a_large_network_are_part_of_the_memory(size: int, fit: str) -> None:
    """Without them a decoder process refused small images as too large."""
    data = saved("RGB", "AVIF")(40, 40)
    preprocess = Preprocess(size=size, fit=fit)
    estimated = cost.estimate(data, 10, preprocess)
    assert estimated.bytes > 10 * 6 * size**2
    request = {
        **{"max_pixels": 10**6, "preprocess": preprocess.to_dict(), "too_large": "too large"},
        "views": VIEWS,
    }
    answer = decode.decoders.decode(data, request, memory=estimated.bytes)
    assert answer.pixels.shape == (10, size, size, 3)
    assert cost.estimate(saved("RGB", "JPEG")(40, 40), 10, Preprocess(size=4096)).isolated


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg", b"%PDF"])
def test_data_of_no_supported_format_costs_nothing(data: bytes) -> None:
    assert cost.estimate(data) == cost.Cost()


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"II*\0", b"\0\0\0 ftypavif"]
)
def test_a_file_whose_size_cannot_be_read_is_isolated(data: bytes) -> None:
    assert cost.estimate(data).isolated
    with pytest.raises((BrokenImage, NotAnImage)):
        decode.decode(data)


def test_a_gif_whose_frame_is_larger_than_its_screen_is_isolated() -> None:
    data = saved("P", "GIF")(800, 600)
    lies = data[:6] + struct.pack("<HH", 4, 4) + data[10:]
    stated = decode.check(lies, 10**8)
    assert stated.pixels == 16
    with pytest.raises(decode.LargerThanStated):
        decode.decode_here(lies, max_pixels=10**8, stated=stated)
    assert decode.decode(lies).image.size == (800, 600)


def test_an_isolated_picture_has_the_same_pixels_and_errors() -> None:
    for mode, kind in (("RGBA", "AVIF"), ("RGB", "AVIF")):
        image = Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 20).convert(mode)
        file = io.BytesIO()
        image.save(file, kind)
        data = file.getvalue()
        isolated, here = decode.decode(data), decode.decode_here(data, max_pixels=10**8)
        assert isolated.applied == here.applied
        assert isolated.image.tobytes() == here.image.tobytes()
    with pytest.raises(TooLarge, match="10000 x 10001 pixels are more than the 100000000 allowed"):
        decode.decode(progressive_jpeg(10_000, 10_001))


def test_the_decoder_process_is_used_again_and_ends_with_its_pool() -> None:
    pool = DecoderPool(1)
    data, request = (
        saved("RGB", "AVIF")(30, 20),
        {"max_pixels": 1000, "preprocess": {"background": [1, 2, 3]}, "too_large": "too large"},
    )
    assert pool.decode(data, request, memory=2**26)[0].shape == (20, 30, 3)
    process = pool._idle[0]
    pool.decode(data, request, memory=2**26)
    assert pool._idle == [process]
    with pytest.raises(TooLarge):
        pool.decode(progressive_jpeg(6000, 6000), {**request, "max_pixels": 10**8}, memory=2**24)
    pool.decode(data, request, memory=2**26)
    pool.close()
    assert pool._idle == []


def text(kind: bytes, body: bytes) -> bytes:
    return chunk(kind, b"x\0" + body)


def many_values(tag: int, count: int) -> bytes:
    """A TIFF whose tag has many values."""
    data = saved("L", "TIFF")(8, 8)
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (number,) = struct.unpack_from(order + "H", data, at)
    entries = data[at + 2 : at + 2 + 12 * number]
    entry = struct.pack(order + "HHII", tag, 5, count, len(data))
    rest = struct.pack(order + "H", number + 1) + entries + entry + bytes(4)
    start = len(data) + 8 * count
    head = data[:4] + struct.pack(order + "I", start)
    return head + data[8:] + bytes(8 * count) + rest


@pytest.mark.parametrize(
    "data",
    [
        saved("RGB", "WEBP", lossless=True)(20, 20),
        saved("RGBA", "WEBP")(20, 20),
        png(20, 20, extra=text(b"zTXt", b"\0" + zlib.compress(bytes(2**24), 9) * 3)),
        png(20, 20, extra=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20), 9)) * 900),
        png(20, 20, extra=chunk(b"IHDR", png(4000, 4000)[16:29])),
        many_values(274, 5000),
        into_jpeg(photo(1), *[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 3),
        saved("CMYK", "JPEG")(4500, 4500),
    ],
    ids=[
        "webp-lossless",
        "webp-alpha",
        "png-text",
        "png-profiles",
        "png-two-heads",
        "tiff-values",
        "exif",
        "cmyk",
    ],
)
def test_files_that_may_need_more_than_their_size_are_isolated(data: bytes) -> None:
    assert cost.estimate(data).isolated


def test_usual_metadata_does_not_isolate_a_photo() -> None:
    exif, xmp = Image.Exif(), b"http://ns.adobe.com/xap/1.0/\0" + b"<x/>" * 5000
    exif[0x0112], exif[0x9286] = 6, "a comment" * 1000
    data = into_jpeg(photo(1), segment(0xE1, exif.tobytes()), segment(0xE1, xmp))
    assert not cost.estimate(data).isolated
    xmp_of_png = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"<x/>" * 20_000)
    assert not cost.estimate(png(900, 600, extra=xmp_of_png)).isolated


def test_a_large_image_after_a_small_one_is_decoded() -> None:
    pool = DecoderPool(1)
    request = {
        "max_pixels": 10**8,
        "preprocess": {"background": [1, 2, 3]},
        "too_large": "too large",
    }
    for data in (saved("RGB", "AVIF")(8, 8), saved("RGB", "TIFF")(4000, 3600)):
        memory = cost.estimate(data).bytes
        assert pool.decode(data, request, memory=memory)[0].shape[2] == 3
    pool.close()


def test_a_decoder_process_that_died_between_images_is_replaced() -> None:
    pool = DecoderPool(1)
    data, request = (
        saved("RGB", "AVIF")(30, 20),
        {"max_pixels": 1000, "preprocess": {"background": [1, 2, 3]}, "too_large": "too large"},
    )
    for _ in range(3):
        assert pool.decode(data, request, memory=2**26)[0].shape == (20, 30, 3)
        os.kill(pool._idle[0]._process.pid, signal.SIGKILL)
    pool.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"x" * 70_000,
        b"no json\n",
        b"[]\n",
        b"{}\n",
        *(
            b'{"shape": %s, "applied": [], "mode": "L", "size": [1, 1], "area": [0, 0, 1, 1]}\n'
            % shape
            for shape in (
                b"[100000, 100000, 3]",
                b'["a"]',
                b"[2.5, 1, 3]",
                b"[-1, 5, 3]",
                b"[1, 1, 4]",
            )
        ),
        *(
            b'{"shape": [1, 1, 3], "applied": [], "mode": "L", %s}\nabc' % rest
            for rest in (
                b'"area": [0, 0, 1, 1]',
                b'"size": [1, 1]',
                b'"size": [0, 1], "area": [0, 0, 1, 1]',
                b'"size": [1, 1, 1], "area": [0, 0, 1, 1]',
                b'"size": [1.5, 1], "area": [0, 0, 1, 1]',
                b'"size": [1001, 1], "area": [0, 0, 1, 1]',
                b'"size": 1, "area": [0, 0, 1, 1]',
                b'"size": [1, 1], "area": [0, 0, 2, 1]',
                b'"size": [1, 1], "area": [-1, 0, 1, 1]',
                b'"size": [1, 1], "area": [1, 0, 1, 1]',
                b'"size": [1, 1], "area": [0, 0, NaN, 1]',
                b'"size": [1, 1], "area": [0, 0, Infinity, 1]',
                b'"size": [1, 1], "area": [0, 0, 1]',
                b'"size": [1, 1], "area": ["a", 0, 1, 1]',
                b'"size": [1, 1], "area": [[], 0, 1, 1]',
                b'"size": [1, 1], "area": null',
            )
        ),
        b'{"shape": [1, 1, 3], "applied": [], "mode": "L", "size": [1, 1], "area": [0, 0, 1, 1]}\n'
        b"more than three",
    ],
)
def test_an_answer_of_another_form_is_a_broken_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    program = tmp_path / "python"
    (tmp_path / "answer").write_bytes(answer)
    program.write_text(f"#!/bin/sh\nread line; cat {tmp_path / 'answer'}; sleep 20\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    pool, request = (
        DecoderPool(1),
        {"max_pixels": 1000, "preprocess": {"background": [1, 2, 3]}, "too_large": "too large"},
    )
    with pytest.raises(BrokenImage, match="its decoder gave no answer"):
        pool.decode(b"x", request, memory=2**26, seconds=10)
    assert pool._idle == []


@pytest.mark.parametrize(
    ("compression", "unusual"),
    [(1, False), (5, False), (8, False), (32946, False), (32773, False)]
    + [(one, True) for one in (0, 2, 3, 4, 6, 7, 32771, 32809, 34676, 34925, 50000, 50001, 65000)],
)
def test_tiffs_whose_decoder_prints_or_has_limits_of_its_own_are_isolated(
    compression: int, unusual: bool
) -> None:
    assert cost.estimate(noisy_tiff(compression)).isolated == unusual


def test_a_tiff_may_not_hide_its_compression_behind_a_second_entry() -> None:
    data = noisy_tiff(4)
    entry = data.index(b"\x03\x01\x04\0\1\0\0\0\4")
    assert cost.estimate(data).isolated
    hidden = data[: entry + 12] + b"\x03\x01\x04\0\1\0\0\0\5\0\0\0" + data[entry + 24 :]
    assert cost.estimate(hidden).isolated
    assert cost.estimate(data[: entry + 4] + b"\2" + data[entry + 5 :]).isolated  # two values
