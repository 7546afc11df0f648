"""Bring the labels of photos into one form, and settle those that look alike."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from serving.errors import DataError
from serving.utils.label_names import is_utf8, normalize_label, show_label, similar_labels
from serving.utils.mistakes import Mistakes
from training.config.sections import DataConfig
from training.data.layouts import Photo
from training.utils.console import pluralize, quoted

_REMEDY: Final = "add data.similar=merge to make them one class, or data.similar=keep to keep them"


def settle_classes(
    photos: Sequence[Photo], config: DataConfig, where: object, *, trainable: bool = True
) -> list[Photo]:
    """Return the photos with class names of which no two look alike, unless that is allowed.

    Args:
        photos: Labelled photos.
        config: Data options; `similar` says what is done with names that look alike.
        where: Data folder, for error messages.
        trainable: Whether to refuse names that look alike; else they are kept.

    Raises:
        DataError: A class name can't be encoded as UTF-8; or names look alike and `similar` is
            "refuse".
    """
    photos = [photo._replace(label=normalize_label(photo.label)) for photo in photos]
    counts = Counter(photo.label for photo in photos)
    for name in counts:
        if not is_utf8(name):
            raise DataError(f"class {quoted(name)} is not a UTF-8 name; rename it")
    groups = [] if config.similar == "keep" else similar_labels(counts)
    if config.similar == "merge":
        chosen = {name: max(group, key=lambda n: counts[n]) for group in groups for name in group}
        return [photo._replace(label=chosen.get(photo.label, photo.label)) for photo in photos]
    if not trainable:
        return photos
    wrong = Mistakes(where)
    for group in groups:
        named = [f"{show_label(name)} ({pluralize(counts[name], 'photo')})" for name in group]
        wrong.add(f"classes that look alike: {' and '.join(named)}")
    wrong.check(_REMEDY)
    return photos


def hints(classes: Sequence[str]) -> Iterator[str]:
    """Yield a line for each group of classes that look alike, which training refuses."""
    for group in similar_labels(classes):
        names = " and ".join(map(show_label, group))
        yield f"classes {names} look alike: training refuses; {_REMEDY}"


def common_folder(root: Path, photos: Sequence[Photo]) -> Path:
    """Return the folder that contains `root` and all photos, which a table may name elsewhere."""
    if all(photo.path.is_relative_to(root) for photo in photos):
        return root
    return Path(os.path.commonpath([root, *(photo.path for photo in photos)]))
