"""Choose the columns of a table by their usual names: the photo's path, its label and its part."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from serving.errors import DataError
from serving.imaging.formats import SUFFIXES

if TYPE_CHECKING:
    from serving.tables.reader import Table

PATHS: Final = (
    *("path", "filepath", "file path", "image path", "img path", "photo path", "filename"),
    *("file name", "image name", "image file", "image filename", "img name", "photo name"),
    *("file", "files", "filepaths", "filenames", "image", "images", "img", "photo", "picture"),
    *("dateipfad", "dateiname", "datei", "bild", "foto", "fichier", "nom du fichier", "chemin"),
    *("archivo", "nombre de archivo", "imagen", "ruta", "arquivo", "imagem", "immagine", "bestand"),
    *("image id", "img id", "photo id", "file id", "id", "uuid", "key", "name"),
)
"""Usual names of the column of paths, most specific first, in several languages."""

LABELS: Final = (
    *("label", "labels", "class", "classes", "class name", "class label", "label name"),
    *("category", "category name", "target", "ground truth", "truth", "true label", "y"),
    *("species", "breed", "variety", "diagnosis", "dx", "kind", "tag"),
    *("klasse", "kategorie", "etikett", "classe", "categorie", "catégorie", "étiquette", "espèce"),
    *("clase", "categoría", "categoria", "etiqueta", "especie", "etichetta", "specie"),
)
"""Usual names of the column of labels."""

PARTS: Final = ("fold", "part", "split", "subset", "partition", "set", "data set", "dataset")
"""Usual names of the column that says to which part of a data set a photo belongs."""

_SAMPLE: Final = 20
"""Number of rows in which names of images are looked for."""
_GUESSED: Final = 200
"""Number of rows in which a column that looks like labels is searched."""
_SHOWN: Final = 20


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


_USUAL: Final = frozenset(map(_key, (*PATHS, *LABELS, *PARTS)))


def has_image_suffix(name: str) -> bool:
    """Check whether a text ends like the name of an image, such as `.jpg`."""
    return os.path.splitext(name.strip())[1].lower() in SUFFIXES


def names_columns(record: Sequence[str], asked: Collection[str] = ()) -> bool:
    """Check whether the first record of a table names the columns.

    It does not if it has the name of an image, or if the user counts the columns and none has a
    usual name.

    Args:
        record: The fields.
        asked: Names of columns that the user has given.
    """
    if any(name in asked for name in record):
        return True
    counted = bool(asked) and all(name.isdecimal() for name in asked)
    return not any(map(has_image_suffix, record)) and (has_usual_name(record) or not counted)


def has_usual_name(names: Sequence[str]) -> bool:
    """Check whether any of the names is a usual name of a column."""
    return any(_key(name) in _USUAL for name in names)


def usual_columns(columns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the indices of the columns with a usual name, in the order of `names`."""
    places = {_key(name): place for place, name in reversed(list(enumerate(names)))}
    found = [(places[_key(name)], at) for at, name in enumerate(columns) if _key(name) in places]
    return [at for _, at in sorted(found)]


def asked_column(columns: Sequence[str], asked: str, where: object, remedy: str) -> int:
    """Return the index of the column that the user has named.

    The name may differ in case, spaces and punctuation if that is unambiguous. Where no column is
    called so, a number counts the columns from 1.

    Args:
        columns: Names of the columns.
        asked: The name.
        where: Name of the table, for the error message.
        remedy: What the user can do; ends the error message.

    Raises:
        DataError: No column, or several, are called so.
    """
    exact = [at for at, name in enumerate(columns) if name == asked.strip()]
    found = exact or [at for at, name in enumerate(columns) if _key(name) == _key(asked) != ""]
    if not found and asked.isdecimal() and 0 < int(asked[:9]) <= len(columns):
        return int(asked) - 1
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{where}: {len(found)} columns are called {asked!r}; rename one")
    raise DataError(f"{where}: no column {asked!r} among {shown(columns)}{remedy}")


