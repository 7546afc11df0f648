"""List the images in archives and find archives by name: one interface to tar and zip.

    photos.zip::cat/1.jpg      the member cat/1.jpg of photos.zip
    photos.zip::2::cat/1.jpg   the second member of that name

Images are listed in archive order. What is passed over in folders is passed over in archives, too:
hidden members, `__MACOSX/` and the like. No member is written to disk, so a name such as
`../../x.jpg` is harmless.
The first bytes of a file determine whether it is a zip; the suffix, whether it is an archive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

from serving.errors import DataError, ImageError
from serving.inputs import tar, zip_archive
from serving.inputs.archive_members import SEPARATOR, Member, Wanted, candidates, is_listed
from serving.inputs.file_kinds import is_image_content, member_kind
from serving.inputs.folders import Note
from serving.inputs.passed_over import OnPassedOver, not_counted

SUFFIXES: Final = (*tar.SUFFIXES, *zip_archive.SUFFIXES)

_MAX_JUDGED: Final = 2**24
"""Largest member without the suffix of a format whose content is looked at, in bytes."""

OTHER_SUFFIXES: Final = (".7z", ".rar")
"""Suffixes of archives that are not read."""


def is_archive(path: str) -> bool:
    """Check whether a name has the suffix of an archive, such as `.zip` or `.tar.gz`."""
    return path.lower().endswith(SUFFIXES)


def check_kind(path: str) -> None:
    """Check that a file has no suffix of an archive that is not read.

    Raises:
        DataError: It has one; the message names the remedy.
    """
    if path.lower().endswith(OTHER_SUFFIXES):
        kind = path[-4:].lower().rpartition(".")[2]
        raise DataError(
            f"{path}: a {kind} archive is not read; unpack it, or pack it as zip or tar"
        )


def check(path: str) -> None:
    """Check the beginning of an archive, without listing it.

    Raises:
        DataError: The archive can't be read; what is missing is named.
        OSError: The file can't be opened.
    """
    if zip_archive.is_zip(path):
        zip_archive.check(path)
    else:
        tar.is_compressed(path)


def members(path: str, wanted: Wanted = is_listed) -> Iterator[Member]:
    """Yield the images of an archive, in archive order.

    The names of all images so far are kept in memory, because a repeated name gets a number.

    Args:
        path: The archive.
        wanted: Function that is called with the name of each member that is no folder, and returns
            whether the member is yielded.

    Raises:
        DataError: The archive is corrupt, truncated, of several parts, or expands too much (members
            that were yielded before are valid), or a package that it needs is missing.
        OSError: The archive can't be opened.
    """
    if zip_archive.is_zip(path):
        return zip_archive.members(path, wanted)
    return tar.members(path, wanted)


def images(path: str, passed_over: OnPassedOver = not_counted) -> Iterator[Member]:
    """Yield the images of an archive: by suffix or, without the suffix of any format, by content.

    Args:
        path: The archive.
        passed_over: Called for each member that is no image, or is passed over by its name.

    Raises:
        DataError, OSError: As `members`.
    """
    for member in members(path, candidates(passed_over)):
        kind = member_kind(member.path)
        if kind is None:
            yield member
            continue
        data = _content(member)
        if is_image_content(data):
            yield replace(member, read=partial(bytes, data))
        else:
            passed_over(kind.reason, member.path, kind.detail)


def _content(member: Member) -> bytes:
    """Return the bytes of a member, or nothing if it can't be read or is large for an image."""
    if member.size > _MAX_JUDGED:
        return b""
    try:
        return member.read()
    except ImageError:
        return b""


def names(path: str, note: Note, passed_over: OnPassedOver = not_counted) -> Iterator[str]:
    """Yield `ARCHIVE::MEMBER` for every image in an archive. Only the headers are read.

    Args:
        path: The archive.
        note: Called with a message about anything that is left out.
        passed_over: Called for each member that is no image, or is passed over by its name.
    """
    try:
        for member in images(path, passed_over):
            name = f"{path}{SEPARATOR}{member.name}"
            if os.path.lexists(name):  # `split` would take the name for that file
                note(f"{name}: a file beside the archive has that name; the member is left out")
            else:
                yield name
    except DataError as error:
        note(f"{path}: {error}")
    except OSError as error:
        note(f"{path}: can't be read: {error.strerror or error}")


def split(name: str) -> tuple[str, str] | None:
    """Split `ARCHIVE::MEMBER` into the path of the archive and the name of the member.

    If `name` contains several `::`, the archive is the shortest prefix that exists and has the
    suffix of an archive.

    Returns:
        None if a file of exactly this name exists, or if `name` contains no such archive.
    """
    at = name.find(SEPARATOR)
    if at < 0 or os.path.lexists(name):
        return None
    while at >= 0:
        if is_archive(name[:at]) and os.path.isfile(name[:at]):
            return name[:at], name[at + len(SEPARATOR) :]
        at = name.find(SEPARATOR, at + 1)
    return None
