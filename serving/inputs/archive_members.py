"""What the members of an archive are, whatever its format: names, images, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from serving.inputs.file_kinds import member_kind, path_kind
from serving.inputs.passed_over import OnPassedOver

SEPARATOR: Final = "::"

Wanted = Callable[[str], bool]
"""Function of the name of a member that returns whether the member is listed."""


@dataclass(frozen=True)
class Member:
    """One image in an archive.

    Attributes:
        name: Name of the member, unique in the archive. The second member of the same name
            has the prefix `2::`, the third `3::`.
        offset: Offset of the member's header in bytes: in the uncompressed tar, or of its entry in
            the directory of a zip.
        read: Function that returns the bytes of the image. It can only be called until the iterator
            that yielded the member advances. Raises BrokenImage or TooLarge.
        path: Name in the archive, which earlier members may have, too.
        encrypted: Whether reading fails for want of a password.
    """

    name: str
    offset: int
    read: Callable[[], bytes]
    path: str
    encrypted: bool = False


def is_listed(name: str) -> bool:
    """Return whether the file of this name is an image, and neither hidden nor of a system."""
    return member_kind(name) is None


def listed(passed_over: OnPassedOver) -> Wanted:
    """Return a function like `is_listed` that also calls `passed_over` for all other members."""

    def wanted(name: str) -> bool:
        kind = member_kind(name)
        if kind:
            passed_over(kind.reason, name, kind.detail)
        return kind is None

    return wanted


def is_hidden(name: str) -> bool:
    """Return whether the file, or a folder above it, is hidden or made by a system or tool."""
    return path_kind(name) is not None


def unique(name: str, counts: dict[str, int]) -> str:
    """Return `name`, or a numbered name such as `2::name` if `name` occurred before in the archive.

    `counts` maps each name so far to its number of occurrences, and is updated.
    """
    found = name
    while found in counts:
        counts[name] += 1
        found = f"{counts[name]}{SEPARATOR}{name}"
    counts[found] = 1
    return found
