"""Find and load images at addresses such as `s3://bucket/photos`, through the package fsspec.

Available protocols and the source of credentials depend on the installed fsspec packages (s3fs,
gcsfs, adlfs, …).
"""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from serving.errors import BrokenImage, DataError, TooLarge
from serving.inputs import archives, lists
from serving.inputs.compression import FIXED, MAX_FILE
from serving.inputs.file_kinds import Kind, member_kind, named_kind, system_kind
from serving.inputs.folders import Note, is_pattern
from serving.inputs.passed_over import OnPassedOver, not_counted
from serving.utils.natural_sort import natural

_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

Entry = dict[str, Any]
"""Description of a file or folder by fsspec: name, type, …"""


def is_address(name: str) -> bool:
    """Check whether `name` starts with a protocol, such as `s3://`."""
    return _ADDRESS.match(name) is not None


def protocol(name: str) -> str:
    """Return the protocol of an address in lower case, such as "s3"; "" for other names."""
    return name.partition("://")[0].lower() if is_address(name) else ""


def find(address: str, passed_over: OnPassedOver = not_counted) -> Callable[[Note], Iterator[str]]:
    """Check that an address exists, and return a function that lists the images there.

    The address may be that of a file, a folder or a glob pattern. The images of a folder include
    those in subfolders. The order is natural (`2.jpg` before `10.jpg`). What has the name of a
    hidden file, or of a file or folder of a system or tool, is passed over. A pattern matches only
    files, not folders. The returned function takes a function `note`, which it calls with a message
    for each folder that can't be read.

    Args:
        address: The address.
        passed_over: Called for each file and folder that is passed over.

    Raises:
        DataError: The address does not exist, can't be listed, contains `::`, or is that of a list
            or an archive.
    """
    if "::" in address:
        raise DataError(f"{address}: '::' has no meaning in an address; copy archives here")
    try:
        fs, path = _open(address)
        pattern = is_pattern(path) and not fs.exists(path)
        entry = {} if pattern else fs.info(path)
        found = fs.glob(path, detail=True) if pattern else {}
    except FileNotFoundError as error:
        raise DataError(f"{address}: not there") from error
    except Exception as error:  # each package behind fsspec has its own error classes
        raise DataError(f"{address}: can't be listed: {_reason(error)}") from error
    if pattern:
        return lambda note: _with_protocol(
            address, _matching(fs, path, found.values(), passed_over)
        )
    if entry["type"] == "directory":
        return lambda note: _with_protocol(address, _below(fs, entry, note, passed_over))
    if lists.is_table(path) or path.lower().endswith(lists.LINES) or archives.is_archive(path):
        raise DataError(f"{address}: lists and archives are read from files here; copy it first")
    return lambda note: iter([address])


def _with_protocol(address: str, names: Iterator[str]) -> Iterator[str]:
    """Yield `names` with their protocol replaced by that of `address`.

    A file system may have several protocols, such as s3 and s3a. `http` and `file` addresses are
    not changed.
    """
    kind = protocol(address)
    for name in names:
        found = protocol(name)
        yield name if found.startswith(("http", "file")) else kind + name[len(found) :]


def load(address: str) -> bytes | Path:
    """Return the bytes at an address; for a `file://` address, the path of the local file.

    Args:
        address: The address.

    Raises:
        BrokenImage: The file can't be read.
        TooLarge: The file has more than `MAX_FILE` bytes.
    """
    if "::" in address:
        raise BrokenImage("'::' has no meaning in an address")
    try:
        fs, path = _open(address)
        if "file" in fs.protocol:
            return Path(path)
        with fs.open(path, "rb") as file:
            data = _read(file)
    except Exception as error:  # each package behind fsspec has its own error classes
        raise BrokenImage(f"can't be read: {_reason(error)}") from error
    if len(data) > MAX_FILE:
        raise TooLarge(f"more than the {MAX_FILE} bytes {FIXED}")
    return data


