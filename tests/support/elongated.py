"""Elongated photos: an object near one end of a picture of 3 : 1, on a background without classes.

`python -m tests.support.elongated OUT [PHOTOS]` writes such a set, of painted flowers or of the
photos of a folder with a folder for each class.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training.data import sample

RATIO = 3
SIDE = 160  # short side in pixels


def painted(per_class: int, seed: int = 0, side: int = SIDE) -> dict[str, list[Image.Image]]:
    """Return painted flowers of each class."""
    return {
        name: [
            sample.paint(name, np.random.default_rng([seed, number, i]), side)
            for i in range(per_class)
        ]
        for number, name in enumerate(sample.CLASSES)
    }


def write(root: Path, objects: Mapping[str, Sequence[Image.Image]], side: int = SIDE) -> Path:
    """Paste every object into a picture of its own: `root/CLASS/0000.jpg`.

    Every second picture is upright. An object is as high as 0.9 of the short side, and begins up to
    0.3 of the short side from one end, so that the centre square shows at most 0.2 of its width.
    """
    for number, (name, images) in enumerate(objects.items()):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            rng = np.random.default_rng([number, i])
            canvas = _background(rng, (RATIO * side, side))
            high = round(0.9 * side)
            middle = min(image.size)
            left, top = (image.width - middle) // 2, (image.height - middle) // 2
            object_ = image.crop((left, top, left + middle, top + middle)).resize((high, high))
            gap = int(rng.integers(0, round(0.3 * side)))
            at_start = rng.integers(0, 2) == 0
            x = gap if at_start else canvas.width - gap - high
            y = int(rng.integers(0, side - high))
            if i % 2:  # upright: the object stays as it is, the picture is turned
                canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
                x, y = y, x
            canvas.paste(object_, (x, y))
            canvas.save(root / name / f"{i:04d}.jpg", quality=92)
    return root


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    coarse = Image.fromarray(rng.integers(60, 200, (3, 5, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    noise = rng.normal(0, 8, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def _photos(folder: Path, classes: int, per_class: int) -> dict[str, list[Image.Image]]:
    names = sorted(path for path in folder.iterdir() if path.is_dir())[:classes]
    found = {}
    for name in names:
        files = sorted(name.glob("*.jpg"))[:per_class]
        found[name.name] = [Image.open(path).convert("RGB") for path in files]
    return found


if __name__ == "__main__":
    out, *given = map(Path, sys.argv[1:])
    write(out, _photos(given[0], 5, 60) if given else painted(40), 240 if given else SIDE)
