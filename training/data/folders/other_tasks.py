"""Recognise data sets for detection and segmentation, whose folders are no classes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from serving.errors import DataError
from serving.terminal import quote_path
from serving.utils.regular_files import open_regular
from training.data.folders.part_names import is_container, part_of
from training.data.folders.photo_tree import PhotoFolder

_BOXES: Final = frozenset({"labels", "label", "annotations", "annotation", "bboxes", "boxes"})
"""Folders beside `images/` with a file of boxes for each photo."""
# fmt: off
_MASKS: Final = frozenset([
    "mask", "masks", "annotations", "annotation", "trimaps", "segmentation", "segmentations",
    "segmentationclass", "segmentationobject", "labels", "label", "gt", "groundtruth",
    "ground_truth",
])
# fmt: on
"""Folders beside `images/` with a picture of the outlines for each photo."""
_BOX_FILES: Final = (".txt", ".xml", ".json")
_HEAD: Final = 4096  # bytes
_BOX: Final = re.compile(
    rb"^\s*[0-9]+(?:[ \t]+-?[0-9.eE+-]+){4}|<(?:annotation|object|bndbox)\b|\"bbox|annotations\""
)
"""A line of YOLO, an element of Pascal VOC, a key of COCO."""
_COCO: Final = ".coco.json"

_REMEDY: Final = (
    "Fledge trains classifiers: make a folder per class, or give a label for each photo in a table "
    "(data.csv) or in the file names (data.pattern)"
)


def check_task(root: Path, base: PhotoFolder) -> None:
    """Check that a data set is not one for detection or segmentation.

    Args:
        root: The data folder.
        base: The folder in it in which the classes or parts begin.

    Raises:
        DataError: The photos have boxes or masks in place of classes.
    """
    for folder in (base, *base.sorted_folders):
        if folder is base or part_of(folder.name) or is_container(folder.name):
            _check_folder(root / folder.path, folder)


def _check_folder(where: Path, folder: PhotoFolder) -> None:
    names = {inner.name.casefold(): inner for inner in folder.folders.values()}
    images = [inner for name, inner in names.items() if is_container(name) and inner.total]
    masks = [inner for name, inner in names.items() if name in _MASKS and inner.total]
    if images and masks and len(images) + len(masks) == len(folder.children):
        classes = any(not part_of(inner.name) for inner in images[0].children)
        remedy = f"use {quote_path(where / images[0].name)}" if classes else _REMEDY
        raise DataError(
            f"{where} is a set for segmentation: {masks[0].name}/ has the outlines of what is in "
            f"{images[0].name}/; {remedy}"
        )
    if _has_classes(folder):
        return
    for name, inner in names.items():
        suffix, number = _box_files(where / inner.name, inner)
        if name in _BOXES and not inner.total and (
            number >= folder.total / 2 or (suffix == ".json" and number)
        ):  # fmt: skip
            raise DataError(
                f"{where} is a set for detection: {inner.name}/ has {number} {suffix} files with "
                f"boxes for {folder.total} photos; {_REMEDY}"
            )
    if folder.photos:
        suffix, number = _box_files(where, folder)
        coco = any(name.endswith(_COCO) for name in os.listdir(where))
        if coco or number >= len(folder.photos) * 0.9:
            what = f"a file {_COCO}" if coco else f"{number} {suffix} files with boxes"
            raise DataError(
                f"{where} is a set for detection: it has {what} beside {len(folder.photos)} "
                f"photos; {_REMEDY}"
            )


def _has_classes(folder: PhotoFolder) -> bool:
    """Whether a folder has folders of classes, in it or in its parts or `images/`."""
    stack = [folder]
    while stack:
        for inner in stack.pop().children:
            if not (part_of(inner.name) or is_container(inner.name)):
                return True
            stack.append(inner)
    return False


def _box_files(where: Path, folder: PhotoFolder) -> tuple[str, int]:
    """Return the most frequent suffix of files with boxes, and their number; 0 if they have none.

    One of the files is looked at: captions beside photos are texts, too.
    """
    counts = folder.suffixes()
    suffix = max(_BOX_FILES, key=lambda one: counts[one])
    if not counts[suffix]:
        return suffix, 0
    files = (
        Path(here, name)
        for here, _, names in os.walk(where)
        for name in names
        if name.lower().endswith(suffix)
    )
    path = next(files, None)
    return suffix, counts[suffix] if path and _has_boxes(path) else 0


def _has_boxes(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return not head or bool(_BOX.search(head))
