import numpy as np
import pytest
from PIL import Image

from serving.errors import OptionError
from serving.imaging.preprocess import FITS, Preprocess
from serving.imaging.tta import VIEWS, View, average, count_views, render, softmax

RNG = np.random.default_rng(0)
SCENE = Image.fromarray(RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8))


def draw(rows: int, classes: int = 5) -> np.ndarray:
    return softmax(RNG.normal(scale=4, size=(rows, classes)).astype(np.float32))


def test_the_first_view_is_the_plain_one() -> None:
    for preprocess in (Preprocess(32), Preprocess(48, 1.0, "lanczos")):
        rendered = render(SCENE, preprocess, VIEWS)
        assert (rendered.shape[0], rendered.dtype) == (len(VIEWS), np.uint8)
        assert rendered.shape[1:] == (preprocess.size, preprocess.size, 3)
        assert np.array_equal(rendered[0], preprocess(SCENE))


def test_the_first_n_views_are_the_first_n_of_all() -> None:
    everything = render(SCENE, Preprocess(32), VIEWS)
    for n in range(1, len(VIEWS)):
        assert np.array_equal(render(SCENE, Preprocess(32), VIEWS[:n]), everything[:n])


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_flip_is_an_involution(view: View) -> None:
    one = view._replace(flip=False)
    pair = render(SCENE, Preprocess(32), (one, one._replace(flip=True)))
    assert np.array_equal(pair[0], pair[1][:, ::-1])
    assert not np.array_equal(pair[0], pair[1])


def test_views_have_unique_names_and_pixels() -> None:
    assert len({view.name for view in VIEWS}) == len(VIEWS)
    rendered = render(SCENE, Preprocess(32), VIEWS)
    assert len({pixels.tobytes() for pixels in rendered}) == len(VIEWS)


def test_corner_views_show_their_corners() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:4, :4], pixels[:4, -4:], pixels[-4:, :4], pixels[-4:, -4:] = 50, 100, 150, 200
    corners = {"top-left": 50, "top-right": 100, "bottom-left": 150, "bottom-right": 200}
    for name, level in corners.items():
        view = next(view for view in VIEWS if view.name.startswith(name))
        seen = render(Image.fromarray(pixels), Preprocess(56, 0.875), (view,))[0]
        assert set(np.unique(seen)) == {0, level}


def test_zoom_is_the_ratio_of_the_sides() -> None:
    """A view of zoom z equals the plain view with crop / z, limited by the image."""
    for zoom in (0.9, 1.15, 2.0):
        seen = render(SCENE, Preprocess(32, 0.8), (View("x", zoom=zoom),))[0]
        assert np.array_equal(seen, Preprocess(32, 0.8 / zoom)(SCENE))
    widest = render(SCENE, Preprocess(32, 0.8), (View("x", zoom=0.1),))[0]
    assert np.array_equal(widest, Preprocess(32, 1.0)(SCENE))


def test_every_view_of_any_image_size_can_be_rendered() -> None:
    for _ in range(100):
        width, height = RNG.integers(1, 400, 2).tolist()
        crop = float(RNG.uniform(0.05, 1))
        rendered = render(Image.new("RGB", (width, height)), Preprocess(8, crop), VIEWS)
        assert rendered.shape == (len(VIEWS), 8, 8, 3)


def test_count_views_takes_zero_and_one_as_plain() -> None:
    counts = [count_views(tta, VIEWS) for tta in range(len(VIEWS) + 1)]
    assert counts == [1, 1, *range(2, len(VIEWS) + 1)]


@pytest.mark.parametrize("tta", [-1, len(VIEWS) + 1, 1000])
def test_more_views_than_there_are_is_a_wrong_option(tta: int) -> None:
    with pytest.raises(OptionError, match=f"tta = {tta}: .* {len(VIEWS)} views"):
        count_views(tta, VIEWS)


@pytest.mark.parametrize("how", ["mean", "log_mean"])
def test_averages_are_distributions_that_ignore_the_order(how: str) -> None:
    for rows in (1, 2, 7):
        probabilities = draw(rows)
        mean = average(probabilities, how)
        assert mean.sum() == pytest.approx(1, abs=1e-12)
        assert (mean >= 0).all()
        assert average(probabilities[::-1], how) == pytest.approx(mean, abs=1e-12)
        same = np.repeat(probabilities[:1], rows, axis=0)
        assert average(same, how) == pytest.approx(probabilities[0], abs=1e-9)


def test_means_are_the_arithmetic_and_the_geometric() -> None:
    probabilities = draw(4)
    assert average(probabilities) == pytest.approx(probabilities.mean(axis=0), abs=1e-12)
    geometric = np.prod(probabilities, axis=0) ** 0.25
    assert average(probabilities, "log_mean") == pytest.approx(geometric / geometric.sum())


def test_log_mean_is_finite_for_contradicting_certain_views() -> None:
    certain = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    mean = average(certain, "log_mean")
    assert mean == pytest.approx([0.5, 0.5, 0], abs=1e-5)


def test_another_average_is_a_wrong_option() -> None:
    with pytest.raises(OptionError, match="median"):
        average(draw(2), "median")


def test_softmax_is_invariant_to_shifts_and_finite_for_huge_logits() -> None:
    logits = RNG.normal(scale=5, size=(6, 4)).astype(np.float32)
    probabilities = softmax(logits)
    assert probabilities.dtype == np.float64
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-12)
    assert softmax(logits + np.float32(8)) == pytest.approx(probabilities, abs=1e-5)
    huge = np.array([[3e38, -3e38, 0]], np.float32)
    assert softmax(huge).tolist() == [[1, 0, 0]]
    assert (probabilities.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_temperature_divides_the_logits() -> None:
    logits = RNG.normal(size=(3, 4)).astype(np.float32)
    assert softmax(logits * 2, 2.0) == pytest.approx(softmax(logits))
    assert softmax(logits, 1e6) == pytest.approx(np.full((3, 4), 0.25), abs=1e-5)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 300_000), (200_000, 2)], ids=str)
def test_a_view_of_any_zoom_and_any_place_is_a_square(fit: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    for crop in (1e-300, 1.0):
        preprocess = Preprocess(size=8, crop=crop, fit=fit, background=(200, 0, 0))
        for zoom in (1e-320, 1e-9, 0.5, 3, 1e6, 1e300):
            for x, y in ((0, 0), (0.5, 0.5), (1, 1), (0, 1)):
                pixels = render(image, preprocess, [View("any", zoom=zoom, x=x, y=y)])[0]
                assert pixels.shape == (8, 8, 3)
                colours = set(map(tuple, pixels.reshape(-1, 3).tolist()))
                assert colours <= {(10, 20, 30), (200, 0, 0)}
                assert fit == "pad" or colours == {(10, 20, 30)}


def test_a_view_far_from_the_corner_shows_what_is_there() -> None:
    """Pillow's boxes are float32, which has one digit behind the point at 10 million."""
    rows = np.zeros((3_000_001, 1, 3), np.uint8)
    rows[::2] = 255
    image = Image.fromarray(rows)
    plain = Preprocess(size=8, crop=1.0, interpolation="bilinear")(image)
    assert np.array_equal(plain, np.full((8, 8, 3), rows[1_500_000, 0, 0]))
