import colorsys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

RECIPE = """
name = "tiny"
arch = "mobilenet_v2"
weights = "none"
batch_size = 8
precision = "fp32"
arch_args = {{ width_mult = 0.25 }}
preprocess = {{ size = 32, crop = 1.0 }}
head = {{ hidden = 16, dropout = 0.1 }}
{stages}
"""
STAGE = '[[stage]]\nname = "all"\nunfreeze = "all"\nlr = 0.05\ncycle_len = {epochs}\n'
SHORT = STAGE.format(epochs=3)
TWO_STAGES = """
[[stage]]
name = "head"
lr = 0.01
cycle_len = 2
[[stage]]
name = "tail"
unfreeze = 1
lr = 0.01
cycle_len = 3
"""


def coloured(root, counts, side=40):
    """Write photos of one hue per class: a task that a network learns in seconds."""
    for number, (name, count) in enumerate(counts.items()):
        rng = np.random.default_rng(number)
        colour = np.array(colorsys.hsv_to_rgb(number / len(counts), 0.8, 0.8)) * 255
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.normal(0, 25, (side, side + i % 5, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg", quality=90)
    return root


@pytest.fixture
def photos(tmp_path):
    return coloured(tmp_path / "photos", {"blue": 15, "green": 15, "red": 15})


@pytest.fixture
def recipe(tmp_path):
    """Writes a small recipe; returns its path."""

    def write(stages=SHORT):
        path = tmp_path / "tiny.toml"
        path.write_text(RECIPE.format(stages=stages))
        return path

    return write


@pytest.fixture
def weights(tmp_path):
    """A file of pretrained weights for the recipe's network."""
    torch.manual_seed(0)
    path = tmp_path / "w.pth"
    torch.save(torchvision.models.mobilenet_v2(width_mult=0.25).state_dict(), path)
    return path


@pytest.fixture
def two_stages():
    """Stages that share frozen layers: the head, then head and last layer group."""
    return TWO_STAGES
