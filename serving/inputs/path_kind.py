"""Say what a path is if it is not what a command needs, and which command suits it.

`fledge evaluate bundle` is refused with "bundle is a bundle, not a run: describe it with `fledge
inspect bundle`". Folders of Fledge are recognised by their marks, and other paths by the suffixes
of files. What is there but damaged is left to the command.
"""

from __future__ import annotations

import difflib
import os
from itertools import islice
from pathlib import Path
from typing import Final, Literal

from serving.errors import BundleError, OptionError
from serving.inputs import archives
from serving.inputs.file_kinds import has_mark, is_image, is_image_content, own_picture_kind
from serving.tables.reader import TABLES
from serving.terminal import quote_path
from serving.utils.regular_files import open_regular

Kind = Literal[
    "missing", "bundle", "version", "run", "unfinished", "runs", "photos", "folder",
    "recipe", "weights", "graph", "table", "archive", "photo", "report", "file",
]  # fmt: skip
Wanted = Literal["run", "resumable", "bundle", "photos", "table", "recipe"]

_NAMES: Final[dict[Kind, str]] = {
    "bundle": "a bundle",
    "version": "one version in a bundle",
    "run": "a run",
    "unfinished": "a run that is not finished",
    "runs": "a folder of runs",
    "photos": "a folder of photos",
    "folder": "a folder",
    "recipe": "a recipe",
    "weights": "a file of weights",
    "graph": "a graph",
    "table": "a table",
    "archive": "an archive",
    "photo": "a photo",
    "report": "a web page",
    "file": "a file",
}

_WANTED: Final[dict[Wanted, tuple[str, tuple[Kind, ...]]]] = {
    "run": ("a run", ("run", "unfinished", "weights")),
    "resumable": ("a run", ("run", "unfinished")),
    "bundle": ("a bundle", ("bundle",)),
    "photos": ("photos", ("photos", "folder", "photo", "archive", "table", "file")),
    "table": ("a table of scores", ("table", "folder", "file")),
    "recipe": ("a recipe", ("recipe", "file")),
}
"""What a command needs -> its name, and the kinds of paths that are such a thing."""

_INSPECT: Final = "describe it with `fledge inspect {path}`"
_RESUME: Final = "go on with it by `fledge train --resume {path}`"
_TRAIN: Final = "train on it with `fledge train quick --data {path}`"
_MARKS: Final[dict[Wanted, tuple[str, ...]]] = {
    "run": ("run.json", "best.json", "best.safetensors"),
    "resumable": ("run.json", "recipe.toml", "split.csv", "best.json"),
    "bundle": ("manifest.json", "manifest.sha256"),
}
"""What a command needs -> files by which the command itself says what is wrong with it."""

_ADVICE: Final[dict[tuple[Wanted, Kind], str]] = {
    ("run", "bundle"): _INSPECT,
    ("run", "version"): "describe its bundle with `fledge inspect {parent}`",
    ("run", "runs"): "name one of them, such as {first}",
    ("run", "photos"): _TRAIN,
    ("run", "recipe"): "train with it by `fledge train {path} --data photos`",
    ("run", "graph"): "name the run that it was exported from",
    ("resumable", "weights"): "name the run's folder, `fledge train --resume {parent}`",
    ("bundle", "version"): "name the bundle, {parent}",
    ("bundle", "run"): "make a bundle of it with `fledge export {path} --out bundle`",
    ("bundle", "unfinished"): _RESUME,
    ("bundle", "runs"): "make a bundle of one with `fledge export {first} --out bundle`",
    ("bundle", "photos"): _TRAIN,
    ("bundle", "photo"): "name the bundle's folder",
    ("bundle", "weights"): "name a bundle, which `fledge export` makes of a run",
    ("bundle", "graph"): "name the bundle's folder",
    ("bundle", "recipe"): "train with it by `fledge train {path} --data photos`",
    ("photos", "bundle"): _INSPECT,
    ("photos", "version"): "describe its bundle with `fledge inspect {parent}`",
    ("photos", "run"): "evaluate it with `fledge evaluate {path}`",
    ("photos", "unfinished"): _RESUME,
    ("photos", "runs"): "evaluate one with `fledge evaluate {first}`",
    ("photos", "recipe"): "train with it by `fledge train {path} --data photos`",
    ("table", "photos"): "make a table with `fledge score {path} --bundle bundle --out scores.csv`",
    ("table", "photo"): "make a table with `fledge score {path} --bundle bundle --out scores.csv`",
    (
        "table",
        "archive",
    ): "make a table with `fledge score {path} --bundle bundle --out scores.csv`",
    ("table", "bundle"): "make a table with `fledge score photos --bundle {path} --out scores.csv`",
    ("table", "run"): "evaluate it with `fledge evaluate {path}`",
    ("table", "unfinished"): _RESUME,
    ("recipe", "photos"): _TRAIN,
    ("recipe", "archive"): _TRAIN,
    ("recipe", "run"): "train with its recipe by `fledge train {path}/recipe.toml --data photos`",
    ("recipe", "unfinished"): _RESUME,
    ("recipe", "runs"): "train with the recipe of one by `fledge train {first}/recipe.toml "
    "--data photos`",
    ("recipe", "bundle"): _INSPECT,
    ("recipe", "version"): "describe its bundle with `fledge inspect {parent}`",
    ("recipe", "weights"): "start from it with `fledge train quick --data photos --weights {path}`",
}

