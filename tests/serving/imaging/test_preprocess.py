import json

import numpy as np
import pytest
from PIL import Image

from serving.errors import OptionError
from serving.imaging.preprocess import DECODES, FITS, Preprocess

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


ODD_SIZES = [(1, 1), (1, 900), (900, 1), (7, 5), (33, 97), (300, 100), (100, 300), (64, 64)]


@pytest.mark.parametrize(("width", "height"), ODD_SIZES)
def test_squish_shows_the_whole_image_as_pillow_resizes_it(width: int, height: int) -> None:
    image = scene(width, height)
    for crop in (0.5, 1.0):  # has no effect
        actual = Preprocess(32, crop, fit="squish")(image)
        assert np.array_equal(actual, image.resize((32, 32), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("width", "height"), ODD_SIZES)
def test_pad_shows_the_whole_image_in_proportion_within_the_background(
    width: int, height: int
) -> None:
    # Colours that the background is not, so that every pixel of it is known.
    image = Image.fromarray(np.asarray(scene(width, height)) // 2)
    background = (200, 255, 130)
    for size in (32, 33):
        preprocess = Preprocess(size, 0.5, background=background, fit="pad")
        left, top, right, bottom = preprocess.box((0, 0, width, height))
        assert right - left == bottom - top == max(width, height)
        assert (left + right, top + bottom) == (width, height)
        actual = preprocess(image)
        assert actual.shape == (size, size, 3)
        outside = (actual == background).all(axis=2)
        rows, columns = np.flatnonzero(~outside.all(1)), np.flatnonzero(~outside.all(0))
        # The picture is a rectangle in the middle, in proportion up to half a pixel at each edge.
        wide, tall = len(columns), len(rows)
        assert outside.sum() == size**2 - wide * tall
        for start, length, side in ((columns[0], wide, width), (rows[0], tall, height)):
            assert length == pytest.approx(max(1, size * side / max(width, height)), abs=1)
            assert start + length / 2 == pytest.approx(size / 2, abs=0.5)
        inside = actual[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert np.array_equal(inside, image.resize((wide, tall), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("fit", FITS)
def test_a_square_image_is_seen_whole_by_every_fit(fit: str) -> None:
    image = scene(50, 50)
    expected = image.resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(Preprocess(32, 1.0, fit=fit)(image), expected)


@pytest.mark.parametrize("fit", FITS)
def test_what_lies_beside_the_area_is_no_part_of_the_picture(fit: str) -> None:
    """Parts of the last column and row of a reduced image lie beside the picture."""
    preprocess = Preprocess(16, 1.0, fit=fit)
    image = Image.new("RGB", (300, 150), (10, 20, 30))
    image.paste((250, 0, 0), (200, 0, 300, 150))
    image.paste((250, 0, 0), (0, 100, 300, 150))
    seen = preprocess(image, (0, 0, 200, 100))
    # The filter reaches beyond the edge by less than one pixel of the result.
    inner = seen[5:11, 1:-1] if fit == "pad" else seen[1:-1, 1:-1]
    assert (inner == (10, 20, 30)).all()
    right = seen[8, -1] if fit != "crop" else (10, 20, 30)
    assert right[0] < 130


def test_a_view_of_the_padding_alone_is_of_the_background() -> None:
    preprocess = Preprocess(16, fit="pad", background=(1, 2, 3))
    area = (0, 0, 90, 10)
    pixels = preprocess.cut(scene(90, 10), preprocess.box(area, zoom=5, x=0.5, y=0.0), area)
    assert (pixels == (1, 2, 3)).all()


def test_fields_that_mean_what_was_before_are_left_out() -> None:
    """So that checkpoints, bundles and their versions are what they were."""
    old = {"size", "crop", "interpolation", "mean", "std", "background"}
    assert Preprocess().to_dict().keys() == old
    assert Preprocess(decode="scaled").to_dict().keys() == old | {"decode"}
    assert Preprocess(fit="pad").to_dict().keys() == old | {"fit"}
    assert Preprocess.from_dict({"size": 32}) == Preprocess(32, decode="full", fit="crop")


def test_from_dict_is_the_inverse_of_to_dict_through_json() -> None:
    for preprocess in (
        Preprocess(),
        *(Preprocess(64, decode=decode, fit=fit) for decode in DECODES for fit in FITS),
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
        ("decode", "draft"),
        ("decode", None),
        ("fit", "stretch"),
        ("fit", ["pad"]),
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
