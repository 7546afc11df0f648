"""A labelled set of photos, split into parts: loaded, written down beside a run, found again."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from serving.errors import DataError, OptionError
from serving.utils.files import write_aside
from serving.utils.natural_sort import natural
from training.config.sections import DataConfig
from training.data import layouts, sample, torchvision_sets
from training.data.layouts import Photo
from training.data.splits import PARTS, drawn, from_file
from training.utils.console import shown

SAMPLE: Final = "sample"
SPLIT: Final = "split.csv"
MAX_BROKEN: Final = 0.05
"""Share of unreadable photos above which nothing is trained."""


class Sample(NamedTuple):
    """A photo and the index of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Dataset:
    """A labelled set of photos, split. `test` is never trained or chosen on.

    classes: in natural order: 1, 2, 10. unlabelled: photos that only wait to be scored.
    """

    source: str
    root: Path
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()
    unlabelled: tuple[Path, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of names, sizes, labels and parts; not of the photos' contents."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in PARTS:
            for path, label in getattr(self, part):
                size = os.path.getsize(path) if os.path.isfile(path) else -1
                name = os.fsencode(path.relative_to(self.root))
                digest.update(b"%s\0%s\0%d\0%d\n" % (part.encode(), name, size, label))
        return digest.hexdigest()[:16]

    def without(self, broken: Iterable[Path]) -> Dataset:
        """The same set less some photos, checked again."""
        gone = set(broken)
        parts: dict[str, Any] = {
            part: tuple(s for s in getattr(self, part) if s.path not in gone) for part in PARTS
        }
        return _checked(replace(self, **parts))


def load(
    source: str,
    *,
    split: Path | None = None,
    config: DataConfig = DataConfig(),  # noqa: B008 - frozen
    seed: int = 0,
) -> Dataset:
    """Find the photos of `source` and split them.

    Args:
        source: "sample" for the embedded set, the name of another known set (`builtin.NAMES`), or a
            folder: with a folder a class, with `train/` and `valid/` (and `test/`) of such, or as
            `config` says.
        split: CSV `path,fold`; fold is train, valid or test, or a number.
        config: Where labels come from, and how photos are split where nothing else does it.
        seed: Of that split.

    Raises:
        DataError: Nothing usable there; says what was expected.
        OptionError: An option that does not fit what is there.
    """
    try:
        return _load(source, split, config, seed)
    except OSError as error:  # a closed folder, a name that is too long
        where = f" {shown(error.filename)}:" if error.filename else ""
        raise DataError(f"--data {shown(source)}:{where} {error.strerror or error}") from error


def _load(source: str, split: Path | None, config: DataConfig, seed: int) -> Dataset:
    official = source in torchvision_sets.NAMES
    named = bool(config.csv or config.pattern)
    if official:
        if named:
            word = "csv" if config.csv else "pattern"
            raise OptionError(f"--data {source} has labels of its own: add data.{word}= (empty)")
        root, photos = torchvision_sets.find(source)
    else:
        root, photos = _folder(source), []
    if split is not None:
        known = {photo.path.relative_to(root).as_posix(): photo.label for photo in photos}
        label_of = partial(_known, known) if official else layouts.labeller(root, config)
        by_folder = not (official or named)
        photos = from_file(root, split, config, label_of, class_folders=by_folder)
    else:
        photos = drawn(root, photos if official else layouts.find(root, config), config, seed)
    labelled = [photo.path for photo in photos]
    waiting = () if official else layouts.unlabelled(root, labelled, config)
    return _checked(_dataset(source, root, photos, waiting), split)


def _folder(source: str) -> Path:
    # os.path, since pathlib raises over users that are not there and names that are too long.
    root = sample.cached() if source == SAMPLE else Path(os.path.expanduser(source))
    if not os.path.isdir(root):
        names = ", ".join((SAMPLE, *torchvision_sets.NAMES))
        raise DataError(
            f"--data {shown(source)}: no such folder; give one with a folder a class, or a set: "
            f"{names}"
        )
    return root.resolve()


def _known(labels: Mapping[str, str], path: str) -> str:
    return labels.get(Path(path).as_posix(), "")


def _dataset(
    source: str, root: Path, photos: Sequence[Photo], unlabelled: tuple[Path, ...]
) -> Dataset:
    classes = tuple(sorted({photo.label for photo in photos}, key=natural))
    index = {name: i for i, name in enumerate(classes)}
    parts: dict[str, list[Sample]] = {part: [] for part in PARTS}
    for path, label, part in photos:
        parts[part].append(Sample(path, index[label]))
    found = {part: tuple(samples) for part, samples in parts.items()}
    return Dataset(source, root, classes, unlabelled=unlabelled, **found)


def _checked(dataset: Dataset, split: Path | None = None) -> Dataset:
    if len(dataset.classes) < 2:
        have = f"one class, {shown(dataset.classes[0])}" if dataset.classes else "no class"
        raise DataError(f"{dataset.root} has {have}; it needs at least 2")
    for part in ("train", "valid"):
        counts = Counter(label for _, label in getattr(dataset, part))
        if not counts and split:
            remedy = f"give some rows the fold {part}, or number the folds"
            raise DataError(f"--split {split}: the {part} part is empty; {remedy}")
        if not counts:
            raise DataError(f"{dataset.root}: the {part} part is empty")
        bare = [name for i, name in enumerate(dataset.classes) if not counts[i]]
        if bare and part == "train":
            name = shown(bare[0])
            raise DataError(f"class {name} has no photo in the train part; add one")
    return dataset


def write_split(dataset: Dataset, path: Path) -> None:
    """Write every photo's part as CSV `path,fold,label`, paths below the data folder."""
    with (
        write_aside(path) as aside,
        aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        # All are quoted: not every Python quotes a name with a carriage return by itself.
        out = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        out.writerow(["path", "fold", "label"])
        for part in PARTS:
            for photo, label in getattr(dataset, part):
                relative = photo.relative_to(dataset.root).as_posix()
                out.writerow([relative, part, dataset.classes[label]])


def from_split_file(
    path: Path,
    root: Path,
    classes: tuple[str, ...],
    source: str,
    *,
    needed: Iterable[str] = ("train", "valid"),
) -> Dataset:
    """The data set whose split `write_split` wrote.

    Args:
        path: The split file of a run.
        root: Where the photos are now.
        classes: In the order of the labels.
        source: As `load`.
        needed: Parts whose photos must all be there.

    Raises:
        DataError: A file that can't be read, or photos that are not there; names `--data`.
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
    except (OSError, KeyError, csv.Error) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    for part in needed:
        missing = [sample for sample in parts[part] if not os.path.isfile(sample.path)]
        if missing:
            raise gone(missing, parts[part], part, root)
    found: dict[str, Any] = {part: tuple(samples) for part, samples in parts.items()}
    return Dataset(source, root, classes, **found)


def gone(missing: Sequence[Sample], samples: Sequence[Sample], part: str, root: Path) -> DataError:
    """What to say of `missing` photos of a part's `samples`."""
    if len(missing) == len(samples):
        return DataError(
            f"none of the {len(samples)} {part} photos is in {root}; say where with --data"
        )
    names = f"{len(missing)} {part} photo{'s are' if len(missing) > 1 else ' is'} gone"
    first = shown(missing[0].path.relative_to(root))
    return DataError(f"{names} in {root}, as {first}; put back what is gone, or train anew")


def changed(info_data: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether photos came, went or grew since a checkpoint was made, by its `info.data`."""
    return info_data.get("fingerprint") not in (None, dataset.fingerprint)
