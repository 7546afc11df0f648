"""Tar archives for tests."""

import io
import tarfile
from collections.abc import Iterable
from typing import Any

from serving.inputs import sources

KINDS = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def write_tar(
    name: str, members: Iterable[tuple[str, bytes | None]], mode: str = "w", **more: Any
) -> str:
    """Write an archive of (name, bytes) pairs; None instead of bytes is a folder."""
    with tarfile.open(name, mode, **more) as file:  # type: ignore[call-overload]
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            file.addfile(info, io.BytesIO(data or b""))
    return name


def find_all(*words: str, notes: list[str] | None = None) -> list[str]:
    return list(sources.find(words, note=[].append if notes is None else notes.append))


def shard_members(count: int = 40) -> dict[str, bytes]:
    """Members of a WebDataset shard: the files of a sample are adjacent, all images differ."""
    return {
        f"{number:03}.{kind}": b"%d %s" % (number, kind.encode()) * (number % 40 + 1) * 37
        for number in range(count)
        for kind in ("jpg", "cls", "json", "seg.png")
    }


def only_images(members: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in members.items() if name.endswith(("jpg", "png"))}
