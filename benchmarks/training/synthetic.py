"""Generated photos, for timings on a machine without a photo data set."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

CLASSES: Final = 10
FOLDS: Final = 5
SIDES: Final = (500, 375)  # pixels


def write(folder: Path, count: int) -> tuple[Path, Path]:
    """Write `count` JPEG files, one folder per class; returns the folder and a CSV of 5 folds.

    Existing files are kept. A photo is a smooth pattern in its class's colour with noise, and about
    as large as a photograph's file.
    """
    split = folder.with_suffix(".csv")
    names = [f"class{i % CLASSES}/{i:06}.jpg" for i in range(count)]
    for number in range(CLASSES):
        (folder / f"class{number}").mkdir(parents=True, exist_ok=True)

    def write_photo(index: int) -> None:
        path = folder / names[index]
        if path.exists():
            return
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 255, (6, 8, 3), np.uint8)
        coarse[..., index % 3] //= 1 + index % CLASSES
        smooth = Image.fromarray(coarse).resize(SIDES, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (SIDES[1], SIDES[0], 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=85)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write_photo, range(count)))
    with split.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["path", "fold"])
        out.writerows((name, i // CLASSES % FOLDS) for i, name in enumerate(names))
    return folder, split
