"""Two datasets that torchvision downloads; `--data` takes their names.

- `flowers102`: Nilsback & Zisserman, 2008, "Automated Flower Classification over a Large Number of
  Classes"; 102 classes. Training, validation and test split are the official ones.
- `oxford-iiit-pet`: Parkhi et al., 2012, "Cats and Dogs"; 37 breeds. The test split is the official
  one. The validation split is drawn at random from the remaining photos.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from serving.errors import DataError
from serving.utils.files import make_user_cache_folder, user_cache_folder
from training.data.layouts import Photo


def find(name: str) -> tuple[Path, list[Photo]]:
    """Return the folder of a dataset in the user's cache, and the photos of the dataset.

    The dataset is downloaded at first use.

    Args:
        name: One of `NAMES`.

    Raises:
        DataError: The dataset can't be downloaded or read, or photos are missing. The message
            contains the folder and a remedy.
    """
    folder, read = _SETS[name]
    cache = user_cache_folder()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is reserved for results
            photos = read(make_user_cache_folder())
    except (OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--data {name}: {cache / folder} can't be read or downloaded: {reason}; check the "
            "network, or put torchvision's copy there; if the folder exists, it is damaged: "
            "remove it"
        ) from error
    root = (cache / folder).resolve()
    missing = [photo.path for photo in photos if not photo.path.is_file()]
    if missing:
        raise DataError(
            f"--data {name}: {len(missing)} of {len(photos)} photos are missing, for example "
            f"{missing[0]}; remove {root} to download it again"
        )
    return root, [
        photo._replace(path=root / photo.path.relative_to(cache / folder)) for photo in photos
    ]


def _flowers102(cache: Path) -> list[Photo]:
    from torchvision.datasets import Flowers102

    names = getattr(Flowers102, "classes", [str(i + 1) for i in range(102)])
    photos: list[Photo] = []
    for split, part in (("train", "train"), ("val", "valid"), ("test", "test")):
        found: Any = Flowers102(cache, split, download=True)
        pairs = zip(found._image_files, found._labels, strict=True)
        photos += [Photo(Path(path), names[label], part) for path, label in pairs]
    return photos


def _pets(cache: Path) -> list[Photo]:
    from torchvision.datasets import OxfordIIITPet

    photos: list[Photo] = []
    for split, part in (("trainval", ""), ("test", "test")):
        found: Any = OxfordIIITPet(cache, split, download=True)
        pairs = zip(found._images, found._labels, strict=True)
        photos += [Photo(Path(path), found.classes[label], part) for path, label in pairs]
    return photos


_SETS: Final[dict[str, tuple[str, Callable[[Path], list[Photo]]]]] = {
    "flowers102": ("flowers-102", _flowers102),
    "oxford-iiit-pet": ("oxford-iiit-pet", _pets),
}

NAMES: Final = tuple(_SETS)