_SUFFIXES: Final[dict[str, Kind]] = {
    ".toml": "recipe",
    **dict.fromkeys((".safetensors", ".pth", ".pt", ".ckpt"), "weights"),
    **dict.fromkeys((".onnx", ".pt2", ".ts"), "graph"),
    **dict.fromkeys(TABLES, "table"),
    **dict.fromkeys((".html", ".htm"), "report"),
}  # fmt: skip
_HEAD: Final = 64
_MOST: Final = 1000
"""Largest number of entries of a folder that are looked at."""


def kind_of(path: Path) -> Kind:
    """Return what a path is, judged by the names of files."""
    try:
        if path.is_dir():
            return _folder_kind(path)
        if not path.exists():
            return "missing"
    except (OSError, ValueError):
        return "missing"
    if is_image(path.name):
        return "photo"
    if path.name.lower().endswith((*archives.SUFFIXES, *archives.OTHER_SUFFIXES)):
        return "archive"
    kind = _SUFFIXES.get(path.suffix.lower(), "file")
    inner = Path(path.stem).suffix.lower()  # such as scores.csv.gz
    return "table" if kind == "file" and inner in TABLES else kind


def require(path: Path, wanted: Wanted, option: str = "") -> None:
    """Check that a path is not obviously something else than a command needs.

    A path that does not exist is left to the command, unless one of a similar name exists; that of
    photos always is.

    Args:
        path: The path.
        wanted: What the command needs.
        option: The option with which the path was given; "" if it has none.

    Raises:
        BundleError: A bundle is needed, and the path is something else.
        OptionError: Something else is needed, and the path is not that.
    """
    sentence = not_wanted(path, wanted, option)
    if sentence:
        raise (BundleError if wanted == "bundle" else OptionError)(sentence)


def not_wanted(path: Path, wanted: Wanted, option: str = "") -> str:
    """Return a sentence about a path that is not what a command needs; "" if there is none.

    Args:
        path: The path.
        wanted: What the command needs.
        option: The option with which the path was given, such as "--data"; "" if it has none.
    """
    kind = kind_of(path)
    name, kinds = _WANTED[wanted]
    if kind == "missing":
        if wanted == "photos":  # may be a pattern, a member of an archive or a set by its name
            return ""
        near = similar(path, wanted)
        return f"{option} {path}: there is none; did you mean {near}?".lstrip() if near else ""
    if wanted == "photos" and path.is_file() and _is_photo(path):
        return ""  # whatever its name
    if wanted == "run" and kind == "unfinished" and not _has(path, "best.json"):
        return f"{path} was stopped before its first epoch was saved: {_RESUME}".format(
            path=quote_path(path)
        )
    if kind in kinds or any(_has(path, mark) for mark in _MARKS.get(wanted, ())):
        return ""
    advice = _ADVICE.get((wanted, kind))
    if wanted == "resumable":
        advice = advice or _ADVICE.get(("run", kind))
    if advice is None and wanted in _MARKS:
        return ""
    sentence = f"{option} {path} is {_NAMES[kind]}, not {name}".lstrip()
    if advice is None:
        return sentence
    first = _first_run(path) if kind == "runs" else path
    places = {"path": path, "parent": path.parent, "first": first}
    return (
        f"{sentence}: {advice.format(**{key: quote_path(place) for key, place in places.items()})}"
    )


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle."""
    return has_mark(os.fspath(folder), "manifest.json")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, finished or not."""
    return has_mark(os.fspath(folder), "run.json")


def _folder_kind(folder: Path) -> Kind:
    if is_bundle(folder):
        return "bundle"
    if is_run(folder):
        return "unfinished" if (folder / "last").is_dir() else "run"
    if _has(folder, "model.onnx") and is_bundle(Path(os.path.abspath(folder)).parent):
        return "version"
    entries = _entries(folder)
    folders = [Path(entry.path) for entry in entries if entry.is_dir()]
    runs = [one for one in folders if is_run(one)]  # their pictures are no photos
    classes = [one for one in folders if one not in runs and not is_bundle(one)]
    inside = [entry for one in classes for entry in _entries(one)]
    if any(is_image(one.name) and not own_picture_kind(one) for one in (*entries, *inside)):
        return "photos"
    return "runs" if runs else "folder"


def similar(path: Path, wanted: Wanted) -> str:
    """Return an existing path of a similar name that is what a command needs, quoted; or ""."""
    if wanted in ("run", "resumable") and is_run(Path("runs") / path):
        return quote_path(Path("runs") / path)
    known = [entry.name for entry in _entries(path.parent)]
    names = difflib.get_close_matches(path.name, known, n=3, cutoff=0.75)
    kinds = [kind for kind in _WANTED[wanted][1] if kind != "file"]
    return next((quote_path(path.with_name(one)) for one in names
                 if kind_of(path.with_name(one)) in kinds), "")  # fmt: skip


def _first_run(folder: Path) -> Path:
    runs = [folder / entry.name for entry in _entries(folder) if is_run(Path(entry.path))]
    return min(runs, key=lambda run: (run.name != "latest", (run / "last").is_dir(), run.name))


def _is_photo(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return is_image_content(file.read(_HEAD))
    except OSError:
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, _MOST))
    except OSError:
        return []


def _has(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):
        return False
