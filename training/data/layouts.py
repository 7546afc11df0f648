"""Find the photos of a dataset and their labels in one of the supported layouts on disk.

Labels are the names of class folders (see `training.data.folders.structure`), parts of file names,
or values in a CSV table. The result is a list of `Photo`: path, class name and split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

from serving.errors import DataError
from serving.inputs.passed_over import PassedOver, Reason
from training.config.sections import DataConfig
from training.data.folders.part_names import part_of
from training.data.folders.photo_tree import PhotoFolder, count_unused, read_tree, tree_lines
from training.data.folders.structure import find_structure
from training.data.folders.structure_result import PARTS, Structure
from training.data.label_table import images_folder, read_label_table
from training.data.other_labels import check_tables, find_other_labels
from training.utils.console import quoted


class Photo(NamedTuple):
    """A labelled photo.

    Attributes:
        path: Path of the file.
        label: Class name.
        part: Split: train, valid or test; "" if the photo is not assigned to a split yet.
    """

    path: Path
    label: str
    part: str = ""


_SHOWN: Final = 3
"""Photos outside of the classes that are named."""


@dataclass(frozen=True)
class Reading:
    """How a data folder was read, to be told before anything is trained.

    Attributes:
        line: One line about the layout, with the numbers of photos.
        tree: Lines of a drawing of the folders, with the number of photos in each.
        empty: Paths of class folders without photos, relative to the data folder.
        passed_over: Counts of files and folders that are no photos of the data set.
        warning: What may be wrong with the layout, or "".
        given: Where the parts are given: a name of a file, or "the folders"; "" if those of train
            and valid are drawn.
        outside: Paths of the photos that belong to no class, relative to the data folder.
    """

    line: str = ""
    tree: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    passed_over: PassedOver = field(default_factory=PassedOver)
    warning: str = ""
    given: str = ""
    outside: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield the line about the layout, and the line about what was passed over."""
        if self.line:
            yield f"photos: {self.line}"
        if self.passed_over:
            yield self.passed_over.line()
        if self.outside:
            names = ", ".join(map(quoted, self.outside[:_SHOWN]))
            more = len(self.outside) - _SHOWN
            yield f"outside of the classes: {names}{f' and {more} more' if more > 0 else ''}"
        if self.warning:
            yield f"warning: {self.warning}"


class Layout:
    """The photos of a data folder, before they are split.

    Attributes:
        photos: The labelled photos.
        unlabelled: Photos of a test folder that have no labels.
    """

    def __init__(self, root: Path, config: DataConfig, *, has_split: bool = False) -> None:
        """Search a data folder, and find the labels of its photos.

        Args:
            root: Data folder.
            config: Data options: the label table, or the pattern of file names. By default every
                class has a folder.
            has_split: Whether a `--split` file determines the parts. Its photos need not be those
                that the search has found.

        Raises:
            DataError: The layout is wrong or contains no photos, or a file or folder can't be read.
                The error has a drawing of the folders as a note if these are not recognised.
            OptionError: `data.images` is not below `root`.
        """
        self._root, self._config = root, config
        self._passed_over = PassedOver()
        # A table that is given as the data set may lie anywhere: what is beside it is not searched.
        is_table = os.path.isabs(config.csv)
        strict = not (config.csv or has_split)
        tree = PhotoFolder() if is_table else read_tree(root, self._passed_over, strict=strict)
        self._tree = tree
        self._structure = Structure()
        self.photos: list[Photo] = []
        if config.csv:
            self.photos = _from_table(root, config)
        elif config.pattern and not has_split:
            self.photos = _from_names(root, config, self._tree)
            self._structure.warning = _other_table(root, self.photos)
        elif config.pattern:
            images_folder(root, config)
        else:
            try:
                self._structure = find_structure(
                    root,
                    self._tree,
                    layout=config.layout,
                    keep_synsets=config.synsets == "keep",
                    has_split=has_split,
                )
            except DataError as error:
                passed = self._passed_over
                tell = passed.totals().keys() - {Reason.NOT_AN_IMAGE}  # those are told already
                told = DataError(f"{error}; {passed.line()}" if tell else str(error))
                told.add_note("\n".join(self._drawing()))
                raise told from error
            self.photos = [
                Photo(root / path, label, part) for path, label, part in self._structure.photos
            ]
            if config.layout == "auto":
                labels = {photo.path: photo.label for photo in self.photos}
                check_tables(root, labels, self._structure.base)
        self.unlabelled = self._find_unlabelled()

    def _find_unlabelled(self) -> tuple[Path, ...]:
        """Return the photos of the test folders of which none has a label."""
        if not (self._config.csv or self._config.pattern):
            return tuple(self._root / path for path in self._structure.unlabelled)
        top = self._tree.at(_below_root(self._config) if self._config.pattern else "")
        tests = [kid for kid in top.children if part_of(kid.name) == "test"]
        labelled = {photo.path for photo in self.photos}
        found: list[Path] = []
        for folder in tests:
            paths = [self._root / path for path in folder.below()]
            found += [] if labelled.intersection(paths) else paths
        return tuple(found)

    def label_of(self, path: str) -> str:
        """Return the label of a photo by its path relative to the data folder; "" if unknown."""
        if self._config.pattern:
            return _label(self._config.pattern, Path(path).name)
        return self._labels.get(self._root / path, "")

    @cached_property
    def _labels(self) -> dict[Path, str]:
        return {photo.path: photo.label for photo in self.photos}

    def reading(self, used: Iterable[Path], split: Path | None = None) -> Reading:
        """Return how the folder was read.

        Args:
            used: The labelled photos that are used.
            split: The `--split` file, or None.
        """
        start = os.path.join(self._root, "")
        names = {str(path).removeprefix(start) for path in (*used, *self.unlabelled)}
        why = f"not in {split.name}" if split else f"not in {self._config.csv}"
        why = why if split or self._config.csv else ""
        outside = count_unused(self._tree, names, self._passed_over, why)
        line = self._structure.line
        if self._config.csv:
            line = f"labels from {self._config.csv}"
        elif self._config.pattern:
            line = f"labels from file names, by {self._config.pattern}"
        return Reading(
            f"{line}, parts from {split}" if split else line,
            tuple(self._drawing()),
            tuple(self._structure.empty),
            self._passed_over,
            self._structure.warning,
            outside=tuple(outside),
        )

    def _drawing(self) -> Iterator[str]:
        if os.path.isabs(self._config.csv):  # the folder was not searched
            return iter(())
        return tree_lines(f"{self._root.name or self._root}/", self._tree, self._structure.roles)


