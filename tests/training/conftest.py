import colorsys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

# [expansion, channels, repeats, stride]: MobileNetV2 with 5 blocks in place of 17, one of them a
# residual block, and with the five layer groups 0..1, 2, 3..4, 5..6 and the head.
BLOCKS = [[1, 16, 1, 1], [6, 24, 1, 2], [6, 32, 2, 2], [6, 64, 1, 2]]
RECIPE = """
name = "tiny"
arch = "mobilenet_v2"
weights = "none"
batch_size = 8
precision = "fp32"
arch_args = {{ width_mult = 0.25, inverted_residual_setting = {blocks} }}
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


def recipe_text(stages):
    """A recipe for the small network."""
    return RECIPE.format(stages=stages, blocks=BLOCKS)


def small_network():
    """The network of the recipe as torchvision builds it, with random weights."""
    return torchvision.models.mobilenet_v2(width_mult=0.25, inverted_residual_setting=BLOCKS)


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
        path.write_text(recipe_text(stages))
        return path

    return write


@pytest.fixture
def weights(tmp_path):
    """A file of pretrained weights for the recipe's network."""
    torch.manual_seed(0)
    path = tmp_path / "w.pth"
    torch.save(small_network().state_dict(), path)
    return path


@pytest.fixture
def two_stages():
    """Stages that share frozen layers: the head, then head and last layer group."""
    return TWO_STAGES
