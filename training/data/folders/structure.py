"""Recognise how the folders of a data set are laid out, before any folder is taken for a class.

    CLASS/photo.jpg               a folder per class
    train/CLASS/photo.jpg         parts, with a folder per class in each
    CLASS/train/photo.jpg         parts inside the classes

All may lie one or more folders deeper (an archive's top folder, `images/`). A layout that can be
read in two ways, and one that is no layout of classes, is refused with what settles it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from serving.errors import DataError
from serving.imaging.formats import SUFFIXES
from serving.terminal import quote_path
from training.data.folders.label_hints import labels_hint, other_files_hint
from training.data.folders.levels import inside, levels
from training.data.folders.other_tasks import check_task
from training.data.folders.outer_folders import (
    check_outer,
    check_sets,
    names_warning,
    read_inner,
)
from training.data.folders.part_names import (
    is_clear_part,
    meant_part,
    mentions_part,
    part_of,
    resembles_part,
)
from training.data.folders.photo_tree import CLASS, PhotoFolder
from training.data.folders.structure_result import PARTS, Structure
from training.data.folders.synset_names import names_of_synsets
from training.utils.console import pluralize, quoted

AS_CLASSES: Final = "data.layout=classes"
"""Option that takes every folder for a class."""


def find_structure(
    root: Path, tree: PhotoFolder, *, layout: str = "auto", keep_synsets: bool = False,
    has_split: bool = False,
) -> Structure:  # fmt: skip
    """Recognise the layout of a data folder.

    Args:
        root: The data folder.
        tree: Its content.
        layout: "auto", "classes" to take every folder for a class, or "inner" to take those of
            the innermost level that all have about the same names.
        keep_synsets: Whether the numbers of ImageNet's synsets are labels, even if a list of their
            names is there.
        has_split: Whether a `--split` file determines the parts.

    Raises:
        DataError: The layout is unknown, or can be read in two ways.
    """
    base = tree
    for base in levels(tree):
        if layout != "classes":
            check_task(root, base)
    if layout == "classes":
        found = _read_classes(root, base, base.children)
    elif layout == "inner":
        found = read_inner(root, base, has_split=has_split)
    else:
        parts = [
            (part, kid, inner)
            for kid in base.children
            if (part := part_of(kid.name)) and (inner := inside(kid)).children
        ]
        if parts:
            found = _read_parts(root, base, parts, has_split=has_split)
        else:
            if not has_split:
                check_sets(root, base)
            inside_out = _inside_out(root, base)
            found = inside_out or _read_flat(root, base, has_split=has_split)
    found.base = base.path
    if base.path:
        found.line += f", in {base.path}/"
    if not keep_synsets:
        _use_synset_names(root, base, found)
    return found


def _read_parts(
    root: Path,
    base: PhotoFolder,
    parts: Sequence[tuple[str, PhotoFolder, PhotoFolder]],
    *,
    has_split: bool,
) -> Structure:
    """Read folders of parts with class folders in them.

    Args:
        root: The data folder.
        base: Folder that contains the parts.
        parts: Name of the part, its folder, and the folder in which the classes begin.
        has_split: Whether a `--split` file determines the parts.
    """
    where = root / base.path
    folders: dict[str, PhotoFolder] = {}
    for part, kid, _ in parts:
        if part in folders:
            raise DataError(f"{where} has both {folders[part].name}/ and {kid.name}/; keep one")
        folders[part] = kid
    have = ", ".join(f"{folders[part].name}/" for part in PARTS if part in folders)
    others = [kid for kid in base.children if not part_of(kid.name)]
    if others and not has_split:
        slip = next((kid for kid in others if resembles_part(kid.name) not in {"", *folders}), None)
        other = slip or others[0]
        remedy = _renaming(where, other.name) if slip else "move it elsewhere"
        raise DataError(
            f"{where} has {have} and beside them {quoted(f'{other.name}/')}; {remedy}, or, if all "
            f"of them are classes, add {AS_CLASSES}"
        )
    if not has_split:
        _check_parts(root, base, folders, have)
    found = Structure()
    starts = {part: inner for part, _, inner in parts}
    classes = [folder.name for folder in starts["train"].children] if "train" in starts else []
    if not has_split:
        start = starts.get("train", base)
        _check_class_folders(root, start, found)
        found.warning = check_outer(root / start.path, start.children)
    found.add_classes(others)
    for part in (one for one in PARTS if one in folders):
        inner = inside(folders[part], classes)
        found.roles[folders[part].path] = f"{part} part"
        (only, *more) = inner.children
        if part == "test" and not more and only.name not in classes and classes:
            found.add_unlabelled(only)  # test/unknown/
        else:
            found.add_classes(inner.children, part)
    for kid in base.children:
        if part_of(kid.name) == "test" and kid is not folders.get("test"):
            found.add_unlabelled(kid)
    told = [f"{folders[part].name}/" for part in PARTS if found.counts(part)]
    found.line = f"parts {', '.join(told)}, with a folder per class in each"
    unlabelled = [kid for kid in base.children if kid.path in found.roles]
    for kid in unlabelled:
        if part_of(kid.name) == "test" and not found.counts("test"):
            found.line += f", and {kid.name}/ with {kid.total:,} unlabelled photos"
    if "valid" not in folders and not has_split:
        found.draw_validation()
    return found


def _renaming(where: Path, name: str) -> str:
    """Return the question and the command for a folder whose name is a slip of a part's name."""
    meant = meant_part(name)
    return (
        f"did you mean {meant}/? rename it: mv {quote_path(where / name)} "
        f"{quote_path(where / meant)}"
    )


