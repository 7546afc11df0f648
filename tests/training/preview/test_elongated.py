"""Photos of 3 : 1 with objects near their ends: what each fit shows of them, and the hint."""

import numpy as np
import pytest
from PIL import Image

import fledge
from serving.imaging.decode import read
from serving.imaging.preprocess import Preprocess
from tests.support import elongated

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230)}
SIDE = 60


@pytest.fixture
def photos(tmp_path):
    """Squares of one colour in place of photographed objects."""
    objects = {name: [Image.new("RGB", (9, 9), rgb)] * 24 for name, rgb in COLOURS.items()}
    return elongated.write(tmp_path / "photos", objects, SIDE)


def of_object(pixels, rgb):
    """The share of pixels that have the object's colour."""
    near = np.abs(pixels.astype(int) - rgb).max(axis=2) < 25
    return near.mean()


def test_the_centre_crop_shows_little_of_the_objects_and_the_other_fits_show_all(photos):
    shares = {}
    for fit in ("crop", "squish", "pad"):
        preprocess = Preprocess(size=96, crop=1.0, fit=fit)
        found = []
        for path in photos.rglob("*.jpg"):
            photo = read(path, preprocess=preprocess)
            found.append(of_object(preprocess(photo.image, photo.area), COLOURS[path.parent.name]))
        shares[fit] = found
    assert max(shares["crop"]) < 0.21
    assert np.median(shares["crop"]) < 0.1
    assert min(shares["squish"]) > 0.23  # 0.9 * 0.9 / 3 of the picture
    assert min(shares["pad"]) > 0.07  # a third of that


@pytest.mark.process
def test_preview_says_that_the_crop_cuts_them_off(photos, tmp_path, capsys):
    words = ["preview", str(photos), "--out", str(tmp_path / "out")]
    assert fledge.main(words) == 0
    output = capsys.readouterr().out
    assert "hint: 72 of 72 photos lose over a third of their area to the centre crop, 67%" in output
    for fit in ("squish", "pad"):
        assert fledge.main([*words, f"preprocess.fit={fit}"]) == 0
        assert "centre crop" not in capsys.readouterr().out
