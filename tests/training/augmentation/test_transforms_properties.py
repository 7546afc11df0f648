"""Laws of the random crops, flips and erased rectangles, for any options and shapes of photos."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.imaging.preprocess import Preprocess
from tests.support.hypothesis_profiles import examples
from training.augmentation.transforms import ERASED_AREA, AugmentationParams, apply, draw
from training.config.sections import AugmentConfig

ASPECTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6).map(torch.tensor)
SEEDS = st.integers(0, 2**32 - 1)
VIEWS = st.integers(0, 1000)
CORNERS = torch.tensor([[x, y, 1.0] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])


@st.composite
def crops(draw: st.DrawFn, **fixed: object) -> AugmentConfig:
    """Options that only crop and flip: no rotation, shift or perspective."""
    scale = sorted((draw(st.floats(0.01, 1)), draw(st.floats(0.01, 1))))
    options: dict[str, object] = {
        "preset": "none",
        "crop": draw(st.sampled_from(["random", "center"])),
        "flip": draw(st.sampled_from(["none", "horizontal", "dihedral"])),
        "scale": tuple(scale),
        "ratio": draw(st.floats(1, 2)),
        "max_zoom": draw(st.floats(1, 10)),
    }
    return AugmentConfig.model_validate(options | fixed)


def boxes(params: AugmentationParams, aspect: torch.Tensor) -> torch.Tensor:
    """Left, top, right and bottom of each crop in units of the photo's short side, [N, 4]."""
    corners = (params.warp.double() @ CORNERS.double().T)[:, :2]  # [N, 2, 4], in [-1, 1]
    sides = torch.stack([aspect.clamp(min=1), (1 / aspect).clamp(min=1)], dim=1).double()
    places = (corners + 1) / 2 * sides[..., None]
    return torch.cat([places.amin(dim=2), places.amax(dim=2)], dim=1)


@given(crops(), ASPECTS, SEEDS, VIEWS)
@examples(100)
def test_a_crop_lies_inside_the_photo(config, aspect, seed, view) -> None:
    params = draw(config, aspect, seed, view)
    found = boxes(params, aspect)
    width, height = aspect.clamp(min=1), (1 / aspect).clamp(min=1)
    # In float32, relative to the photo's longest side.
    tolerance = 1e-5 * float(torch.maximum(width, height).max())
    assert (found[:, :2] >= -tolerance).all()
    assert (found[:, 2] <= width + tolerance).all()
    assert (found[:, 3] <= height + tolerance).all()
    size = found[:, 2:] - found[:, :2]
    area = size.prod(dim=1)
    assert (area <= config.scale[1] + 100 * tolerance).all()
    ratio = size.amax(dim=1) / size.amin(dim=1)
    # A side that the photo is too short for is cut, so the ratio may be larger than asked for.
    if config.scale[1] * config.ratio <= 1:
        assert (ratio <= config.ratio + 1e-2).all()


@given(
    st.integers(8, 60), st.integers(8, 60), st.floats(0.1, 1), SEEDS, VIEWS,
    st.sampled_from(["none", "horizontal"]),
)  # fmt: skip
@examples(60)
def test_a_centre_crop_is_that_of_the_preprocessing(width, height, share, seed, view, flip) -> None:
    config = AugmentConfig(preset="none", crop="center", flip=flip)
    aspect = torch.tensor([width / height])
    (box,) = boxes(draw(config, aspect, seed, view, crop=share), aspect)
    expected = Preprocess(crop=share).box((0, 0, width, height))
    assert (box * min(width, height)).tolist() == pytest.approx(expected, abs=1e-3)


@given(st.floats(0, 1), st.integers(1, 50), SEEDS, VIEWS)
@examples(60)
def test_an_erased_rectangle_is_inside_and_of_the_stated_area(erase, count, seed, view) -> None:
    config = AugmentConfig(preset="none", erase=erase)
    left, top, right, bottom = draw(config, torch.ones(count), seed, view).hole.T
    erased = right > 0
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (torch.maximum(right, bottom) <= 1 + 1e-6).all()
    area = ((right - left) * (bottom - top))[erased]
    assert (area >= ERASED_AREA[0] - 1e-6).all()
    assert (area <= ERASED_AREA[1] + 1e-6).all()
    assert erase or not erased.any()


@given(
    st.sampled_from(["none", "basic", "side_on", "top_down", "photo"]),
    st.lists(st.floats(0.2, 5), min_size=2, max_size=5),
    SEEDS,
    VIEWS,
    st.data(),
)
@examples(30)
def test_a_view_depends_on_its_photo_alone(preset, aspects, seed, view, data) -> None:
    """Not on the other photos, the batch, or the order of drawing."""
    config = AugmentConfig(preset=preset)
    aspect = torch.tensor(aspects)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(aspects), 12, 12, 3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    whole = draw(config, aspect, seed, view)
    images = apply(pixels, whole, config, 8)
    assert images.shape == (len(aspects), 8, 8, 3)
    assert images.isfinite().all()
    assert 0 <= images.min() <= images.max() <= 255
    at = data.draw(st.integers(0, len(aspects) - 1))
    others = aspect.flip(0)
    others[at] = aspect[at]
    again = draw(config, others, seed, view)
    assert (again.warp[at] == whole.warp[at]).all()
    picked = torch.tensor([at])
    assert (apply(pixels[picked], whole[picked], config, 8)[0] == images[at]).all()
