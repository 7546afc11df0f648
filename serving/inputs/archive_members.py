"""What the members of an archive are, whatever its format: names, images, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from serving.inputs.file_kinds import may_be_image, member_kind, path_kind
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
        size: Number of bytes.
        encrypted: Whether reading fails for want of a password.
    """

    name: str
    offset: int
    read: Callable[[], bytes]
    path: str
    size: int
    encrypted: bool = False


def is_listed(name: str) -> bool:
    """Return whether the file of this name is an image, and neither hidden nor of a system."""
    return member_kind(name) is None


def candidates(passed_over: OnPassedOver) -> Wanted:
    """Return a function that wants images, and files that may be images by their content.

    Args:
        passed_over: Called for all other members.
    """

    def wanted(name: str) -> bool:
        kind = member_kind(name)
        if kind is None or (may_be_image(name) and path_kind(name) is None):
            return True
        passed_over(kind.reason, name, kind.detail)
        return False

    return wanted


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
