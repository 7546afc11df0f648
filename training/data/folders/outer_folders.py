"""Recognise folders that are no classes although photos are below them: sets, years, sites."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from serving.errors import DataError
from serving.terminal import quote_path
from training.data.folders.label_hints import labels_hint
from training.data.folders.part_names import part_of
from training.data.folders.photo_tree import PhotoFolder
from training.data.folders.structure_result import Structure
from training.data.label_table import SUFFIXES
from training.data.other_labels import find_other_labels
from training.utils.console import quoted

_STRAY: Final = 0.1
"""Largest share of photos beside the folders in a folder that is still taken for an outer one."""
_COMMON: Final = 0.6
"""Share of the names of the inner folders that each outer folder has at least."""


def check_sets(root: Path, base: PhotoFolder) -> None:
    """Check that no folder is a data set of its own, by a table that labels the photos in it.

    Args:
        root: The data folder.
        base: Folder in it whose folders are to be classes.

    Raises:
        DataError: One is; the message has the option that reads it.
    """
    for kid in base.children:
        if not any(suffix.lower() in SUFFIXES for suffix in kid.suffixes()):
            continue
        tests = [f"{one.path}/" for one in kid.children if part_of(one.name) == "test"]
        start = root / kid.path
        photos = {root / path: kid.name for path in kid.below() if not path.startswith((*tests,))}
        try:
            other = find_other_labels(start, photos)
        except OSError:
            continue
        if other and other.labels > 1:
            where = root / base.path
            names = ", ".join(quoted(f"{one.name}/") for one in base.children[:3])
            more = f" and {len(base.children) - 3} more" if len(base.children) > 3 else ""
            raise DataError(
                f"{where} has {names}{more}: these look like sets of their own, as {kid.name}/"
                f"{other.config.csv} gives its photos labels of their own ({other.given}); give "
                f"one: --data {quote_path(start)}, or, if they are classes, add data.layout=classes"
            )


def names_warning(root: Path, base: PhotoFolder, folders: Sequence[PhotoFolder]) -> str:
    """Return a warning if the names of photos in class folders with parts begin with labels."""
    for folder in folders:
        if "begin with labels" in (hint := labels_hint(root, folder)):
            labels = hint.partition("begin with ")[2].partition(": add ")[0]
            return (
                f"the file names in {folder.name}/ begin with {labels}; if it is no class but a "
                f"set of its own, use --data {quote_path(root / folder.path)}"
            )
    return ""


def _inner_classes(folders: Sequence[PhotoFolder]) -> list[PhotoFolder]:
    """Return the folders of the innermost level at which all folders have about the same names.

    Args:
        folders: The outer folders, such as those of years.

    Returns:
        The folders of that level; [] if those in `folders` differ in their names.
    """
    found: list[PhotoFolder] = []
    level = list(folders)
    while _have_common_names(level):
        level = found = [kid for folder in level for kid in folder.children]
    return found


def _have_common_names(folders: Sequence[PhotoFolder]) -> bool:
    names = [{kid.name for kid in folder.children} for folder in folders]
    every = set().union(*names)
    strays = sum(len(folder.photos) for folder in folders)
    return (
        len(folders) > 1
        and len(every) > 1
        and not all(folder.photos for folder in folders)
        and all(len(one) >= _COMMON * len(every) for one in names)
        and strays <= _STRAY * sum(folder.total for folder in folders)
    )


def read_inner(root: Path, base: PhotoFolder, *, has_split: bool) -> Structure:
    """Read folders, such as those of years, that have about the same class folders in each.

    Args:
        root: The data folder.
        base: Folder in it that contains the outer folders.
        has_split: Whether a `--split` file determines the parts.

    Raises:
        DataError: The outer folders have different folders in them.
    """
    folders = _inner_classes(base.children)
    if not folders:
        raise DataError(
            f"{root / base.path} has no folders with the same class folders in each, which "
            "data.layout=inner reads; leave the option out, or add data.layout=classes"
        )
    found = Structure()
    for folder in folders:
        found.add_classes([folder], _part_in(folder.path, base))
    number = len({folder.name for folder in folders})
    found.line = f"the innermost folders are the classes, {number} classes"
    if found.counts("train") and not found.counts("valid") and not has_split:
        found.draw_validation()
    return found


def check_outer(where: Path, folders: Sequence[PhotoFolder]) -> str:
    """Check that the folders that are to be classes do not have the same folders in them.

    Folders whose names differ only in numbers, such as those of videos, are hardly classes.

    Returns:
        A warning about such folders, or "".

    Raises:
        DataError: They have the same folders, which may be classes; the message has the options
            that settle it.
    """
    inner = _inner_classes(folders)
    if not inner:
        return ""
    names = sorted({folder.name for folder in inner})
    classes = _some(names)
    if len({re.sub(r"[0-9]+", "", name) for name in names}) == 1:
        return (
            f"each class folder has the same folders in it ({classes}); if those are the classes, "
            "add data.layout=inner"
        )
    outer = _some([folder.name for folder in folders])
    raise DataError(
        f"{where} has {outer} with the same folders in each ({classes}): if {classes} are the "
        f"classes, add data.layout=inner, or give one folder: --data "
        f"{quote_path(where / folders[0].name)}; if {outer} are, add data.layout=classes"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quoted(f"{name}/") for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _part_in(path: str, base: PhotoFolder) -> str:
    """Return the part of a photo by the folder of `base` that it lies in, if all are parts."""
    if not all(part_of(kid.name) for kid in base.children):
        return ""
    return part_of(os.path.relpath(path, base.path or ".").split("/")[0])