def _check_parts(root: Path, base: PhotoFolder, folders: dict[str, PhotoFolder], have: str) -> None:
    """Check that there is a folder for training, and that none for validation lacks classes."""
    where = root / base.path
    for part in ("train", "valid"):
        if part in folders:
            continue
        for other in base.sorted_folders:
            if part_of(other.name) == part:
                what = "is empty" if other.is_empty else "contains no folder with photos"
                raise DataError(
                    f"{where / other.name} {what}; expected {other.name}/CLASS/photo.jpg"
                    + ("; or move it elsewhere, to hold out photos of train/" * (part == "valid"))
                )
        if part == "train":
            raise DataError(
                f"{where} has {have} but no train/; add it, or put the classes one level up"
            )


def _inside_out(root: Path, base: PhotoFolder) -> Structure | None:
    """Read class folders with folders of parts in them; None: that is not the layout."""
    where = root / base.path
    kids = [kid for kid in base.children if not resembles_part(kid.name)]
    inner = {kid.name: _parts_in(kid) for kid in kids}
    inverted = [kid for kid in kids if inner[kid.name]]
    if not inverted:
        return None
    folders = [folder for kid in inverted for _, folder in inner[kid.name]]
    if all(folder.children and not folder.photos for folder in folders):
        first = inverted[0]
        raise DataError(
            f"{where} has folders with parts of their own, and these have class folders: "
            f"{folders[0].path}/{folders[0].children[0].name}/; give one of them, as in --data "
            f"{quote_path(where / first.name)}, or, if {first.name}/ is a class, add "
            f"{AS_CLASSES}"
        )
    example = inverted[0]
    names = ", ".join(f"{example.name}/{folder.name}/" for _, folder in inner[example.name])
    if inverted != base.children:
        other = next(kid for kid in base.children if kid not in inverted)
        raise DataError(
            f"{where} has parts in some classes ({names}) and not in {other.name}/; put a train/ "
            f"into each class folder, or, if those are no parts, add {AS_CLASSES}"
        )
    found = Structure()
    present = {part for kid in kids for part, _ in inner[kid.name]}
    if "train" not in present:
        raise DataError(f"{where} has {names} but no train/ in any class; rename or add it")
    for kid in kids:
        for part, folder in inner[kid.name]:
            found.photos += [(path, kid.name, part) for path in folder.below()]
            found.roles[folder.path] = f"{part} part"
        found.roles[kid.path] = f"{CLASS} with parts"
    _check_class_folders(root, base, found)
    found.line = f"a folder per class with parts in each ({names})"
    found.warning = names_warning(root, base, kids)
    if "valid" not in present:
        found.draw_validation()
    return found


def _parts_in(folder: PhotoFolder) -> list[tuple[str, PhotoFolder]]:
    """Return the parts of a class folder; [] if what is in it are not just parts."""
    parts = [(part_of(kid.name), kid) for kid in folder.children]
    if folder.photos or not parts or not all(part for part, _ in parts):
        return []
    names = [part for part, _ in parts]
    return parts if len(set(names)) == len(names) else []


