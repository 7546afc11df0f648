"""Where photos and labels come from: folders and split files -> samples, splits, class names."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from serving.errors import DataError, OptionError
from serving.files import write_aside
from serving.images import SUFFIXES
from training.split import PARTS, read_split

_CLUTTER: Final = ("__MACOSX", "@eaDir")
FOLDERS: Final = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
"""Folder names that are parts, not classes."""
SAMPLE: Final = "sample"
SPLIT: Final = "split.csv"


class Sample(NamedTuple):
    """A photo and the index of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Dataset:
    """A labelled set of photos, split. `test` is never trained or chosen on."""

    source: str
    root: Path
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of names, sizes, labels and parts; not of the photos' contents."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in PARTS:
            for path, label in getattr(self, part):
                size = path.stat().st_size if path.exists() else -1
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
    fold: int = 0,
    valid: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Find the photos of `source` and split them.

    Args:
        source: "sample" for the embedded set, or a folder with a folder a class, or with `train/`
            and `valid/` (and `test/`) of such.
        split: CSV `path,fold`; fold is train, valid or test, or a number.
        fold: Which number of `split` is the validation part.
        valid: Share of each class that is held out, where nothing else splits the photos.
        seed: Of that split.

    Raises:
        DataError: Nothing usable there; says what was expected.
    """
    if source == SAMPLE:
        from training import sample

        root = sample.cached()
    else:
        root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"--data {source}: no such folder; give one with a folder a class")
    root = root.resolve()
    parts: dict[str, Path] = {}
    for name, part in FOLDERS.items():
        # A part's photos lie in folders of classes; a class may be called train, too.
        if any(any(_photos(folder)) for folder in _class_folders(root / name)):
            if part in parts:
                raise DataError(f"{root} has both {parts[part].name}/ and {name}/; keep one")
            parts[part] = root / name
    strangers = [f for f in _class_folders(root, except_for=tuple(FOLDERS)) if any(_photos(f))]
    if parts and strangers and split is None:
        have = ", ".join(f"{folder.name}/" for folder in parts.values())
        raise DataError(f"{root} has {have} and beside them {strangers[0].name}/; move it away")
    if split is not None:
        dataset = _from_split(source, root, split, fold)
    elif "train" in parts and "valid" in parts:
        dataset = _from_parts(source, root, parts)
    elif parts:
        missing = "valid" if "train" in parts else "train"
        have = ", ".join(f"{part}/" for part in parts)
        raise DataError(
            f"{root} has {have} but no {missing}/; add it, or put the classes one level up"
        )
    else:
        dataset = _from_classes(source, root, valid, seed)
    return _checked(dataset)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key with numbers by value: 1, 2, 10; the name itself decides between 1 and 01."""
    parts = [t for t in re.split(r"([0-9]+)", name) if t]
    return [(int(t), "") if t.isdecimal() else (-1, t) for t in parts], name


def _class_folders(root: Path, except_for: Sequence[str] = ()) -> list[Path]:
    if not root.is_dir():
        return []
    try:
        found = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{root} can't be read: {error.strerror}") from error
    return sorted((p for p in found if p.name not in except_for), key=lambda p: _natural(p.name))


def _photos(folder: Path) -> Iterator[Path]:
    """Image files below `folder` by extension, hidden ones skipped, in natural order."""
    if not folder.is_dir():
        return  # a part need not have every class
    for here, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=_natural)
        for name in sorted(files, key=_natural):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(here, name)


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be read: {error.strerror}") from error


def _labelled(root: Path, classes: Sequence[str]) -> list[Sample]:
    return [Sample(p, i) for i, name in enumerate(classes) for p in _photos(root / name)]


def _class_names(root: Path) -> tuple[str, ...]:
    folders = _class_folders(root)
    names = tuple(p.name for p in folders if any(_photos(p)))
    if not names:
        raise DataError(f"{root} holds no folder with photos; expected {root.name}/CLASS/photo.jpg")
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{os.fsencode(folder)!r} is no UTF-8 name; rename the folder"
            ) from None
        bare = folder.name not in names and folder.name not in _CLUTTER
        if bare and any(path.is_file() for path in folder.iterdir()):
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{folder} holds no photo that can be read ({kinds}); remove it")
    return names


def _from_classes(source: str, root: Path, valid: float, seed: int) -> Dataset:
    if not 0 < valid < 1:
        raise OptionError(f"data.valid = {valid}: use a share between 0 and 1")
    classes = _class_names(root)
    by_class: list[list[Sample]] = [[] for _ in classes]
    for sample in _labelled(root, classes):
        by_class[sample.label].append(sample)
    train: list[Sample] = []
    held: list[Sample] = []
    for label, samples in enumerate(by_class):
        if len(samples) < 2:
            raise DataError(
                f"class {classes[label]!r} has one photo; it needs at least 2, "
                "one to train on and one to validate on"
            )
        # Each class is drawn by its own name, so adding a class leaves the others' split alone.
        random.Random(f"{seed}/{classes[label]}").shuffle(samples)
        cut = min(max(1, round(len(samples) * valid)), len(samples) - 1)
        held += samples[:cut]
        train += samples[cut:]
    return Dataset(source, root, classes, tuple(sorted(train)), tuple(sorted(held)))