def _from_names(root: Path, config: DataConfig, tree: PhotoFolder) -> list[Photo]:
    """Find photos whose labels are in the file names.

    A folder for test photos is used as the test split. Folders for training and validation are used
    as splits only if both exist.
    """
    folder = images_folder(root, config) if config.images else root
    labelled: list[tuple[Path, str]] = []
    unmatched: list[tuple[Path, str]] = []
    for name in tree.at(_below_root(config)).below():
        path = root / name
        label = _label(config.pattern, path.name)
        (labelled if label else unmatched).append((path, label))
    top = {
        path: part_of(first) if inner else ""
        for path, _ in labelled + unmatched
        for first, *inner in [path.relative_to(folder).parts]
    }
    official = {"train", "valid"} <= set(top.values())
    test_unlabelled = not any(top[path] == "test" for path, _ in labelled)
    unmatched = [item for item in unmatched if not (test_unlabelled and top[item[0]] == "test")]
    if unmatched:
        raise DataError(
            f"data.pattern = {config.pattern!r} does not match {len(unmatched)} of {len(top)} "
            f"photos in {folder}, for example {quoted(unmatched[0][0].relative_to(folder))}"
        )
    if not labelled:
        raise DataError(f"{folder} contains no photo for data.pattern = {config.pattern!r}")
    used = PARTS if official else ("test",)
    return [Photo(path, label, top[path] if top[path] in used else "") for path, label in labelled]


def _other_table(root: Path, photos: Iterable[Photo]) -> str:
    """Return a warning about a table that gives the photos other labels than their names; or ""."""
    other = find_other_labels(root, {photo.path: photo.label for photo in photos})
    if other is None:
        return ""
    return (
        f"{other.config.csv} gives the photos other labels ({other.given}) than data.pattern does "
        f"({other.known}); to use the table, give {other.options} instead of "
        "data.pattern"
    )


def _label(pattern: str, name: str) -> str:
    match = re.search(pattern, name)
    return (match.group(1) or "") if match else ""


def _below_root(config: DataConfig) -> str:
    """Return `data.images` as the tree has it: "" for the data folder itself."""
    path = Path(config.images).as_posix()
    return "" if path == "." else path


def _from_table(root: Path, config: DataConfig) -> list[Photo]:
    """Find the photos that a table of labels names; they may lie outside of `root`, see there."""
    entries = read_label_table(
        root, config, photos_below, part_of, anywhere=os.path.isabs(config.csv)
    )
    return [Photo(*entry) for entry in entries]


def photos_below(folder: Path) -> Iterator[Path]:
    """Yield the photos below a folder, as the search for class folders finds them."""
    tree = read_tree(folder, PassedOver(), strict=False)
    return (folder / path for path in tree.below())
