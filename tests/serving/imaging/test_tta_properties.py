"""Laws of the views and crops, for any image, crop share and view that a manifest may have."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serving.imaging.preprocess import Box, Pixels, Preprocess
from serving.imaging.tta import VIEWS, View, average, energies, render, softmax, views_for
from tests.support.hypothesis_profiles import examples

SIDES = st.integers(1, 70)
SHARES = st.floats(0, 1)
CROPS = st.floats(1e-6, 1)
LEAST = 2**-40  # pixels of the side of a box


@dataclass(frozen=True)
class RecordingPreprocess(Preprocess):
    """Preprocessing that also keeps the boxes that it cuts."""

    boxes: list[Box] = field(default_factory=list)

    def cut(self, image: Image.Image, box: Box, area: Box | None = None) -> Pixels:
        self.boxes.append(box)
        return super().cut(image, box, area)


def preprocesses(**fixed: object) -> st.SearchStrategy[RecordingPreprocess]:
    options: dict[str, st.SearchStrategy[object]] = {
        "size": st.integers(8, 20),
        "crop": CROPS,
        "interpolation": st.sampled_from(["bilinear", "bicubic", "lanczos"]),
    }
    return st.builds(RecordingPreprocess, **options | fixed)


def views() -> st.SearchStrategy[View]:
    zooms = st.sampled_from([0.9, 1.0, 1.15, 1.3]) | st.floats(0.01, 100)
    any_view = st.builds(View, st.just("v"), zooms, SHARES, SHARES, st.booleans())
    return st.sampled_from(VIEWS) | any_view


def images() -> st.SearchStrategy[Image.Image]:
    def noise(width: int, height: int, seed: int) -> Image.Image:
        rng = np.random.default_rng(seed)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    return st.builds(noise, SIDES, SIDES, st.integers(0, 9))


@given(images(), preprocesses(), views())
@examples(150)
def test_a_view_is_a_square_inside_the_image(image, preprocess, view) -> None:
    pixels = render(image, preprocess, [view])
    assert pixels.shape == (1, preprocess.size, preprocess.size, 3)
    assert pixels.dtype == np.uint8
    ((left, top, right, bottom),) = preprocess.boxes
    short = min(image.size)
    side = max(min(short * preprocess.crop / view.zoom, short), LEAST)
    assert (right - left, bottom - top) == pytest.approx((side, side), abs=1e-9)
    # Pillow rounds a box to float32, in which a position has an error of up to 1e-5 here.
    assert min(left, top) >= 0
    assert right <= image.width + 1e-9
    assert bottom <= image.height + 1e-9
    # The free space is divided as the view's position says.
    assert left == pytest.approx((image.width - side) * view.x, abs=1e-9)
    assert top == pytest.approx((image.height - side) * view.y, abs=1e-9)


@given(images(), preprocesses())
@examples(60)
def test_the_fixed_views_cover_the_edges_and_lie_inside_one_another(image, preprocess) -> None:
    render(image, preprocess, VIEWS)
    boxes = dict(zip((view.name for view in VIEWS), preprocess.boxes, strict=True))
    width, height = image.size
    corners = [
        (boxes["top-left"][:2], (0, 0)),
        ((boxes["top-right"][2], boxes["top-right"][1]), (width, 0)),
        ((boxes["bottom-left-flip"][0], boxes["bottom-left-flip"][3]), (0, height)),
        (boxes["bottom-right-flip"][2:], (width, height)),
    ]
    for corner, expected in corners:
        assert corner == pytest.approx(expected, abs=1e-9)
    wide, plain, close = (np.array(boxes[name]) for name in ("wide", "plain", "close"))
    for outer, inner in ((wide, plain), (plain, close)):
        assert (outer[:2] <= inner[:2] + 1e-9).all()
        assert (outer[2:] >= inner[2:] - 1e-9).all()
    for name in ("plain", "wide", "close"):
        assert boxes[name] == pytest.approx(mirrored(boxes[name], width, height), abs=1e-9)
    if preprocess.crop == 1:
        assert plain[2] - plain[0] == min(width, height)


def mirrored(box: Box, width: int, height: int) -> Box:
    left, top, right, bottom = box
    return (width - right, height - bottom, width - left, height - top)


@given(images(), preprocesses(), views())
@examples(60)
def test_a_flipped_view_is_the_mirror_image(image, preprocess, view) -> None:
    one, other = render(image, preprocess, [view, view._replace(flip=not view.flip)])
    assert (one == other[:, ::-1]).all()
    # Views of an image do not depend on the other views that are rendered with them.
    assert (render(image, preprocess, [view])[0] == one).all()


@given(SIDES, SIDES, preprocesses(), views(), st.tuples(*[st.integers(0, 255)] * 3))
@examples(60)
def test_an_image_of_one_colour_stays_of_one_colour(
    width, height, preprocess, view, colour
) -> None:
    pixels = render(Image.new("RGB", (width, height), colour), preprocess, [view])
    assert (pixels == colour).all()


FIT = st.sampled_from(["squish", "pad"])
COLOUR = st.tuples(*[st.integers(0, 255)] * 3)


@given(images(), preprocesses(fit=FIT, background=COLOUR), views())
@examples(150)
def test_a_view_of_the_whole_picture_is_inside_it_and_its_padding(image, preprocess, view) -> None:
    pixels = render(image, preprocess, [view])
    assert pixels.shape == (1, preprocess.size, preprocess.size, 3)
    ((left, top, right, bottom),) = preprocess.boxes
    width, height = image.size
    outer = (0.0, 0.0, float(width), float(height))
    if preprocess.fit == "pad":
        side = max(width, height)
        outer = (
            *((width - side) / 2, (height - side) / 2),
            *((width + side) / 2, (height + side) / 2),
        )
    for axis, position in ((0, view.x), (1, view.y)):
        box, whole = (left, top, right, bottom)[axis::2], outer[axis::2]
        side = max((whole[1] - whole[0]) / max(view.zoom, 1), LEAST)
        assert box[1] - box[0] == pytest.approx(side, abs=1e-9)
        free = whole[1] - whole[0] - side
        assert box[0] == pytest.approx(whole[0] + free * position, abs=1e-9)
        assert whole[0] - 1e-9 <= box[0]
        assert box[1] <= whole[1] + 1e-9


@given(images(), preprocesses(fit=FIT))
@examples(60)
def test_the_views_of_the_whole_picture_differ_and_cover_its_corners(image, preprocess) -> None:
    fixed = views_for(preprocess)
    assert fixed[:2] == VIEWS[:2]
    assert [view.name for view in fixed] == [view.name for view in VIEWS if "wide" not in view.name]
    assert fixed == views_for(preprocess, fixed)
    render(image, preprocess, fixed)
    assert len(set(zip(preprocess.boxes, (view.flip for view in fixed), strict=True))) == len(fixed)
    boxes = dict(zip((view.name for view in fixed), preprocess.boxes, strict=True))
    whole = boxes["plain"]
    for name, at in (("top-left", (0, 1)), ("bottom-right-flip", (2, 3)), ("top-right", (2, 1))):
        assert [boxes[name][i] for i in at] == pytest.approx([whole[i] for i in at], abs=1e-9)
    # Together the corners show all of the picture.
    assert boxes["top-left"][2] > boxes["top-right"][0]
    assert boxes["top-left"][3] > boxes["bottom-left-flip"][1]


@given(preprocesses())
@examples(10)
def test_the_views_of_a_crop_are_all_views(preprocess) -> None:
    assert views_for(preprocess) == VIEWS
    assert views_for(preprocess, VIEWS[:3]) == VIEWS[:3]


@given(SIDES, SIDES, preprocesses(fit=st.just("pad"), background=COLOUR), views(), COLOUR)
@examples(60)
def test_padding_is_of_the_background_exactly(width, height, preprocess, view, colour) -> None:
    pixels = render(Image.new("RGB", (width, height), colour), preprocess, [view])
    padding = (pixels == preprocess.background).all(axis=3)
    assert (padding | (pixels == colour).all(axis=3)).all()


LOGITS = st.lists(
    st.lists(st.floats(-1000, 1000, width=32), min_size=3, max_size=3), min_size=1, max_size=5
).map(lambda rows: np.array(rows, np.float32))


@given(LOGITS, st.floats(0.05, 20), st.sampled_from(["mean", "log_mean"]))
@examples(100)
def test_averaged_probabilities_are_probabilities_between_those_of_the_views(
    logits, temperature, how
) -> None:
    probabilities = softmax(logits, temperature)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(len(logits)))
    best = probabilities[np.arange(len(logits)), logits.argmax(axis=1)]
    assert (best == probabilities.max(axis=1)).all()
    mean = average(probabilities, how)
    assert mean.sum() == pytest.approx(1)
    assert (mean >= 0).all()
    assert average(probabilities[::-1], how) == pytest.approx(mean)
    assert average(probabilities[:1], how) == pytest.approx(probabilities[0], abs=1e-11)
    if how == "mean":
        assert (mean >= probabilities.min(axis=0) - 1e-12).all()
        assert (mean <= probabilities.max(axis=0) + 1e-12).all()
    # The energy is a smooth minimum of the negative logits, and shifts with them.
    energy = energies(logits)
    assert (energy <= -logits.max(axis=1) + 1e-6).all()
    assert (energy >= -logits.max(axis=1) - np.log(3) - 1e-6).all()
