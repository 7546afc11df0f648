import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms.functional import five_crop

from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import VIEWS, average, render
from training.augmentation import transforms
from training.config.sections import AugmentConfig, TtaConfig
from training.evaluation import tta


def rows(views=5, photos=6, classes=4, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), (views, photos))


@pytest.mark.parametrize(
    ("kind", "count", "views"),
    [("views", 4, 4), ("views", 10, 10), ("views", 1, 1), ("flip", 4, 2), ("five_crop", 1, 5),
     ("multi_scale", 4, 4), ("draws", 4, 1), ("flip", 0, 1), ("views", 0, 1)],
)  # fmt: skip
def test_the_number_of_views_depends_on_kind_and_count(kind, count, views):
    found = tta.fixed_views(TtaConfig(kind=kind, count=count), Preprocess())
    assert len(found) == len(set(found)) == views
    assert found[0] == VIEWS[0]
    assert tta.random_views(TtaConfig(kind=kind, count=count)) == (count if kind == "draws" else 0)


def test_no_tta_is_the_plain_view():
    assert tta.fixed_views(None, Preprocess()) == VIEWS[:1]
    assert tta.random_views(None) == 0


def test_more_views_than_exist_are_refused():
    with pytest.raises(ValidationError, match=r"count = 11: there are 10 fixed views"):
        TtaConfig(count=11)
    assert TtaConfig(kind="draws", count=11).count == 11


def test_five_crop_equals_torchvisions():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    crops = render(Image.fromarray(image), Preprocess(size=24, crop=0.75), tta.FIXED["five_crop"])
    expected = five_crop(torch.from_numpy(image).permute(2, 0, 1), [24, 24])
    corners = [crop.permute(1, 2, 0).numpy() for crop in expected]
    for view, corner in zip(crops, [corners[4], *corners[:4]], strict=True):
        assert (view == corner).all()


@pytest.mark.parametrize("how", ["mean", "log_mean"])
def test_views_have_equal_weights_by_default(how):
    found = rows()
    combined = tta.combine(found, how)
    for i in range(found.shape[1]):
        assert (combined[i] == average(found[:, i], how)).all()  # bit-identical to the service's
    equal = tta.combine(found, how, plain_weight=1 / len(found))
    assert np.allclose(equal, combined, rtol=1e-12)
    assert np.allclose(tta.combine(found, how, plain_weight=1), found[0])
    assert (tta.combine(found[:1], how, 0.3) == found[0]).all()


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_the_plain_view_has_its_weight(weight):
    found = rows()
    share = (1 - weight) / (len(found) - 1)
    weights = np.array([weight, *[share] * (len(found) - 1)])[:, None, None]
    assert np.allclose(tta.combine(found, "mean", weight), (weights * found).sum(axis=0))
    geometric = np.prod(found**weights, axis=0)
    geometric /= geometric.sum(axis=1, keepdims=True)
    assert np.allclose(tta.combine(found, "log_mean", weight), geometric)


def drawn(config, view=3, seed=1):
    pixels = torch.randint(0, 256, (3, 20, 20, 3), generator=torch.Generator().manual_seed(0))
    aspect = torch.tensor([1.0, 1.5, 0.7])
    pixels = pixels.to(torch.uint8)
    result = tta.draw(pixels, aspect, config, seed=seed, view=view, crop=0.875, size=16)
    return pixels, aspect, result


def test_draws_equal_the_training_augmentation_with_that_seed():
    config = AugmentConfig()
    pixels, aspect, result = drawn(config)
    expected = transforms.apply(
        pixels, transforms.draw(config, aspect, 1, 3, crop=0.875), config, 16
    )
    assert torch.equal(result, expected)
    assert torch.equal(result, drawn(config)[2])
    assert not torch.equal(result, drawn(config, seed=2)[2])
    assert not torch.equal(result, drawn(config, view=4)[2])


def test_draws_are_without_random_erasing():
    assert torch.equal(drawn(AugmentConfig(erase=1.0))[2], drawn(AugmentConfig())[2])
