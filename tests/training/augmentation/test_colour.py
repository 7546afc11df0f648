import colorsys
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from tests.support.augmented import COLOUR, channels_last, plain, run, smooth, squares
from training.augmentation import transforms


def test_contrast_and_brightness_are_relative_to_the_mean_of_the_photo():
    picture = smooth(4) * 0.2 + 100  # no clipping
    config = plain(max_lighting=0.1)
    out = run(config, channels_last(picture)).permute(0, 3, 1, 2)
    colour = transforms.draw(config, torch.ones(4), 0, 0).colour
    original = channels_last(picture).permute(0, 3, 1, 2).float()
    mean = original.mean(dim=(1, 2, 3))
    contrast, shift = colour[:, 0], colour[:, 1]
    assert torch.allclose(out.mean(dim=(1, 2, 3)), mean + 255 * shift, atol=1e-2)
    spread = original.std(dim=(1, 2, 3))
    assert torch.allclose(out.std(dim=(1, 2, 3)), contrast * spread, atol=1e-2)


def test_saturation_equals_torchvision():
    picture = channels_last(smooth(4) * 0.3 + 90)
    config = plain(max_saturation=0.5)
    out = run(config, picture).permute(0, 3, 1, 2)
    factors = transforms.draw(config, torch.ones(4), 0, 0).colour[:, 2]
    assert float(factors.max() - factors.min()) > 0.2
    for one, image, factor in zip(out, picture.permute(0, 3, 1, 2), factors, strict=True):
        same = TF.adjust_saturation(image.float() / 255, float(factor)) * 255
        assert torch.allclose(one, same, atol=0.1)  # torchvision's weights have four digits


def test_colour_parameters_and_pixels_stay_in_their_ranges():
    config = plain(max_lighting=0.9, max_saturation=1.0)
    colour = transforms.draw(config, torch.ones(500), 0, 0).colour
    for column, middle, most in ((0, 1, 0.9), (1, 0, 0.9), (2, 1, 1.0)):
        away = colour[:, column] - middle
        assert 0.95 * most < float(away.max()) <= most + 1e-6
        assert -most - 1e-6 <= float(away.min()) < -0.95 * most
    out = run(config, squares(50))
    assert float(out.min()) == 0
    assert float(out.max()) == 255


def test_without_saturation_a_photo_is_grey():
    hue = torch.tensor(colorsys.hsv_to_rgb(0.1, 0.9, 0.8)) * 255
    pixels = hue.round().to(torch.uint8).expand(1, 8, 8, 3)
    params = transforms.AugmentationParams(
        torch.eye(3)[None],
        COLOUR * torch.tensor([1, 1, 0, 1, 1]),
        torch.zeros(1, 4),
        torch.zeros(1).long(),
    )
    out = transforms.apply(pixels, params, plain(max_saturation=1), 8)
    assert float((out.amax(3) - out.amin(3)).max()) < 1e-3


def rotated(picture, share):
    """`picture` with its hue rotated by a share of the colour circle: float32 [N, 3, H, W]."""
    angle = torch.tensor(2 * math.pi * share)
    colour = COLOUR.clone()
    colour[:, 3:] = torch.stack([angle.cos(), angle.sin()])
    return transforms._recolour(picture.clone(), colour, plain(max_hue=0.5))


@pytest.mark.parametrize("share", [1 / 3, -1 / 3, 0.0])
def test_a_hue_rotated_by_thirds_of_a_turn_equals_torchvision(share):
    picture = smooth(4)
    same = TF.adjust_hue(picture / 255, share) * 255
    assert torch.allclose(rotated(picture, share), same, atol=0.1)


@pytest.mark.parametrize("share", [0.02, -0.1, 0.25, -0.5])
def test_the_hue_changes_by_the_share_of_the_circle_and_mean_and_distance_from_grey_stay(share):
    picture = smooth(4) * 0.3 + 90  # no clipping
    out = rotated(picture, share)
    mean = picture.mean(dim=1, keepdim=True)
    assert torch.allclose(out.mean(dim=1, keepdim=True), mean, atol=1e-3)
    assert torch.allclose(out.std(dim=1), picture.std(dim=1), atol=1e-3)
    coloured = (picture.amax(dim=1) - picture.amin(dim=1)).flatten() > 5
    pairs = zip(pixels_of(out)[coloured], pixels_of(picture)[coloured], strict=True)
    turn = np.array([hue(*after) - hue(*before) for after, before in pairs])
    # HSV's hue is an angle on a hexagon, which is up to 1.2 degrees off that on a circle.
    assert np.abs((turn - share + 0.5) % 1 - 0.5).max() < 2.4 / 360


def pixels_of(images):
    return images.permute(0, 2, 3, 1).reshape(-1, 3)


def hue(red, green, blue):
    return colorsys.rgb_to_hsv(float(red), float(green), float(blue))[0]


def test_rotated_hues_are_drawn_evenly_up_to_the_largest_and_grey_stays_grey():
    config = plain(max_hue=0.1)
    colour = transforms.draw(config, torch.ones(500), 0, 0).colour
    share = torch.atan2(colour[:, 4], colour[:, 3]) / (2 * math.pi)
    assert 0.095 < float(share.max()) <= 0.1 + 1e-6
    assert -0.1 - 1e-6 <= float(share.min()) < -0.095
    assert abs(float(share.mean())) < 0.01
    grey = squares(50)[..., :1].expand(-1, -1, -1, 3)
    assert torch.allclose(run(config, grey), grey.float(), atol=1e-3)
    out = run(plain(max_hue=0.5), squares(50))
    assert float(out.min()) == 0
    assert float(out.max()) == 255
