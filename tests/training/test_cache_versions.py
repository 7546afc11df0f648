"""Versions of cached pixels and activations: changed values need a new version number.

After a change of values: increase `PIXELS_VERSION` or `ACTIVATIONS_VERSION`, run
`python -m tests.training.test_cache_versions`, and commit `cache_versions.json`. After an update of
the libraries only: run it and commit.
"""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from serving.imaging.decode import decode
from serving.imaging.preprocess import Preprocess
from tests.robustness import corpus
from training.activations.frozen_prefix import fused
from training.activations.loaders import run_frozen
from training.activations.stage_loaders import ACTIVATIONS_VERSION
from training.augmentation import transforms
from training.config.sections import AugmentConfig
from training.models.classifier import normalise
from training.pixels import transform
from training.pixels.transform import PixelTransform
from training.utils.device import CPU
from training.utils.precision import Precision

RECORDED = Path(__file__).with_name("cache_versions.json")
SIZE = 32
CONFIGS = {
    "plain": AugmentConfig(),
    "strong": AugmentConfig(
        crop="random",
        flip="dihedral",
        max_rotate=20,
        max_zoom=1.2,
        max_lighting=0.3,
        max_saturation=0.4,
        max_warp=0.2,
        erase=1.0,
    ),
    "hue": AugmentConfig(preset="none", max_hue=0.2),
    "policy": AugmentConfig(policy="trivial_augment"),
}


def pixel_values() -> dict[str, list]:
    """Image and part -> digest of the pixels, and the mean of each channel."""
    found: dict[str, list] = {}
    pixel_transforms = [
        PixelTransform(part, Preprocess(size=SIZE), 1.25) for part in ("train", "valid")
    ]
    for item in corpus.items():
        if item.code:
            continue
        image = decode(item.data).image
        for pixel_transform in pixel_transforms:
            pixels = pixel_transform.to_square(image)
            means = [round(float(mean), 1) for mean in pixels.mean(axis=(0, 1))]
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
            found[f"{item.name} {pixel_transform.part}"] = [digest, means]
    return found


def activation_values() -> dict[str, list[float]]:
    """Augmentation -> outputs of a small frozen network, in float32."""
    ramp = np.arange(2 * 40 * 40 * 3, dtype=np.int64).reshape(2, 40, 40, 3)
    pixels = torch.from_numpy((ramp * ramp // 7 % 256).astype(np.uint8))
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6()).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            wave = torch.arange(parameter.numel(), dtype=torch.float64).sin()
            parameter.copy_(wave.reshape(parameter.shape))
    preprocess, found = Preprocess(size=SIZE), {}
    for name, config in CONFIGS.items():
        params = transforms.draw(config, torch.tensor([1.0, 1.5]), 3, 1, crop=preprocess.crop)
        images = normalise(transforms.apply(pixels, params, config, SIZE), preprocess)
        maps = run_frozen(fused(network), images, Precision(torch.float32, CPU))
        means = torch.nn.functional.adaptive_avg_pool2d(maps.float(), 2).flatten()
        found[name] = [round(value, 5) for value in means.tolist()]
    return found


def recorded() -> dict:
    return json.loads(RECORDED.read_text())


def test_changed_pixels_have_a_new_version() -> None:
    known, values = recorded()["pixels"], pixel_values()
    assert known["version"] == transform.PIXELS_VERSION
    assert known["values"].keys() == values.keys()
    same = known["libraries"] == transform._versions()
    changed = []
    for name, (digest, means) in values.items():
        digest_then, means_then = known["values"][name]
        # Some encoders may write different files on different processors.
        exact = same and not any(kind in name for kind in ("avif", "heic", "jxl-lossy"))
        near = np.abs(np.subtract(means, means_then)).max() < 3
        if not near or (exact and digest != digest_then):
            changed.append(name)
    assert changed == [], "increase PIXELS_VERSION and record the values: see the head of this file"


def test_changed_activations_have_a_new_version() -> None:
    known, values = recorded()["activations"], activation_values()
    assert known["version"] == ACTIVATIONS_VERSION
    assert known["values"].keys() == values.keys()
    for name, value in values.items():
        assert np.allclose(value, known["values"][name], atol=2e-3), name


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    RECORDED.write_text(
        json.dumps(
            {
                "pixels": {
                    "version": transform.PIXELS_VERSION,
                    "libraries": transform._versions(),
                    "values": pixel_values(),
                },
                "activations": {
                    "version": ACTIVATIONS_VERSION,
                    "values": activation_values(),
                },
            },
            separators=(",", ":"),
        )
        + "\n"
    )
