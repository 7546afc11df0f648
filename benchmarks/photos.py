"""JPEGs of the sizes that people send, made from given photos: thumbnails, 2 and 12 megapixels.

A given photo is cropped to the shape, enlarged, and gets camera noise: normal, of the same
deviation in all channels. With it the files have the bytes of real ones (about 50 kB, 0.5 and
2.6 MB); without it an enlarged photo has a third of them and decodes faster. The files are as
phones write them: baseline, 4:2:0, quality 90. Two of five photos of 2 and 12 megapixels are stored
turned, with the EXIF orientation that says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps

GIVEN: Final = "given"
"""The kind of photos that are sent as they are."""
NOISE: Final = 4.0
"""Standard deviation of the noise, of 255."""
QUALITY: Final = 90
_ROWS: Final = 256  # the noise is added by strips of as many rows
_EXIF_ORIENTATION: Final = 0x0112
_TURNED: Final = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}
"""By EXIF orientation, how an upright image is stored."""


@dataclass(frozen=True)
class Kind:
    """Photos of one size. orientations: EXIF orientations of the photos, in turn."""

    width: int
    height: int
    orientations: tuple[int, ...] = (1,)

    def __str__(self) -> str:
        turned = sum(orientation != 1 for orientation in self.orientations)
        text = f"{self.width} x {self.height} px"
        return f"{text}, {turned} of {len(self.orientations)} turned by EXIF" if turned else text


_AS_PHONES_HOLD: Final = (1, 6, 1, 3, 1)
KINDS: Final = {
    "thumbnail": Kind(480, 360),
    "2mp": Kind(1632, 1224, _AS_PHONES_HOLD),
    "12mp": Kind(4032, 3024, _AS_PHONES_HOLD),
}

NAMES: Final = (GIVEN, *KINDS)
"""The names of --kinds."""
HELP: Final = (
    f"comma-separated: {GIVEN} (default: the photos as they are); made from them, each in a race "
    f"of its own: {', '.join(KINDS)}"
)


def settings(kind: str) -> dict[str, str]:
    """What settings.json has of a kind; nothing for photos as they are."""
    return {} if kind == GIVEN else {"kind": f"{kind}, {KINDS[kind]}"}


def describe(settings: Mapping[str, str]) -> str:
    """Number, kind and mean size of the photos of a race, by its settings.json."""
    count = int(settings["photos"].split(",")[0])
    parts = [f"{count} JPEGs"]
    parts += [settings["kind"].partition(", ")[2]] if "kind" in settings else []
    parts += [f"{int(settings['bytes']) / count / 1000:.0f} kB each"] if "bytes" in settings else []
    return ", ".join(parts)


def folder_of(kind: str, out: Path) -> Path:
    """The folder of a kind's results: `out` itself for photos as they are."""
    return out if kind == GIVEN else out / kind


def prepare(given: Sequence[Path], kind: str, out: Path) -> list[Path]:
    """The photos of a kind: those given, or files made from them in `out`/made, or made before."""
    return list(given) if kind == GIVEN else make_all(given, KINDS[kind], out / "made")


def make_all(sources: Sequence[Path], kind: Kind, folder: Path) -> list[Path]:
    """Make a JPEG of each source, or reuse the files of an earlier call with the same sources."""
    paths = [folder / f"{number:05}.jpg" for number in range(len(sources))]
    complete = folder.with_suffix(".whole")
    content = "\n".join(map(str, [kind, NOISE, QUALITY, *sources]))
    if complete.exists() and complete.read_text() == content:
        return paths
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def write(number: int) -> None:
        orientation = kind.orientations[number % len(kind.orientations)]
        make(sources[number], (kind.width, kind.height), paths[number], orientation, seed=number)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(len(sources))))
    complete.write_text(content)
    return paths


def make(
    source: Path, size: tuple[int, int], path: Path, orientation: int = 1, seed: int = 0
) -> None:
    """Write the JPEG of a source.

    Args:
        source: Any photo.
        size: Width and height as stored; the shape that the photo is cropped to.
        path: Of the JPEG.
        orientation: EXIF orientation of the JPEG: 1, 3 or 6, with which it is stored on its side.
        seed: Of the noise.
    """
    upright = size[::-1] if orientation == 6 else size
    with Image.open(source) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image = ImageOps.fit(image, upright, Image.Resampling.LANCZOS)
    if orientation != 1:
        image = image.transpose(_TURNED[orientation])
    pixels, random = np.array(image), np.random.default_rng(seed)
    for start in range(0, len(pixels), _ROWS):
        strip = pixels[start : start + _ROWS]
        noise = random.standard_normal((*strip.shape[:2], 1), dtype=np.float32)
        strip[:] = np.clip(strip + NOISE * noise + 0.5, 0, 255).astype(np.uint8)
    exif = Image.Exif()
    if orientation != 1:
        exif[_EXIF_ORIENTATION] = orientation
    Image.fromarray(pixels).save(
        path, "JPEG", quality=QUALITY, subsampling="4:2:0", exif=exif if len(exif) else b""
    )


def is_turned(path: Path) -> bool:
    """Whether EXIF says that the photo is stored turned or mirrored."""
    with Image.open(path) as image:
        return image.getexif().get(_EXIF_ORIENTATION, 1) != 1
