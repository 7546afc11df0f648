"""Scaled decoding shows the same picture as full decoding, in the same place, for every turn."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.Image import Transpose

from serving.imaging import colours, decode, reduced
from serving.imaging.preprocess import DECODES, FITS, REDUCED, Pixels, Preprocess
from serving.imaging.tta import render, views_for
from tests.support.hypothesis_profiles import examples
from tests.support.tiny_bundle import photo

ORIENTATION = 0x0112
# Odd sizes, of which none is a multiple of what they are reduced by.
SIZES = ((1003, 757), (509, 1021), (1201, 407))
OPTIONS = {"JPEG": {"quality": 95}, "PNG": {"compress_level": 1}, "WEBP": {"method": 0}}
MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"),
    *("I;16", "I", "F"),
)


def scene(width: int, height: int) -> Image.Image:
    """Smooth random colours, so that a shift by a pixel of the reduced image can be measured."""
    grid = (max(2, height // 40), max(2, width // 40), 3)
    noise = np.random.default_rng(0).integers(0, 256, grid, np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, orientation: int = 1) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    image.save(file, kind, exif=exif.tobytes(), **OPTIONS[kind])
    return file.getvalue()


def difference(one: Pixels, other: Pixels) -> float:
    """The mean absolute difference, of 255."""
    return float(np.abs(one.astype(int) - other).mean())


def shifted(image: Image.Image, x: int, y: int) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("fit", FITS)
def test_a_reduced_picture_is_not_shifted_whatever_its_orientation(kind: str, fit: str) -> None:
    full = Preprocess(32, fit=fit)
    scaled = replace(full, decode="scaled")
    orientations = range(1, 9) if kind == "JPEG" else (1, 5, 8)
    for size, orientation in itertools.product(SIZES, orientations):
        data = encoded(scene(*size), kind, orientation)
        whole = decode.decode(data, preprocess=full)
        small = decode.decode(data, preprocess=scaled)
        assert whole.size == small.size == whole.image.size
        assert whole.area == (0, 0, *whole.size)
        reduction = scaled.reduction(*whole.size)
        assert reduction >= 5
        applied = ("exif-orientation",) if orientation > 1 else ()
        assert whole.applied == small.applied == applied
        # The image is smaller, and no pixel of it is beside the picture.
        scale = round(small.size[0] / (small.area[2] - small.area[0]))
        assert reduction / 2 < scale <= reduction
        for axis in (0, 1):
            assert small.image.size[axis] == -(-small.size[axis] // scale)
            start, end = small.area[axis], small.area[axis + 2]
            assert end - start == pytest.approx(small.size[axis] / scale)
            assert 0 <= start < 1
            assert small.image.size[axis] - 1 < end <= small.image.size[axis]
        seen, told = full(whole.image, whole.area), scaled(small.image, small.area)
        error = difference(seen, told)
        assert error < 1.2, (size, orientation)
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            moved = full(shifted(whole.image, reduction * x, reduction * y))
            assert difference(moved, told) > 5 * error, (size, orientation, x, y)


def test_without_its_area_a_reduced_picture_would_be_shifted() -> None:
    """The control of the test above: an error of a part of a pixel is found."""
    full = Preprocess(32)
    scaled = replace(full, decode="scaled")
    data = encoded(scene(1003, 757), "JPEG", 3)
    whole, small = (decode.decode(data, preprocess=one) for one in (full, scaled))
    right = difference(full(whole.image), scaled(small.image, small.area))
    assert difference(full(whole.image), scaled(small.image)) > 4 * right


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("fit", FITS)
def test_small_photos_are_decoded_as_before(kind: str, fit: str) -> None:
    """Where the part that is seen is below four times the size, nothing is reduced, to the bit."""
    data = encoded(scene(121, 111), kind, 6)
    full = Preprocess(32, fit=fit)
    whole = decode.decode(data, preprocess=full)
    small = decode.decode(data, preprocess=replace(full, decode="scaled"))
    assert whole.image.tobytes() == small.image.tobytes()
    assert (whole.area, whole.size, whole.mode) == (small.area, small.size, small.mode)


@given(
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.integers(8, 400),
    st.floats(0.05, 1),
    st.sampled_from(FITS),
)
@examples(200)
def test_the_reduction_is_the_largest_that_keeps_twice_the_size(width, height, size, crop, fit):
    preprocess = Preprocess(size, crop, decode="scaled", fit=fit)
    reduction = preprocess.reduction(width, height)
    assert reduction == preprocess.reduction(height, width) >= 1
    left, top, right, bottom = preprocess.box((0, 0, width, height))
    # What is seen, without padding; "squish" and "crop" look at the shorter side of it.
    seen = max(right - left, bottom - top) if fit == "pad" else min(right - left, bottom - top)
    if reduction > 1:
        assert seen / reduction >= REDUCED * size - 1e-6
    if reduction < min(width, height):
        assert seen / (reduction + 1) < REDUCED * size + 1e-6
    assert replace(preprocess, decode="full").reduction(width, height) == 1


@pytest.mark.parametrize("turn", Transpose)
def test_a_box_is_where_its_pixels_are_after_a_transposition(turn: Transpose) -> None:
    image = Image.new("L", (9, 5))
    box = (1, 2, 4, 3)
    image.paste(255, box)
    turned = image.transpose(turn)
    assert turned.getbbox() == reduced.transpose_box(box, image.size, turn)
    assert (turned.size == image.size) == (turn not in reduced.SWAPPED)


def profile_of(mode: str) -> bytes | None:
    if mode == "RGB":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return None


def of_mode(mode: str, width: int = 61, height: int = 47) -> Image.Image:
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (height, width, 4), np.uint8)
    rgba = Image.fromarray(noise)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), np.uint16))
    if mode == "I":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), np.int32))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), np.float32))
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), noise[..., :3].tobytes())
    if mode in ("P", "PA"):
        return rgba.convert("RGB").quantize(17).convert(mode)
    if mode in ("La", "LA"):
        return rgba.convert("LA").convert(mode)
    return rgba.convert(mode) if mode in ("RGBA", "RGBa") else rgba.convert("RGB").convert(mode)


@pytest.mark.parametrize("reduction", [2, 3, 7])
@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_converting_by_strips_equals_converting_the_whole_and_reducing_it(
    mode: str, key: bool, reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = of_mode(mode)
    if key and mode in ("1", "L", "P", "RGB", "I;16"):  # formats state a colour in these modes
        image.info["transparency"] = image.getpixel((3, 3))
    if profile := profile_of(mode):
        image.info["icc_profile"] = profile
    told: list[str] = []
    expected = colours.to_rgb(image.copy(), (9, 90, 200), told).reduce(reduction)
    # Strips of one, of a few and of all rows.
    for strip in (1, 61 * 13, 2**20):
        monkeypatch.setattr(colours, "STRIP", strip)
        applied: list[str] = []
        actual = colours.to_rgb(image.copy(), (9, 90, 200), applied, reduction)
        assert actual.mode == "RGB"
        assert actual.tobytes() == expected.tobytes()
        assert set(applied) == set(told)


@pytest.mark.parametrize(("fit", "scale"), [*itertools.product(FITS, DECODES)])
def test_a_decoder_process_gives_the_same_pixels(fit: str, scale: str) -> None:
    preprocess = Preprocess(32, decode=scale, fit=fit, background=(1, 2, 3))
    data = encoded(Image.open(io.BytesIO(photo(1, (701, 403)))), "JPEG", 7)
    here = decode.decode(data, preprocess=preprocess)
    request = {"max_pixels": 10**6, "preprocess": preprocess.to_dict(), "too_large": "too large"}
    there = decode.decoders.decode(data, request, memory=2**27)
    assert (there.applied, there.size, there.area) == (here.applied, here.size, here.area)
    assert there.pixels.tobytes() == here.image.tobytes()
    views = views_for(preprocess)
    cut = decode.decoders.decode(data, request | {"views": views}, memory=2**27)
    assert (cut.pixels == render(here.image, preprocess, views, here.area)).all()
