"""Load a labelled photo dataset and split it; write the split to a run folder and read it back."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from serving.errors import DataError, FledgeError, OptionError
from serving.inputs.path_kind import similar
from serving.utils.files import atomic_write
from serving.utils.natural_sort import natural_letters_first
from training.config.sections import DataConfig
from training.data import label_table, layouts, sample, torchvision_sets
from training.data.layouts import Photo, Reading
from training.data.similar_classes import common_folder, settle_classes
from training.data.splits import PARTS, draw_split, group_warning, read_split_file
from training.utils import archive
from training.utils.console import quoted

SAMPLE: Final = "sample"
SPLIT_FILE: Final = "split.csv"
MAX_UNREADABLE_SHARE: Final = 0.05
"""Largest share of unreadable photos. Training stops with an error if more are unreadable."""


class Sample(NamedTuple):
    """Path of a photo, and the index of the photo's class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Dataset:
    """A dataset of labelled photos, divided into the splits train, valid and test.

    Attributes:
        source: The value of `--data`.
        root: Data folder, which contains all photos.
        classes: Class names in natural order, such as 1, 2, 10.
        train: Photos for training.
        valid: Photos for validation after every epoch.
        test: Labelled photos that training and validation do not use.
        unlabelled: Photos in the folder `test/` that have no labels.
        reading: How the data folder was read.
    """

    source: str
    root: Path
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()
    unlabelled: tuple[Path, ...] = ()
    reading: Reading = field(default_factory=Reading, compare=False, repr=False)

    @property
    def fingerprint(self) -> str:
        """Hash of all photos' names, file sizes, labels and splits, 16 hex digits.

        The contents of the files are not read.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in PARTS:
            for path, label in getattr(self, part):
                size = os.path.getsize(path) if os.path.isfile(path) else -1
                name = os.fsencode(path.relative_to(self.root))
                digest.update(b"%s\0%s\0%d\0%d\n" % (part.encode(), name, size, label))
        return digest.hexdigest()[:16]

    def without(self, broken: Iterable[Path]) -> Dataset:
        """Return a copy without the photos in `broken`.

        Raises:
            DataError: The copy has no training or no validation photos, or a class has no training
                photos.
        """
        removed = set(broken)
        parts: dict[str, Any] = {
            part: tuple(s for s in getattr(self, part) if s.path not in removed) for part in PARTS
        }
        return _checked(replace(self, **parts))


def load_dataset(
    source: str,
    *,
    split: Path | None = None,
    config: DataConfig = DataConfig(),  # noqa: B008 - frozen
    seed: int = 0,
    trainable: bool = True,
) -> Dataset:
    """Find the photos of `source` and split them.

    Args:
        source: "sample" for the built-in dataset, a name in `torchvision_sets.NAMES`, a table of
            labels, which is read as `data.csv` of its folder, or a folder or an archive (zip, tar),
            which is extracted into the cache. A folder has one of these layouts:

            - one folder per class, or parts with one folder per class, as recognised by
              `training.data.folders.structure`;
            - the layout that `config` describes.
        split: CSV file with the columns `path` and `fold`; fold is train, valid, test or a number.
            None: the split comes from the folders or is drawn at random.
        config: Data options: where labels come from, and how photos are split at random.
        seed: Seed of the random split.
        trainable: Whether to refuse photos that can't be trained on, such as a class of one photo.

    Raises:
        DataError: The folder or the split file has no usable photos, or can't be read.
        OptionError: An option in `config` does not fit the data.
    """
    try:
        dataset = _load(source, split, config, seed, trainable)
        return _checked(dataset, split) if trainable else dataset
    except FledgeError as error:
        archive.restore_names(error)
        raise
    except OSError as error:  # no permission, or a name that is too long
        where = f" {quoted(error.filename)}:" if error.filename else ""
        raise DataError(f"--data {quoted(source)}:{where} {error.strerror or error}") from error


def _load(
    source: str, split: Path | None, config: DataConfig, seed: int, trainable: bool
) -> Dataset:
    official = source in torchvision_sets.NAMES
    has_label_option = bool(config.csv or config.pattern)
    if official:
        if has_label_option:
            word = "csv" if config.csv else "pattern"
            raise OptionError(f"--data {source} has labels of its own: add data.{word}= (empty)")
        root, photos = torchvision_sets.find(source)
        layout = None
    else:
        root, config = _folder(source, config)
        layout = layouts.Layout(root, config, has_split=split is not None)
        photos = layout.photos
    warning, drawn = "", False
    if split is not None:
        labels = {photo.path.relative_to(root).as_posix(): photo.label for photo in photos}
        label_of = layout.label_of if layout else partial(_look_up, labels)
        by_folder = not (official or has_label_option)
        photos = read_split_file(root, split, config, label_of, class_folders=by_folder)
        photos = settle_classes(photos, config, root, trainable=trainable)
    else:
        photos = settle_classes(photos, config, root, trainable=trainable)
        warning = group_warning(root, photos, config)
        drawn = any(not photo.part for photo in photos)
        photos = draw_split(root, photos, config, seed, trainable=trainable)
    unlabelled = layout.unlabelled if layout else ()
    dataset = _dataset(source, common_folder(root, photos), photos, unlabelled)
    reading = layout.reading([photo.path for photo in photos], split) if layout else Reading()
    given = str(split or config.csv or ("the data set" if official else "the folders"))
    warnings = "; ".join(filter(None, [reading.warning, warning]))
    return replace(
        dataset, reading=replace(reading, warning=warnings, given="" if drawn else given)
    )


def _folder(source: str, config: DataConfig) -> tuple[Path, DataConfig]:
    """Return the data folder; for a table of labels, its folder and options that name the table."""
    # pathlib raises an error for unknown users and for names that are too long; os.path does not.
    root = sample.cached_sample() if source == SAMPLE else Path(os.path.expanduser(source))
    if source != SAMPLE and archive.is_archive(source):
        root = archive.extracted(source)
    elif os.path.isfile(root):
        return label_table.as_data(root, config)
    label_table.check_options(config)
    if not os.path.isdir(root):
        names = ", ".join((SAMPLE, *torchvision_sets.NAMES))
        what = "is no folder or archive" if os.path.exists(root) else "no such folder or archive"
        near = similar(root, "photos")
        hint = f"did you mean {near}? Else give" if near else "give"
        raise DataError(
            f"--data {quoted(source)}: {what}; {hint} a folder with a folder per class, a "
            f"zip or tar of one, or a set: {names}"
        )
    return root.resolve(), config


def _look_up(labels: Mapping[str, str], path: str) -> str:
    return labels.get(Path(path).as_posix(), "")


def _dataset(
    source: str, root: Path, photos: Sequence[Photo], unlabelled: tuple[Path, ...]
) -> Dataset:
    classes = tuple(sorted({photo.label for photo in photos}, key=natural_letters_first))
    index = {name: i for i, name in enumerate(classes)}
    parts: dict[str, list[Sample]] = {part: [] for part in PARTS}
    for path, label, part in photos:
        parts[part].append(Sample(path, index[label]))
    found: dict[str, Any] = {part: tuple(samples) for part, samples in parts.items()}
    return Dataset(source, root, classes, unlabelled=unlabelled, **found)


def _checked(dataset: Dataset, split: Path | None = None) -> Dataset:
    if len(dataset.classes) < 2:
        have = f"one class, {quoted(dataset.classes[0])}" if dataset.classes else "no class"
        passed = dataset.reading.passed_over.line()
        raise DataError(
            f"{dataset.root} has {have}; it needs at least 2{f'; {passed}' if passed else ''}"
        )
    for part in ("train", "valid"):
        counts = Counter(label for _, label in getattr(dataset, part))
        if not counts and split:
            remedy = f"give some rows the fold {part}, or number the folds"
            raise DataError(f"--split {split}: the {part} part is empty; {remedy}")
        if not counts:
            raise DataError(f"{dataset.root}: the {part} part is empty")
        empty = [name for i, name in enumerate(dataset.classes) if not counts[i]]
        if empty and part == "train":
            name = quoted(empty[0])
            raise DataError(f"class {name} has no photo in the train part; add one")
    return dataset


def write_split(dataset: Dataset, path: Path) -> None:
    """Write the split to a CSV file `path,fold,label`; paths are relative to the data folder."""
    with (
        atomic_write(path) as partial_path,
        partial_path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        # QUOTE_ALL: some Python versions do not quote a name that contains a carriage return.
        out = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        out.writerow(["path", "fold", "label"])
        for part in PARTS:
            for photo, label in getattr(dataset, part):
                relative = photo.relative_to(dataset.root).as_posix()
                out.writerow([relative, part, dataset.classes[label]])


def read_split(
    path: Path,
    root: Path,
    classes: tuple[str, ...],
    source: str,
    *,
    needed: Iterable[str] = ("train", "valid"),
) -> Dataset:
    """Read a split that `write_split` wrote.

    Args:
        path: The split file in a run folder.
        root: Folder that contains the photos now.
        classes: Class names in the order of the class indices.
        source: The value of `--data`.
        needed: Splits (train, valid or test) of which all photos must exist.

    Raises:
        DataError: The split file can't be read, or photos are missing.
    """
    root = root.resolve()
    if not os.path.isdir(root):
        raise DataError(f"the photos are no longer in {root}; say where with --data")
    index = {name: i for i, name in enumerate(classes)}
    parts: dict[str, list[Sample]] = {part: [] for part in PARTS}
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for row in csv.DictReader(file):
                parts[row["fold"]].append(Sample(root / row["path"], index[row["label"]]))
    except (OSError, KeyError, TypeError, csv.Error) as error:
        # TypeError: a row has fewer fields than the first line names.
        raise DataError(f"{path} can't be read: {error}") from error
    for part in needed:
        missing = [sample for sample in parts[part] if not os.path.isfile(sample.path)]
        if missing:
            raise missing_photos_error(missing, parts[part], part, root)
    found: dict[str, Any] = {part: tuple(samples) for part, samples in parts.items()}
    return Dataset(source, root, classes, **found)


def missing_photos_error(
    missing: Sequence[Sample], samples: Sequence[Sample], part: str, root: Path
) -> DataError:
    """Return the error for missing photos of a split.

    Args:
        missing: The missing photos, at least one.
        samples: All photos of the split.
        part: Name of the split: train, valid or test.
        root: Data folder.
    """
    if len(missing) == len(samples):
        return DataError(
            f"none of the {len(samples)} {part} photos is in {root}; say where with --data"
        )
    names = f"{len(missing)} {part} photo{'s are' if len(missing) > 1 else ' is'} missing"
    path = missing[0].path
    first = quoted(path.relative_to(root) if path.is_relative_to(root) else path)
    return DataError(
        f"{names} in {root}, for example {first}; restore the missing photos, or train again"
    )


def photos_changed(info_data: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether a dataset's photos, labels or splits have changed since a checkpoint was written.

    info_data: The entry `info.data` of the checkpoint.
    """
    return info_data.get("fingerprint") not in (None, dataset.fingerprint)
