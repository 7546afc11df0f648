"""Images at addresses such as `s3://bucket/photos`, by fsspec: found as in folders, read by name.

Which addresses there are, and where keys for them come from, is the business of fsspec and of the
package that it asks for: s3fs, gcsfs, adlfs, …
"""

from __future__ import annotations

import errno
import importlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from serving.errors import BrokenImage, DataError, TooLarge
from serving.inputs import lists, tar
from serving.inputs.compression import MAX_FILE
from serving.inputs.folders import Note, is_image, is_pattern
from serving.utils.natural_sort import natural

_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

Entry = dict[str, Any]
"""What a file system tells of a file or folder: name, type, …"""


def is_address(name: str) -> bool:
    """Whether it begins as `s3://` does."""
    return _ADDRESS.match(name) is not None


def protocol(name: str) -> str:
    """That of an address, in small letters; "" for what is none."""
    return name.partition("://")[0].lower() if is_address(name) else ""


def find(address: str) -> Callable[[Note], Iterator[str]]:
    """The images at an address: itself, those in the folder and below, or what a pattern matches.

    That something is there is known before the names are asked for. Order and hidden files are as
    `inputs_search.below` has them; patterns match files alone.

    Raises:
        DataError: Nothing there, or nothing that can be looked into here.
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
    except Exception as error:  # each package behind fsspec has errors of its own
        raise DataError(f"{address}: can't be looked into: {_reason(error)}") from error
    if pattern:
        return lambda note: _called(address, _matching(fs, path, found.values()))
    if entry["type"] == "directory":
        return lambda note: _called(address, _below(fs, entry, note))
    if lists.is_table(path) or path.lower().endswith(lists.LINES) or tar.is_archive(path):
        raise DataError(f"{address}: lists and archives are read from files here; copy it first")
    return lambda note: iter([address])


def _called(address: str, names: Iterator[str]) -> Iterator[str]:
    """Names with the protocol that was asked for, where it has several: gs and gcs, s3 and s3a."""
    kind = protocol(address)
    for name in names:
        found = protocol(name)
        yield name if found.startswith(("http", "file")) else kind + name[len(found) :]


def load(address: str, local: Callable[[str], bytes]) -> bytes:
    """The bytes at an address; as `inputs.load`, which is `local`, of files here."""
    if "::" in address:
        raise BrokenImage("'::' has no meaning in an address")
    try:
        fs, path = _open(address)
        if "file" not in fs.protocol:
            with fs.open(path, "rb") as file:
                data = _read(file)
    except Exception as error:  # each package behind fsspec has errors of its own
        raise BrokenImage(f"can't be read: {_reason(error)}") from error
    if "file" in fs.protocol:
        return local(path)
    if len(data) > MAX_FILE:
        raise TooLarge(f"more than the {MAX_FILE} bytes allowed")
    return data


def _read(file: Any) -> bytes:
    """All of it, or more than a photo has: a server may not know how long a file is."""
    pieces, left = [], MAX_FILE + 1
    while left > 0 and (piece := file.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _open(address: str) -> tuple[Any, str]:
    """File system and path. Listings are not kept: there may be millions of names."""
    core: Any = importlib.import_module("fsspec.core")
    fs, path = core.url_to_fs(address, use_listings_cache=False)
    return fs, str(path)


def _below(fs: Any, folder: Entry, note: Note) -> Iterator[str]:
    """Depth first, by a stack: folders may be deeper than Python's."""
    levels = [iter([folder])]
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
        elif entry["type"] == "directory":
            try:
                listed = fs.ls(entry["name"], detail=True)
            except Exception as error:  # each package behind fsspec has errors of its own
                name = fs.unstrip_protocol(entry["name"])
                note(f"{name}: {_reason(error)}; what is in it is left out")
            else:
                levels.append(iter(_sorted(listed, entry["name"])))
        elif is_image(entry["name"]):
            yield fs.unstrip_protocol(entry["name"])


def _sorted(entries: list[Entry], folder: str) -> list[Entry]:
    """What is seen in a folder; some name the folder itself, too."""
    seen = [
        entry
        for entry in entries
        if entry["name"].rstrip("/") != folder.rstrip("/") and not _last(entry).startswith(".")
    ]
    return sorted(seen, key=lambda entry: natural(_last(entry)))


def _last(entry: Entry) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _matching(fs: Any, pattern: str, found: Any) -> Iterator[str]:
    """A pattern with a suffix of its own names all that it matches, any other one images."""
    suffix = re.search(r"\.[^./*?[\]]+$", pattern)
    hidden = "/." in pattern
    names = [str(entry["name"]) for entry in found if entry["type"] != "directory"]
    for name in sorted(names, key=lambda name: [natural(part) for part in name.split("/")]):
        if (suffix or is_image(name)) and (hidden or "/." not in name):
            yield fs.unstrip_protocol(name)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