def _read(file: Any) -> bytes:
    """Read at most `MAX_FILE` + 1 bytes.

    Checking the file size beforehand is not enough, because a server may not announce the length.
    """
    pieces, left = [], MAX_FILE + 1
    while left > 0 and (piece := file.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _open(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in that file system.

    fsspec's cache of folder listings is turned off, because it could hold millions of names.
    """
    core: Any = importlib.import_module("fsspec.core")
    fs, path = core.url_to_fs(address, use_listings_cache=False)
    return fs, str(path)


def _below(fs: Any, folder: Entry, note: Note, passed_over: OnPassedOver) -> Iterator[str]:
    """Yield the addresses of all images below `folder`, depth-first.

    An explicit stack replaces recursion, because folders may be nested deeper than Python's
    recursion limit.
    """
    levels = [iter([folder])]
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
        elif entry["type"] == "directory":
            try:
                listed = fs.ls(entry["name"], detail=True)
            except Exception as error:  # each package behind fsspec has its own error classes
                name = fs.unstrip_protocol(entry["name"])
                note(f"{name}: {_reason(error)}; what is in it is left out")
            else:
                inner = _sorted(listed, entry["name"], passed_over)
                if any(_is_unnamed(found, entry["name"]) for found in listed):
                    inner += _unnamed(fs, entry["name"], note, passed_over)
                levels.append(iter(inner))
        else:
            yield fs.unstrip_protocol(entry["name"])


def _sorted(entries: list[Entry], folder: str, passed_over: OnPassedOver) -> list[Entry]:
    """Return the images and folders of a folder in natural order.

    The folder itself, which some file systems list too, is removed.
    """
    listed = []
    for entry in entries:
        if entry["name"].rstrip("/") == folder.rstrip("/"):
            continue
        if kind := _kind(entry):
            passed_over(kind.reason, entry["name"], kind.detail)
        else:
            listed.append(entry)
    return sorted(listed, key=lambda entry: natural(_name(entry)))


def _is_unnamed(entry: Entry, folder: str) -> bool:
    """Return whether an entry is a folder with an empty name: `a/` in `a`, of the key `a//1.jpg`.

    The folder itself, which some file systems list too, has no slash at the end, or is a file.
    """
    name = str(entry["name"])
    return entry["type"] == "directory" and name == f"{folder.rstrip('/')}/" != folder


def _unnamed(fs: Any, folder: str, note: Note, passed_over: OnPassedOver) -> list[Entry]:
    """Return the images below the folder with an empty name in `folder`, in natural order.

    `ls` takes such a folder for the one that contains it, so the keys are listed by their prefix.
    """
    start = f"{folder.rstrip('/')}//"
    try:
        if "prefix" not in inspect.signature(getattr(fs, "_find", fs.find)).parameters:
            raise OSError(f"{type(fs).__name__} can't list a folder without a name")
        names = [name for name in fs.find(folder, prefix="/") if name.startswith(start)]
    except Exception as error:  # each package behind fsspec has its own error classes
        note(f"{fs.unstrip_protocol(start)}: {_reason(error)}; what is in it is left out")
        return []
    found = []
    for name in sorted(names, key=lambda name: [natural(part) for part in name.split("/")]):
        *folders, last = name.removeprefix(start).split("/")
        kinds = [kind for part in folders if part and (kind := named_kind(part, is_folder=True))]
        kind = next(iter(kinds), None) or member_kind(last)
        if kind is None:
            found.append({"name": name, "type": "file"})
        else:
            passed_over(kind.reason, name, kind.detail)
    return found


def _kind(entry: Entry) -> Kind | None:
    if entry["type"] == "directory":
        return named_kind(_name(entry), is_folder=True)
    return member_kind(_name(entry))


def _name(entry: Entry) -> str:
    return _last(str(entry["name"]))


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _matching(fs: Any, pattern: str, found: Any, passed_over: OnPassedOver) -> Iterator[str]:
    """Yield the addresses of the files that fsspec found for a glob pattern, in natural order.

    If the pattern has a literal suffix, such as `.bin`, all files are yielded; otherwise only
    images.

    Args:
        fs: The fsspec file system.
        pattern: The glob pattern.
        found: Entries of the file system that match the pattern, including folders.
        passed_over: Called for each file that is passed over.
    """
    suffix = re.search(r"\.[^./*?[\]]+$", pattern)
    hidden = "/." in pattern
    names = [str(entry["name"]) for entry in found if entry["type"] != "directory"]
    for name in sorted(names, key=lambda name: [natural(part) for part in name.split("/")]):
        if not hidden and "/." in name:
            continue
        kind = _system_kind(name, pattern) or (None if suffix else member_kind(_last(name)))
        if kind is None:
            yield fs.unstrip_protocol(name)
        else:
            passed_over(kind.reason, name, kind.detail)


def _system_kind(name: str, pattern: str) -> Kind | None:
    """Return why a file that matches a pattern is passed over: by a system's name not in it."""
    *folders, last = name.split("/")
    named = pattern.split("/")
    kinds = [system_kind(part, is_folder=True) for part in folders if part not in named]
    return next(filter(None, kinds), None) or system_kind(last, is_folder=False)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
