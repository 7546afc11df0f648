r"""Find the photos that a table names, whichever system, folder and program the names come from.

Names are tried as they are, below the folder of the photos, the data folder and the folder of the
table. Where photos are missing, all photos below the data folder are listed, and one rule is looked
for that fits the names: a beginning of the names that is left out (`C:\Users\me\photos`,
`/content/drive/photos`), and a folder below which the rest is found. The rest may differ in
separators, case, Unicode form, and may lack the suffix. Names without folders may also be spread
over folders, if each of them is there once.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from serving.errors import DataError
from serving.imaging.formats import SUFFIXES
from serving.tables.columns import has_image_suffix
from serving.terminal import quote
from training.data.folders.part_names import part_of
from training.utils.console import quoted

_DRIVE: Final = re.compile(r"[A-Za-z]:(?=/)")
_MOST_EQUAL: Final = 100
"""Largest number of photos of one name that are considered for a name in the table."""


class _Rule(NamedTuple):
    """What is left out of the names, and the folder below which the rest is found."""

    prefix: tuple[str, ...]
    folder: tuple[str, ...]


def locate(
    names: Sequence[str],
    bases: Sequence[Path],
    root: Path,
    photos: Callable[[], Iterable[Path]],
    where: object,
    option: str = "",
) -> list[Path | str]:
    """Find the photo of each name.

    Args:
        names: Names in a table.
        bases: Folders below which the names are looked for, most likely one first.
        root: Data folder.
        photos: Function that lists all photos in which names may be looked for, below `root`.
        where: Name of the table, for the error message.
        option: Option that names the folder of the photos, such as "data.images"; "" if photos lie
            only below `bases`.

    Returns:
        For each name, the path of its photo, or a text that says why there is none.

    Raises:
        DataError: Several folders have all the photos, and `option` can say which is meant.
    """
    found = [path and _below(path, root) for path in _as_written(names, bases)]
    if None not in found:
        return [path for path in found if path is not None]
    index = _index(root, photos())
    split = [_parts(name) for name in names]
    candidates = [_candidates(parts, index) for parts in split]
    if not any(found) and _are_scattered(split, candidates, bases, root):
        return [root.joinpath(*photo) for choices in candidates for _, photo in choices]
    rule = _rule(candidates, bases, root, where, option)
    return [
        path or _choose(name, rule, choices, root)
        for name, path, choices in zip(names, found, candidates, strict=True)
    ]


def exists(name: str, bases: Sequence[Path]) -> bool:
    """Check whether a name, with or without a suffix, is a photo below one of the folders."""
    names = (name, *(f"{name}{suffix}" for suffix in SUFFIXES))
    return any(_file(base, one) for base in bases for one in names)


def _file(base: Path, name: str) -> Path | None:
    # pathlib raises an error for names that are too long and unreadable folders; os.path does not.
    for one in dict.fromkeys((name, name.replace("\\", "/"))):
        path = os.path.normpath(os.path.join(base, one))
        if one and os.path.isfile(path):
            return Path(path)
    return None


def _below(path: Path, root: Path) -> Path:
    """Return the path below `root` of a photo whose path leads there through links."""
    if path.is_relative_to(root):
        return path
    real = Path(os.path.realpath(path.parent)) / path.name
    return real if real.is_relative_to(root) else path


def _as_written(names: Sequence[str], bases: Sequence[Path]) -> list[Path | None]:
    """Return the photos that exist as written below one folder: the first that has any."""
    for base in dict.fromkeys(bases):
        found = [_file(base, name) for name in names]
        if any(found):
            return found
    return [None] * len(names)


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _parts(name: str) -> tuple[str, ...]:
    """Return the folded parts of a name; an absolute one starts with "/" or a drive."""
    path = _fold(name.replace("\\", "/"))
    parts = [part for part in path.split("/") if part not in ("", ".")]
    start = ["/"] if path.startswith("/") and not _DRIVE.match(path) else []
    return tuple(start + parts)


Index = dict[str, list[tuple[str, ...]]]
"""Paths of photos, as parts below the data folder, by their folded name with or without suffix."""


def _index(root: Path, photos: Iterable[Path]) -> Index:
    index: Index = {}
    for photo in photos:
        parts = photo.relative_to(root).parts
        name = _fold(parts[-1])
        for key in (name, os.path.splitext(name)[0]):
            places = index.setdefault(key, [])
            if len(places) < _MOST_EQUAL:
                places.append(parts)
    return index


def _candidates(parts: tuple[str, ...], index: Index) -> list[tuple[_Rule, tuple[str, ...]]]:
    """Return the photos that a name may mean, each with the rule by which it does.

    Of photos with the same name, those with the most folders in common are meant.
    """
    found: list[tuple[_Rule, tuple[str, ...]]] = []
    most = 1
    for photo in index.get(parts[-1], ()) if parts else ():
        # The last part is equal, or lacks the suffix. A name with a suffix means no other one.
        if has_image_suffix(parts[-1]) and _fold(photo[-1]) != parts[-1]:
            continue
        pairs = zip(reversed(parts[:-1]), reversed(photo[:-1]), strict=False)
        same = 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == _fold(pair[1]), pairs))
        if same > most:
            found, most = [], same
        if same == most:
            found.append((_Rule(parts[:-same], photo[:-same]), photo))
    return found


def _are_scattered(
    names: Sequence[tuple[str, ...]],
    candidates: Sequence[Sequence[tuple[_Rule, tuple[str, ...]]]],
    bases: Sequence[Path],
    root: Path,
) -> bool:
    """Return whether each name means one photo, by its last part alone, in whichever folder.

    Names with folders, photos right in one of `bases`, and photos of a validation or test part are
    a matter of one rule for all.
    """
    usual = [base.relative_to(root).parts for base in bases if base.is_relative_to(root)]
    return all(
        len(parts) == 1
        and len(choices) == 1
        and (folder := choices[0][0].folder) not in usual
        and not (folder and part_of(folder[0]) in ("valid", "test"))
        for parts, choices in zip(names, candidates, strict=True)
    )


def _rule(
    candidates: Sequence[Sequence[tuple[_Rule, tuple[str, ...]]]],
    bases: Sequence[Path],
    root: Path,
    where: object,
    option: str,
) -> _Rule:
    """Return the rule that fits the most names; a folder of `bases` goes before others.

    Names that do not say so mean no photos of a validation or test part.
    """
    usual = [_Rule((), base.relative_to(root).parts) for base in bases if base.is_relative_to(root)]
    folders = {rule.folder for rule in usual}
    votes = Counter(
        rule
        for choices in candidates
        for rule in {rule for rule, _ in choices}
        if rule.folder in folders or (option and part_of(rule.folder[0]) not in ("valid", "test"))
    )
    for rule in usual:
        if votes[rule]:
            return rule
    best = sorted(votes.items(), key=lambda item: (-item[1], item[0]))[:2]
    if len(best) == 2 and best[0][1] == best[1][1]:
        first, second = (PurePosixPath(*rule.folder).as_posix() for rule, _ in best)
        if option and first != second and best[0][1] == len(candidates):
            raise DataError(
                f"{where}: its photos are in {quoted(first)} and in {quoted(second)} alike; say "
                f"which: {option}={quote(first)}"
            )
        return usual[0] if usual else _Rule((), ())
    return best[0][0] if best else usual[0] if usual else _Rule((), ())


def _choose(
    name: str, rule: _Rule, choices: Sequence[tuple[_Rule, tuple[str, ...]]], root: Path
) -> Path | str:
    fits = [photo for one, photo in choices if one == rule]
    exact = [photo for photo in fits if photo[-1] == re.split(r"[/\\]", name)[-1]]
    fits = exact if len(exact) == 1 else fits
    if len(fits) == 1:
        return root.joinpath(*fits[0])
    if fits:
        several = " or ".join(quoted(PurePosixPath(*photo)) for photo in fits[:3])
        return f"{quoted(name)} is {several}; write the name with its suffix"
    elsewhere = f" (there is {quoted(PurePosixPath(*choices[0][1]))})" if len(choices) == 1 else ""
    return f"no photo {quoted(name)}{elsewhere}"