def _read_flat(root: Path, base: PhotoFolder, *, has_split: bool) -> Structure:
    """Read class folders, beside which a folder of unlabelled test photos may lie."""
    where = root / base.path
    kids = base.children
    parts = [kid for kid in kids if resembles_part(kid.name)]
    mentioned = {mentions_part(kid.name) for kid in kids}
    if (parts and len(parts) >= len(kids) - 1) or (len(mentioned) > 1 and all(mentioned)):
        _refuse_parts(root, base, parts or kids)
    unlabelled = []
    for kid in parts:
        part = part_of(kid.name)
        if part == "test" and is_clear_part(kid.name):
            unlabelled.append(kid)
        elif (
            part and not has_split and kid.name.casefold() != "train"
        ):  # trains are a class beside buses
            raise DataError(
                f"{where} has class folders and beside them {quoted(f'{kid.name}/')}, whose name "
                f"is that of a part and which has no class folders; move it elsewhere, or, if it "
                f"is a class, add {AS_CLASSES}"
            )
    classes = [kid for kid in kids if kid not in unlabelled]
    warning = "" if has_split else check_outer(where, classes)
    found = _read_classes(root, base, classes, check=not has_split)
    found.warning = warning
    for kid in unlabelled:
        found.add_unlabelled(kid)
        found.line += f", and {kid.name}/ with {kid.total:,} unlabelled photos"
    return found


def _refuse_parts(root: Path, base: PhotoFolder, parts: Sequence[PhotoFolder]) -> NoReturn:
    have = ", ".join(f"{kid.name}/ ({pluralize(kid.total, 'photo')})" for kid in base.children)
    slips = [(kid.name, part) for kid in parts if not part_of(kid.name)
             and (part := resembles_part(kid.name) or mentions_part(kid.name))]  # fmt: skip
    if slips:
        remedy = "; ".join(f"rename {name}/ to {part}/" for name, part in slips)
    else:
        hint = labels_hint(root, base)
        name = next((kid.name for kid in parts if part_of(kid.name) == "train"), parts[0].name)
        remedy = hint or (
            f"expected {name}/CLASS/photo.jpg, or labels from file names (data.pattern) or from a "
            "table (data.csv)"
        )
    raise DataError(
        f"{root / base.path} has {have}: these are names of parts, not of classes; {remedy}; or, "
        f"if they are classes, add {AS_CLASSES}"
    )


def _read_classes(
    root: Path, base: PhotoFolder, folders: Sequence[PhotoFolder], *, check: bool = True
) -> Structure:
    where = root / base.path
    if not folders:
        hint = labels_hint(root, base)
        raise DataError(
            f"{where} contains no folder with photos; {f'{hint}; or ' if hint else ''}expected "
            f"{where.name}/CLASS/photo.jpg, or labels from file names (data.pattern) or from a "
            f"table (data.csv){other_files_hint(where, base)}"
        )
    found = Structure()
    if check:
        _check_class_folders(root, base, found)
        if len(folders) == 1 and (hint := labels_hint(root, base)):
            raise DataError(f"{where} has one folder with photos, {folders[0].name}/; {hint}")
    found.add_classes(folders)
    found.line = f"a folder per class, {len(folders)} class{'es' * (len(folders) != 1)}"
    return found


def _check_class_folders(root: Path, base: PhotoFolder, found: Structure) -> None:
    """Check that no class folder is left without a photo because its photos can't be read."""
    for folder in base.sorted_folders:
        if folder.total:
            continue
        if unread := folder.unread():
            kinds = ", ".join(sorted(SUFFIXES))
            why = ", ".join(f"{name} {number}" for name, number in unread.most_common(3))
            raise DataError(
                f"{root / base.path}: {quoted(folder.name)} contains no readable photo ({kinds}) "
                f"but {why}; convert these, or remove the folder"
            )
        if folder.is_empty and not part_of(folder.name):
            found.empty.append(folder.path)
            found.roles[folder.path] = "empty"


def _use_synset_names(root: Path, base: PhotoFolder, found: Structure) -> None:
    """Replace labels that are ImageNet's synsets by their names, if a list of these is there."""
    names = names_of_synsets(root, base, {label for _, label, _ in found.photos})
    if names:
        found.photos = [(path, names.names[label], part) for path, label, part in found.photos]
        found.line += f"; names of the classes from {names.file}"