def find_paths(
    table: Table,
    asked: str | None,
    where: object,
    option: Callable[[str], str],
    *,
    preferred: str = "path",
    always: bool = True,
    is_photo: Callable[[str], bool] = has_image_suffix,
) -> int:
    """Return the index of the column that has the names of the photos.

    It is the column that the user has named; else the only one; else the preferred one; else the
    one with a usual name, or, of several, the one of which the first rows are names of photos;
    else, where no column has a usual name, the only one of which the first rows are such names.

    Args:
        table: The table.
        asked: The name that the user has given, or None.
        where: Name of the table, for the error message.
        option: Function that returns, for the name of a column, the option that chooses it.
        preferred: Name of the column that is taken where several are equally likely.
        always: Whether the preferred column is taken even if others are more likely.
        is_photo: Function that checks whether a value is the name of a photo; where that holds for
            no column, values that end like the name of an image are taken for one.

    Raises:
        DataError: There is no such column, or several are equally likely.
    """
    columns = table.columns
    usual = usual_columns(columns, PATHS)
    remedy = f"; name the column of the photos: {option(columns[usual[0] if usual else 0])}"
    if asked is not None:
        return asked_column(columns, asked, where, remedy)
    for name in (preferred, *(columns[at] for at in usual)):
        if columns.count(name) > 1:
            raise DataError(f"{where}: {columns.count(name)} columns are called {name}; rename one")
    if always and preferred in columns:
        return columns.index(preferred)
    if len(columns) == 1 or len(usual) == 1:
        return usual[0] if usual else 0
    rows = list(islice(table.rows(range(len(columns))), _SAMPLE))
    photos: list[int] = []
    for check in (is_photo, has_image_suffix):
        photos = photos or [
            at
            for at in usual or range(len(columns))
            if rows and all(check(text_of(row.values[at])) for row in rows)
        ]
    likely = photos or usual
    if len(photos) != 1 and preferred in [columns[at] for at in likely]:
        return columns.index(preferred)
    if len(photos) == 1 or (likely and not photos):
        return likely[0]
    which = [columns[at] for at in likely] or columns
    several = "several columns of photos" if likely else "no column of photos"
    raise DataError(f"{where}: {several} among {shown(which)}{remedy}")


def find_labels(
    table: Table, asked: str | None, paths: int, where: object, option: Callable[[str], str]
) -> int:
    """Return the index of the column that has the labels.

    It is the column that the user has named; else the one called label; else the only one with a
    usual name; else the other one of two columns.

    Args:
        table: The table.
        asked: The name that the user has given, or None.
        paths: Index of the column of the photos.
        where: Name of the table, for the error message.
        option: Function that returns, for the name of a column, the option that chooses it.

    Raises:
        DataError: There is no such column, or several are equally likely.
    """
    columns = table.columns
    others = [at for at in range(len(columns)) if at != paths]
    usual = [at for at in usual_columns(columns, LABELS) if at != paths]
    guess = usual[0] if usual else likely_labels(table, others)
    remedy = f"; name the column of the labels: {option(columns[guess])}"
    if asked is not None:
        return asked_column(columns, asked, where, remedy)
    if columns.count("label") == 1 or len(usual) == 1:
        return columns.index("label") if "label" in columns else usual[0]
    if len(others) == 1:
        return others[0]
    if not others:
        raise DataError(
            f"{where}: one column alone, {columns[0]!r:.80}; separate path and label by commas, "
            "semicolons or tabs"
        )
    which = [columns[at] for at in usual] or columns
    several = "several columns of labels" if usual else "no column of labels"
    if not usual and _are_probabilities(table, others):
        remedy = f"; they have numbers such as probabilities: give the table of labels{remedy}"
    raise DataError(f"{where}: {several} among {shown(which)}{remedy}")


def _are_probabilities(table: Table, columns: Sequence[int]) -> bool:
    """Check whether the first rows have only numbers, and any of them is no whole number."""
    values = [
        text_of(value).strip()
        for row in islice(table.rows(columns), _SAMPLE)
        for value in row.values
    ]
    digits = [value.replace(".", "", 1).replace("e-", "", 1) for value in values]
    return any("." in value for value in values) and all(map(str.isdecimal, digits))


def likely_labels(table: Table, columns: Sequence[int]) -> int:
    """Return the column of `columns` that looks most like labels: a few words that repeat."""
    rows = [row.values for row in islice(table.rows(columns), _GUESSED)]
    best, fewest = columns[0] if columns else 0, _GUESSED + 1
    for at, column in enumerate(columns):
        values = {text_of(row[at]).strip() for row in rows if at < len(row)}
        if not all(map(str.isdecimal, values)) and 1 < len(values) < fewest:
            best, fewest = column, len(values)
    return best


def text_of(value: object) -> str:
    """Return the text of a value in a row; "" for none. A whole number has no decimal point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value)


def shown(columns: Sequence[str]) -> str:
    """Return the names of the columns for an error message."""
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return ", ".join(f"{name!r:.80}" for name in columns[:_SHOWN]) + more