def _from_parts(source: str, root: Path, parts: Mapping[str, Path]) -> Dataset:
    classes = _class_names(parts["train"])
    for folder in parts.values():
        strange = [n.name for n in _class_folders(folder) if n.name not in classes]
        if strange and any(any(_photos(folder / n)) for n in strange):
            raise DataError(f"{folder} has class {strange[0]!r}, which train/ has no photo of")
    found = {part: tuple(_labelled(folder, classes)) for part, folder in parts.items()}
    return Dataset(source, root, classes, **found)


def _from_split(source: str, root: Path, split: Path, fold: int) -> Dataset:
    rows = list(read_split(split))
    numbers = {int(f) for _, f in rows if f.isdecimal()}
    if numbers and fold not in numbers:
        have = ", ".join(map(str, sorted(numbers)))
        raise OptionError(f"data.fold = {fold}: {split} has folds {have}")
    names = sorted({Path(path).parts[0] for path, _ in rows}, key=_natural)
    index = {name: i for i, name in enumerate(names)}
    parts: dict[str, list[Sample]] = {part: [] for part in PARTS}
    seen: set[Path] = set()
    for path, where in rows:
        if Path(path) in seen:
            raise DataError(f"{split} names {path} twice; a photo belongs to one part")
        seen.add(Path(path))
        part = where if where in PARTS else "valid" if int(where) == fold else "train"
        parts[part].append(Sample(root / path, index[Path(path).parts[0]]))
    missing = [s.path for p in PARTS for s in parts[p] if not s.path.is_file()]
    if missing:
        raise DataError(f"{split} names {len(missing)} files that are not there, as {missing[0]}")
    found = {part: tuple(samples) for part, samples in parts.items()}
    return Dataset(source, root, tuple(names), **found)


def _checked(dataset: Dataset) -> Dataset:
    if len(dataset.classes) < 2:
        name = dataset.classes[0]
        raise DataError(f"{dataset.root} has one class, {name!r}; it needs at least 2")
    for part in ("train", "valid"):
        counts = Counter(sample.label for sample in getattr(dataset, part))
        if not counts:
            raise DataError(f"{dataset.root}: the {part} part is empty")
        bare = [name for i, name in enumerate(dataset.classes) if not counts[i]]
        if bare and part == "train":
            raise DataError(f"class {bare[0]!r} has no photo in the train part; add one")
    return dataset


def write_split(dataset: Dataset, path: Path) -> None:
    """Write every photo's part as CSV `path,fold,label`, paths below the data folder."""
    with (
        write_aside(path) as aside,
        aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["path", "fold", "label"])
        for part in PARTS:
            for sample in getattr(dataset, part):
                relative = sample.path.relative_to(dataset.root).as_posix()
                out.writerow([relative, part, dataset.classes[sample.label]])


def of_run(run: Path, data: Path | None = None, part: str = "valid") -> Dataset:
    """The split that a run used.

    Args:
        run: The run's folder, or its checkpoint.
        data: Where the photos are now, if they have moved.
        part: Whose photos must all be there.

    Raises:
        DataError: The photos are not where they were; names `--data`.
    """
    from training.checkpoint import find, read_info

    path = find(run)
    folder = path.parent
    info = read_info(path.with_suffix(".json"))
    root = (data or Path(str(info.data["root"]))).resolve()
    if info.data.get("source") == SAMPLE and data is None and not root.is_dir():
        from training import sample

        root = sample.cached()
    if not root.is_dir():
        raise DataError(f"the photos are no longer in {root}; say where with --data")
    index = {name: i for i, name in enumerate(info.classes)}
    parts: dict[str, list[Sample]] = {part: [] for part in PARTS}
    try:
        with (folder / SPLIT).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for row in csv.DictReader(file):
                parts[row["fold"]].append(Sample(root / row["path"], index[row["label"]]))
    except (OSError, KeyError, csv.Error) as error:
        raise DataError(f"{folder / SPLIT} can't be read: {error}") from error
    gone = [s.path for s in parts[part] if not s.path.is_file()]
    if gone:
        raise DataError(f"{len(gone)} {part} photos are gone, as {gone[0]}; use --data")
    found = {part: tuple(samples) for part, samples in parts.items()}
    return Dataset(str(info.data.get("source", root)), root, info.classes, **found)
