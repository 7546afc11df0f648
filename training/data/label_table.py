"""Read the table of labels of a data set (`data.csv`, or `--data table.csv`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from serving.errors import DataError, OptionError
from serving.tables.columns import (
    PARTS,
    find_labels,
    find_paths,
    likely_labels,
    text_of,
    usual_columns,
)
from serving.tables.reader import TABLES, EmptyTable, Table, limited_rows, open_table
from serving.terminal import quote, quote_path
from serving.utils.label_names import is_utf8, normalize_label, show_label
from serving.utils.mistakes import Mistakes
from training.config.sections import DataConfig
from training.data import photo_names
from training.utils.console import quoted

SUFFIXES: Final = (*TABLES, ".txt")
"""Suffixes of files that `--data` takes for tables of labels."""

_IN_UTF8: Final = "save the table as 'CSV UTF-8'"
_LABELS_ALIKE: Final = "labels that are not UTF-8"
_NAMES_ALIKE: Final = "names that are not UTF-8"


class TableEntry(NamedTuple):
    """A row of a table of labels: absolute path of the photo, label, and name of the part or ""."""

    path: Path
    label: str
    part: str


def as_data(table: Path, config: DataConfig) -> tuple[Path, DataConfig]:
    """Return the data folder and the options for a table that is given as the data set.

    Raises:
        OptionError: The options name other labels.
        DataError: The file has not the suffix of a table.
    """
    name = quote_path(table)
    for option in ("csv", "pattern"):
        if value := getattr(config, option):
            raise OptionError(
                f"--data {name} is a table of labels, and data.{option} = {quoted(value)} gives "
                f"labels, too: leave out data.{option}, or give the folder of the photos"
            )
    if table.suffix.lower() not in SUFFIXES:
        open_table(table)  # says what a spreadsheet and the like is
        raise DataError(
            f"--data {name}: neither a folder nor a table ({', '.join(SUFFIXES)}) of labels"
        )
    return table.parent.resolve(), config.model_copy(update={"csv": str(table.absolute())})


def check_options(config: DataConfig) -> None:
    """Check that no option has no effect, for a folder of photos.

    Raises:
        OptionError: An option is for a table of labels or for a pattern, and there is neither.
    """
    idle = [*config.of_tables(), *(["images"] if config.images else [])]
    if idle and not (config.csv or config.pattern):
        also = " or data.pattern" if idle[0] == "images" else ""
        raise OptionError(
            f"data.{idle[0]} has no effect without a table of labels: name it with data.csv{also}, "
            "or leave the option out"
        )


def read_label_table(
    root: Path,
    config: DataConfig,
    photos: Callable[[Path], Iterable[Path]],
    parts: Callable[[str], str],
    *,
    anywhere: bool = False,
    checked: bool = True,
    most: int | None = None,
) -> list[TableEntry]:
    """Read a table of labels, and find its photos.

    Args:
        root: Data folder.
        config: Data options; `csv` is the path of the table, absolute or below `root`.
        photos: Function that lists the photos below a folder.
        parts: Function that returns the split (train, valid or test) that a word means, or "".
        anywhere: Whether photos may lie outside of `root`.
        checked: Whether wrong rows are an error; if False, they are left out if they name no photo
            or no label.
        most: Number of rows that are read; None: all.

    Raises:
        DataError: The table can't be read, its columns can't be told, or rows are wrong; the
            message has a line for each wrong row.
        OptionError: `data.images` is not below `root`.
    """
    table = _open(root, config)
    images = _images(root, config)
    bases = [images, *([] if config.images else [root, Path(table.path).parent])]
    asked: tuple[str | None, str | None] = config.columns

    def is_photo(name: str) -> bool:
        return photo_names.exists(f"{name.strip()}{config.suffix}", bases)

    if config.columns == DataConfig().columns:
        asked = None, None
        table = table.with_first_row(is_photo)
    if next(table.rows([0]), None) is None:
        raise DataError(f"{table.path} has no row under its first line; give the table of labels")
    at = find_paths(
        table,
        asked[0],
        table.path,
        lambda name: columns_option(name, _other(table, name, asked[1])),
        preferred="id",
        always=False,
        is_photo=is_photo,
    )
    label_at = find_labels(
        table, asked[1], at, table.path, lambda name: columns_option(table.columns[at], name)
    )
    part_at = next((i for i in usual_columns(table.columns, PARTS) if i not in (at, label_at)), at)
    rows = list(islice(limited_rows(table, [at, label_at, part_at]), most))
    names = [text_of(row.values[0]).strip() for row in rows]
    written = [f"{name}{config.suffix}" if name else "" for name in names]
    found = photo_names.locate(
        written,
        bases,
        root,
        lambda: photos(images if config.images else root),
        table.path,
        "" if config.images else "data.images",
    )
    words = [text_of(row.values[2]) for row in rows]
    part_of = _parts(words, parts) if part_at != at else [""] * len(rows)
    wrong = Mistakes(table.path)
    lines: dict[Path, int] = {}
    entries: list[TableEntry] = []
    missing = 0
    for row, name, path, part in zip(rows, names, found, part_of, strict=True):
        where = table.where(row.number)
        label = normalize_label(text_of(row.values[1]))
        if row.wrong:
            wrong.add(f"{where}: {row.wrong}")
            continue
        if not name:
            wrong.add(f"{where}: {table.columns[at]} {quoted(name)} names no photo")
            continue
        if not label:
            wrong.add(f"{where}: {quoted(name)} has no {table.columns[label_at]}")
        elif not is_utf8(label):
            wrong.add(f"{where}: label {show_label(label)} is not UTF-8; {_IN_UTF8}", _LABELS_ALIKE)
        if isinstance(path, str):
            missing += 1
            if is_utf8(name):
                wrong.add(f"{where}: {path}")
            else:
                wrong.add(f"{where}: {path}, which is not UTF-8; {_IN_UTF8}", _NAMES_ALIKE)
            continue
        if not anywhere and not path.is_relative_to(root):
            wrong.add(f"{where}: {quoted(name)} lies outside of the data folder {root}")
        elif path in lines:
            wrong.add(f"{where}: {quoted(name)} is in {table.where(lines[path])}, too")
        lines.setdefault(path, row.number)
        entries.append(TableEntry(path, label, part))
    if not checked:
        return [entry for entry in entries if entry.label]
    wrong.check(_remedy(missing, len(rows), images if config.images else root))
    return entries


def _remedy(missing: int, rows: int, images: Path) -> str:
    if not missing:
        return ""
    have = "has none" if missing == 1 else "have none"
    return f"{missing} of {rows} rows {have} below {images}; see data.images and data.suffix"


def _open(root: Path, config: DataConfig) -> Table:
    option = "--data" if os.path.isabs(config.csv) else "data.csv ="
    where = f"{option} {quoted(config.csv)}"
    if "\0" in config.csv:
        raise DataError(f"{where} can't be read: it is no name of a file")
    try:
        return open_table(root / config.csv, config.columns)
    except EmptyTable:
        raise DataError(f"{root / config.csv} is empty; write lines of id,label") from None
    except FileNotFoundError:
        raise DataError(f"{where}: no such file in {root}") from None
    except OSError as error:
        raise DataError(f"{where} can't be read: {error.strerror or error}") from error


def _images(root: Path, config: DataConfig) -> Path:
    if config.images:
        return images_folder(root, config)
    return root / "train" if (root / "train").is_dir() else root


def images_folder(root: Path, config: DataConfig) -> Path:
    """Return the folder `data.images`.

    Raises:
        OptionError: It is not below `root`.
        DataError: It does not exist.
    """
    if Path(config.images).is_absolute() or ".." in Path(config.images).parts:
        raise OptionError(f"data.images = {quoted(config.images)}: name a folder below {root}")
    if not os.path.isdir(root / config.images):
        raise DataError(f"data.images = {quoted(config.images)}: no such folder in {root}")
    return root / config.images


def columns_option(paths: str, labels: str) -> str:
    """Return the option that names the two columns, as it is written in a shell."""
    return quote(f"data.columns={json.dumps([paths, labels], ensure_ascii=False)}")


def _other(table: Table, paths: str, labels: str | None) -> str:
    """Return the name of a likely column of labels, for an example."""
    others = [at for at, name in enumerate(table.columns) if name != paths]
    return labels or table.columns[likely_labels(table, others)]


def _parts(words: list[str], parts: Callable[[str], str]) -> list[str]:
    """Return the split of each row by the words in its column of parts.

    The column is used if all its words are names of splits. Without validation photos among them,
    those are drawn from the training photos.
    """
    found = [parts(word.strip().casefold()) for word in words]
    if not all(found) or "train" not in found:
        return [""] * len(words)
    return found if "valid" in found else [part if part == "test" else "" for part in found]
