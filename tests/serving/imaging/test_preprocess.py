import json

import numpy as np
import pytest
from PIL import Image

from serving.errors import OptionError
from serving.imaging.preprocess import Preprocess

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("width", "height", "crop", "size"),
    [(64, 64, 0.875, 28), (64, 64, 0.875, 56), (160, 64, 0.75, 24), (64, 96, 1.0, 128)],
)
def test_the_plain_view_equals_pillow_resize_then_centre_crop(
    width: int, height: int, crop: float, size: int, interpolation: str
) -> None:
    """As in the usual evaluation: resize the whole image, then crop its centre.

    Cropping first would differ at the edges, where the filter reaches beyond the box.
    """
    image = scene(width, height)
    scale = size / (min(width, height) * crop)
    wide, high = round(width * scale), round(height * scale)
    left, top = (wide - size) // 2, (high - size) // 2
    resized = image.resize((wide, high), FILTERS[interpolation])
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    assert np.array_equal(Preprocess(size, crop, interpolation)(image), expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [8, 32, 100])
def test_a_square_without_crop_equals_pillow_resize(size: int, interpolation: str) -> None:
    image = scene(64, 64)
    expected = np.asarray(image.resize((size, size), FILTERS[interpolation]))
    assert np.array_equal(Preprocess(size, 1.0, interpolation)(image), expected)


def test_away_from_the_edges_cropping_first_is_the_same() -> None:
    image = scene(160, 64)
    square = image.crop((56, 8, 104, 56)).resize((24, 24), Image.Resampling.BILINEAR)
    actual = Preprocess(24, 0.75)(image)
    assert np.array_equal(actual[1:-1, 1:-1], np.asarray(square)[1:-1, 1:-1])


def test_a_square_of_the_right_size_is_unchanged() -> None:
    image = scene(32, 32)
    assert np.array_equal(Preprocess(32, crop=1.0)(image), np.asarray(image))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 900), (900, 1), (7, 5), (33, 97)])
def test_any_image_size_gives_a_uint8_square(width: int, height: int) -> None:
    for crop in (0.1, 1 / 3, 0.875, 1.0):
        pixels = Preprocess(16, crop)(scene(width, height))
        assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)


def test_the_box_is_centred_within_the_image() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        width, height = rng.integers(1, 3000, 2).tolist()
        left, top, right, bottom = Preprocess(crop=float(rng.uniform(0.01, 1))).box(
            (0, 0, width, height)
        )
        assert left == pytest.approx(width - right)
        assert top == pytest.approx(height - bottom)
        assert right - left == pytest.approx(bottom - top)
        assert min(left, top) >= 0


def test_from_dict_is_the_inverse_of_to_dict_through_json() -> None:
    for preprocess in (
        Preprocess(),
        Preprocess(96, 1.0, "lanczos", (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), (0, 1, 255)),
    ):
        again = Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict())))
        assert again == preprocess
        assert hash(again) == hash(preprocess)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 7),
        ("size", 4097),
        ("size", 224.0),
        ("size", "224"),
        ("size", None),
        ("crop", 0),
        ("crop", 1.01),
        ("crop", float("nan")),
        ("crop", "0.875"),
        ("interpolation", "nearest"),
        ("interpolation", None),
        ("mean", (0.5, 0.5)),
        ("mean", 0.5),
        ("mean", "abc"),
        ("mean", (0.5, 0.5, float("inf"))),
        ("std", (0.2, 0.2, 0)),
        ("std", (0.2, 0.2, float("nan"))),
        ("background", (256, 0, 0)),
        ("background", (0.5, 0, 0)),
        ("background", "white"),
    ],
)
def test_a_bad_value_is_named_with_its_field(field: str, value: object) -> None:
    with pytest.raises(OptionError, match=rf"^preprocess\.{field} = "):
        Preprocess.from_dict({field: value})


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(OptionError, match="widht"):
        Preprocess.from_dict({"size": 32, "widht": 3})
