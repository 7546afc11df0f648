"""The decoder: formats, errors, limits. tests/robustness has unusual files and their pixels."""

import contextlib
import io
import os
import random
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.errors import (
    BrokenImage,
    EmptyBody,
    FledgeError,
    NotAnImage,
    TooLarge,
    UnsupportedFormat,
)
from serving.imaging import decode, deep_samples, formats
from serving.imaging.preprocess import Preprocess
from tests.robustness import icc_profiles
from tests.support.tiny_bundle import photo

RNG = np.random.default_rng(0)
SCENE = RNG.integers(0, 256, (10, 20, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode.decode(data).image)


def as_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array)


def every_format() -> dict[str, bytes]:
    scene = as_image(SCENE)
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    return {kind: encode(scene, kind, **lossless.get(kind, {})) for kind in formats.FORMATS}


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header that promises width x height pixels, with next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_every_served_format_gives_rgb_pixels(kind: str) -> None:
    decoded = decode.decode(every_format()[kind])
    assert decoded.image.mode == "RGB"
    assert decoded.image.size == (20, 10)
    assert decoded.applied == ()
    if kind in ("PNG", "WEBP", "BMP", "TIFF"):
        assert np.array_equal(np.asarray(decoded.image), SCENE)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_scaling_in_strips_equals_scaling_at_once(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    deep = rng.integers(0, 65536, (37, 23)).astype(np.uint16)
    wide = deep.astype(np.int32) * 3 - 90_000
    image = {
        "I;16": lambda: Image.fromarray(deep),
        "I;16B": lambda: Image.frombytes("I;16B", (23, 37), deep.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(wide),
        "F": lambda: Image.fromarray(wide.astype(np.float32)),
    }[mode]()
    assert image.mode == mode
    samples = np.asarray(image, np.float64)
    low, high = 0.0, 65535.0
    if mode in ("I", "F"):
        low, high = samples.min(), samples.max()
    expected = np.rint((samples - low) * (255.0 / (high - low))).astype(np.uint8)
    monkeypatch.setattr(deep_samples, "_STRIP", 100)
    scaled = np.asarray(deep_samples.scale(image))
    assert np.array_equal(scaled, expected)
    assert sum(len(strip) for _, strip in deep_samples._strips(image)) == 37  # each row once


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparent_pixels_are_blended_with_the_background(kind: str, alpha: int) -> None:
    image = Image.new("RGBA", (8, 8), (200, 40, 0, alpha))
    data = encode(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    for background in ((255, 255, 255), (0, 10, 20)):
        decoded = decode.decode(data, preprocess=Preprocess(background=background))
        share = alpha / 255
        expected = [
            round(share * front + (1 - share) * back)
            for front, back in zip((200, 40, 0), background, strict=True)
        ]
        off = np.abs(np.asarray(decoded.image, int) - expected).max()
        assert off <= 1
        if decoded.applied == ():
            # An opaque WebP has no alpha channel.
            assert (kind, alpha) == ("WEBP", 255)
        else:
            assert decoded.applied == ("alpha-on-background",)


def test_a_color_profile_does_not_change_the_background() -> None:
    image = Image.new("RGBA", (8, 8), (200, 40, 0, 0))
    data = encode(image, "PNG", icc_profile=icc_profiles.rgb())
    decoded = decode.decode(data, preprocess=Preprocess(background=(9, 90, 200)))
    assert decoded.applied == ("alpha-on-background", "icc-to-srgb")
    assert (np.asarray(decoded.image) == (9, 90, 200)).all()


def test_the_name_of_a_file_is_ignored(tmp_path: Path) -> None:
    for kind, data in every_format().items():
        for suffix in (".jpg", ".png", ".txt", ""):
            path = tmp_path / f"{kind}{suffix}"
            path.write_bytes(data)
            assert np.array_equal(np.asarray(decode.read(path).image), pixels(data))


def test_an_unreadable_file_is_a_broken_image_without_its_name_in_the_message(
    tmp_path: Path,
) -> None:
    with pytest.raises(BrokenImage, match=r"^No such file or directory$"):
        decode.read(tmp_path / "missing.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path):  # opening a pipe would block
        with pytest.raises(BrokenImage, match="no regular file"):
            decode.read(path)


def test_zero_bytes_raise_empty_body() -> None:
    with pytest.raises(EmptyBody, match="it is empty"):
        decode.decode(b"")


@pytest.mark.parametrize("data", [b"hello", b"\0" * 100, b"<html></html>", b"BMW", photo(0)[2:]])
def test_bytes_that_are_no_image_raise_not_an_image(data: bytes) -> None:
    with pytest.raises(NotAnImage, match=r"no image that Fledge reads \(JPEG, .*AVIF.*\)"):
        decode.decode(data)


UNSUPPORTED = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "PSD": encode(Image.new("RGB", (4, 4)), "TIFF").replace(b"II*\0", b"8BPS", 1),
    "PDF": b"%PDF-1.7\n",
    "ICO": encode(Image.new("RGB", (16, 16)), "ICO"),
    "DDS": encode(Image.new("RGB", (4, 4)), "DDS"),
    "JPEG 2000": encode(Image.new("RGB", (4, 4)), "JPEG2000"),
    "PNM": encode(Image.new("RGB", (4, 4)), "PPM"),
    "PCX": encode(Image.new("RGB", (4, 4)), "PCX"),
}
SVGS = (
    b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="1" height="1"/>',
    b'\xef\xbb\xbf<!DOCTYPE svg PUBLIC "x" "y">\n<svg>',
)


@pytest.mark.parametrize(
    ("name", "data"), [*UNSUPPORTED.items(), *(("SVG", data) for data in SVGS)]
)
def test_a_format_that_is_not_served_is_named(name: str, data: bytes) -> None:
    with pytest.raises(UnsupportedFormat, match=name):
        decode.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP"])
def test_a_truncated_image_is_broken_at_any_length(kind: str) -> None:
    data = every_format()[kind]
    # Some formats end with bytes without pixels; BMP's signature is too short to recognise.
    for length in range(14 if kind != "BMP" else 60, len(data) * 9 // 10, 7):
        with pytest.raises(BrokenImage, match=r"^the image is broken: "):
            decode.decode(data[:length])


def test_more_pixels_than_allowed_are_refused_before_decoding() -> None:
    # Decoding any of these would fail with BrokenImage.
    with pytest.raises(TooLarge, match="1000 x 1001"):
        decode.decode(bomb(1000, 1001), max_pixels=1_000_000)
    with pytest.raises(BrokenImage):
        decode.decode(bomb(1000, 1000), max_pixels=1_000_000)
    for side in (10_001, 30_000, 2**31 - 1):
        with pytest.raises(TooLarge):
            decode.decode(bomb(side, side))


def test_the_pixel_cap_is_inclusive() -> None:
    data = encode(as_image(SCENE), "PNG")
    assert decode.decode(data, max_pixels=200).image.size == (20, 10)
    with pytest.raises(TooLarge):
        decode.decode(data, max_pixels=199)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_corrupt_bytes_raise_only_fledge_errors(kind: str) -> None:
    rng = random.Random(kind)
    intact = every_format()[kind]
    for _ in range(150):
        data = bytearray(intact)
        for _ in range(rng.randint(1, 6)):
            near = min(len(data), 300 if rng.random() < 0.7 else len(data))
            data[rng.randrange(near)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        # Any other exception fails the test.
        with contextlib.suppress(FledgeError):
            assert decode.decode(bytes(data), max_pixels=1_000_000).image.mode == "RGB"


def test_plug_in_errors_other_than_os_errors_are_broken_images() -> None:
    animated = encode(as_image(SCENE), "GIF", save_all=True, append_images=[as_image(SCENE // 2)])
    second = animated.index(b",", animated.index(b",") + 1)
    with pytest.raises(BrokenImage):  # struct.error inside
        decode.decode(animated[: second + 4])
    avif = bytearray(every_format()["AVIF"])
    at = avif.index(b"av1C")
    avif[at : at + 4] = b"free"
    with pytest.raises(BrokenImage):  # RuntimeError inside
        decode.decode(bytes(avif))


def test_decoding_in_threads_does_not_change_the_warning_filters() -> None:
    before = list(warnings.filters)
    data = [photo(seed) for seed in range(20)]
    threads = [
        threading.Thread(target=lambda: [decode.decode(item) for item in data]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
