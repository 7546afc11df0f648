"""The text of every refusal of `decode` and `read`, and what `read` passes on."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from pathlib import Path
from typing import Any

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
from serving.imaging import decode as decode_module
from serving.imaging.cost import Cost
from serving.imaging.decode import decode, read
from serving.imaging.isolated import DecoderPool
from serving.imaging.preprocess import Preprocess
from tests.robustness import plugin_formats

FORMATS = "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIC, JPEG XL"
MEMORY = "decoding 20 x 10 pixels needs more memory than this process can have"


def png(mode: str = "RGB", size: tuple[int, int] = (20, 10), colour: Any = 0) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        (b"", {}, EmptyBody, "it is empty: 0 bytes, where an image should be"),
        (b"hello", {}, NotAnImage, f"no image that Fledge reads ({FORMATS})"),
        (b"%PDF-1.7", {}, UnsupportedFormat, f"PDF is not read; use one of {FORMATS}"),
        (
            b"RIFF\0\0\0\0WEBP",
            {},
            BrokenImage,
            "the image is broken: of WEBP, but cut short or of an unknown kind",
        ),
        (
            png(),
            {"max_pixels": 199},
            TooLarge,
            "20 x 10 pixels are more than the 199 allowed (FLEDGE_MAX_PIXELS)",
        ),
        (png()[:44], {}, BrokenImage, "the image is broken: image file is truncated"),
    ],
)
def test_refused_data(
    data: bytes, options: dict[str, int], kind: type[FledgeError], message: str
) -> None:
    with pytest.raises(kind) as refused:
        decode(data, **options)
    assert type(refused.value) is kind
    assert str(refused.value).startswith(message)


def test_an_image_of_too_many_pixels_is_refused_with_its_size_and_the_limit() -> None:
    with pytest.raises(TooLarge, match=r"^20 x 10 pixels are more than the 199 allowed \("):
        decode(png(), max_pixels=199)
    assert decode(png(), max_pixels=200).image.size == (20, 10)


@pytest.mark.parametrize("step", ["_load", "_read_orientation"])
def test_a_lack_of_memory_is_an_image_that_is_too_large(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(decode_module, step, fail)
    with pytest.raises(TooLarge, match=f"^{MEMORY}$"):
        decode(png())


def test_a_picture_that_pillow_takes_for_a_bomb_is_refused_with_its_size_and_the_limit() -> None:
    chunk = b"IHDR" + struct.pack(">II", 20_000, 20_000) + png()[24:29]
    head = png()[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    with pytest.raises(TooLarge) as refused:
        decode_module.decode_here(head + png()[33:], max_pixels=1000)
    assert str(refused.value) == (
        "400000000 pixels are more than the 1000 allowed (FLEDGE_MAX_PIXELS)"
    )


def test_an_image_that_needs_more_memory_than_it_states_is_refused_with_size_and_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoded in a process of its own: no other text comes from there."""
    file = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(file, "JPEG", progressive=True)
    monkeypatch.setattr(decode_module, "memory_limit", lambda *_: 2**20)
    with pytest.raises(TooLarge) as refused:
        decode(file.getvalue())
    assert str(refused.value) == (
        "decoding 5000 x 5000 pixels needs more than the 1 MB that such a file should need; save "
        "it anew"
    )


def test_threads_of_the_image_before_leave_no_memory_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(file, "JPEG", progressive=True)
    monkeypatch.setattr(decode_module, "decoders", DecoderPool(1))
    decode(plugin_formats.heic(Image.new("RGB", (3000, 3000))))
    monkeypatch.setattr(decode_module, "memory_limit", lambda *_: 2**20)
    with pytest.raises(TooLarge, match="needs more than the 1 MB"):
        decode(file.getvalue())


def test_each_limit_of_memory_is_told_with_what_raises_it() -> None:
    message = decode_module.memory_message
    known, unknown = Cost(300, 200, 2**30), Cost(unusual=True)
    assert message(known, 2**29, "FLEDGE_MAX_MEMORY") == (
        "decoding 300 x 200 pixels needs more than the 512 MB allowed (FLEDGE_MAX_MEMORY)"
    )
    assert message(unknown, 2**29) == (
        "decoding the image, whose size can't be read beforehand, needs more than the 512 MB "
        "allowed (FLEDGE_MAX_PIXELS)"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (KeyError(), "KeyError"),
        (OSError("x" * 121), "x" * 120),
        (OSError("y" * 120), "y" * 120),
    ],
)
def test_the_reason_is_one_short_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    for owner, step in ((decode_module, "_load"), (Image, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, fail)
            with pytest.raises(BrokenImage) as refused:
                decode(png())
        assert str(refused.value) == f"the image is broken: {reason}"


def test_a_file_is_read_with_the_options(tmp_path: Path) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(png("RGBA", colour=(0, 0, 0, 0)))
    assert (np.asarray(read(path).image) == 255).all()
    found = read(path, preprocess=Preprocess(background=(1, 2, 3)), max_pixels=200)
    assert (np.asarray(found.image) == (1, 2, 3)).all()
    assert found.applied == ("alpha-on-background",)
    with pytest.raises(TooLarge, match="than the 199 allowed"):
        read(path, max_pixels=199)


def test_a_file_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, message in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "no regular"),
    ):
        with pytest.raises(BrokenImage, match=f"^{message}"):
            read(path)
    path = tmp_path / "file"
    path.write_bytes(png())

    def fail(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(BrokenImage, match=r"^Input/output error$"):
        read(path)
