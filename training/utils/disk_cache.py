"""What can be made again, kept between runs: a room of entries within a budget.

An entry is a folder `KIND-KEY` with a mark in it. The mark says what the entry is, its time when
the entry was last used, and a lock on it who may write. Of everything else in the room nothing is
touched, so a room that is somebody's home loses nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from serving.errors import OptionError
from serving.utils.files import lock, user_cache_folder

GB: Final = 1e9
DEFAULT_GB: Final = 10.0
MARK: Final = "entry.json"

_NAME: Final = re.compile(r"(pixels|activations)-[0-9a-f]{32}")
_OWN: Final = re.compile(r"index|\.index\.partial|[a-z]+-[0-9a-f]{16}\.bin")


@dataclass(frozen=True)
class Entry:
    """A folder of the room. size: in bytes; used: seconds since 1970."""

    path: Path
    what: str
    size: int
    used: float


@dataclass(frozen=True)
class DiskCache:
    """A folder of entries. budget: bytes that all of them may take."""

    folder: Path
    budget: int

    def entries(self) -> list[Entry]:
        """All of them, the one that was not used for longest first."""
        try:
            found = [_entry(Path(item.path)) for item in os.scandir(self.folder)]
        except OSError:
            found = []
        return sorted((entry for entry in found if entry), key=lambda entry: entry.used)

    def size(self) -> int:
        """Bytes that the entries take."""
        return sum(entry.size for entry in self.entries())

    def left(self, keep: Set[str]) -> int:
        """Bytes that `make_room` can free beside the entries of these names."""
        kept = sum(entry.size for entry in self.entries() if entry.path.name in keep)
        return max(0, self.budget - kept)

    def make_room(self, size: int, keep: Set[str]) -> bool:
        """Remove entries, the least recently used first, until `size` more bytes fit.

        Whether they do: `keep` (names), and what is being written, stays. Processes that have an
        entry open go on with it.
        """
        entries = self.entries()
        total = sum(entry.size for entry in entries) + size
        for entry in entries:
            if total <= self.budget:
                break
            if entry.path.name not in keep and remove(entry.path):
                total -= entry.size
        return total <= self.budget

    def clear(self) -> tuple[int, list[Entry]]:
        """Remove all entries; returns the bytes freed and what stays, being written just now."""
        entries = self.entries()
        busy = [entry for entry in entries if not remove(entry.path)]
        return sum(entry.size for entry in entries if entry not in busy), busy

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else looks how much room there is meanwhile."""
        file = os.open(self.folder, os.O_RDONLY)
        try:
            # Where folders have no locks, runs that begin together may exceed the budget.
            with suppress(OSError):
                lock(file, wait=True)
            yield
        finally:
            os.close(file)


def folder() -> Path:
    """`FLEDGE_CACHE`, else Fledge's folder in the user's cache."""
    stated = os.environ.get("FLEDGE_CACHE", "").strip()
    return Path(os.path.expanduser(stated)).absolute() if stated else user_cache_folder()


def wanted(gb: float | None = None) -> float:
    """Gigabytes that may be used: `gb`, else `FLEDGE_CACHE_GB`, else 10.

    Raises:
        OptionError: No number of 0 or more; names the option or the variable.
    """
    stated = os.environ.get("FLEDGE_CACHE_GB", "").strip()
    name, text = "--cache-gb", str(gb)
    if gb is None:
        name, text = "FLEDGE_CACHE_GB =", stated or str(DEFAULT_GB)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise OptionError(f"{name} {text}: use gigabytes, 0 or more")
    return value


def open_cache(gb: float | None = None) -> DiskCache:
    """The room within the budget of `wanted`, but never more than half of what the disk has free.

    What the room takes already counts as free.

    Raises:
        OptionError: As `wanted`.
    """
    there = DiskCache(folder(), int(wanted(gb) * GB))
    on_disk = next((path for path in (there.folder, *there.folder.parents) if path.exists()), None)
    try:
        free = shutil.disk_usage(on_disk or Path.cwd()).free
    except OSError:
        return there
    return DiskCache(there.folder, min(there.budget, (free + there.size()) // 2))


@contextmanager
def held(path: Path, what: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an entry alone; it is made where it is not there.

    Args:
        path: Its folder.
        what: For a person: what is in it.
        waiting: Called once when another process holds it, before waiting for that one.

    Raises:
        OSError: It can't be written, or can't be locked.
    """
    file: BinaryIO | None = None
    while file is None:
        path.mkdir(parents=True, exist_ok=True)
        try:
            file = _take(path, "a+b", wait=False)
        except BlockingIOError:
            waiting()
            file = _take(path, "a+b", wait=True)
    with file:
        mark = json.dumps({"fledge-cache": 1, "what": what}).encode() + b"\n"
        file.seek(0)
        if file.read() != mark:
            file.truncate(0)
            file.write(mark)
            file.flush()
        yield


def touch(path: Path) -> None:
    """Note that an entry is used now."""
    with suppress(OSError):  # a room that others fill
        os.utime(path / MARK)


def remove(path: Path) -> bool:
    """Remove an entry, unless somebody writes it or it can't be removed; whether it is gone."""
    try:
        file = _take(path, "r+b", wait=False)
        if file is None:
            return True
        with file:
            # In this order: whatever is left by a kill in between is an entry with nothing in it.
            own = [name for name in os.listdir(path) if _OWN.fullmatch(name)]
            for name in (*sorted(own, key=lambda name: name != "index"), MARK):
                (path / name).unlink(missing_ok=True)
    except OSError:
        return False
    with suppress(OSError):  # something of somebody else's is in it
        path.rmdir()
    return True


def describe(there: DiskCache) -> list[str]:
    """Path, budget, and a line for each entry, the last used first."""
    lines = [f"{shown(there.folder)}: {gigabytes(there.size())} of {gigabytes(there.budget)}"]
    for entry in reversed(there.entries()):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        lines.append(
            f"  {entry.path.name[:15]}…  {gigabytes(entry.size):>9}  last used {used}  {entry.what}"
        )
    return lines


def clear(there: DiskCache) -> list[str]:
    """Remove every entry; lines on what was freed, and on what is left."""
    freed, left = there.clear()
    lines = [f"{gigabytes(freed)} freed in {shown(there.folder)}"]
    return lines + [
        f"  {entry.path.name[:15]}…  is left: a run writes it, or it can't be removed"
        for entry in left
    ]


def gigabytes(size: float) -> str:
    """As a person reads it: "0.3 GB"; megabytes below a tenth."""
    if 0 < size < 0.1 * GB:
        return f"{size / 1e6:.1f} MB"
    return f"{size / GB:.1f}".removesuffix(".0") + " GB"


def shown(path: Path) -> str:
    """With `~` for the user's home."""
    with suppress(RuntimeError, ValueError):
        return str(Path("~") / path.relative_to(Path.home()))
    return str(path)


def _entry(path: Path) -> Entry | None:
    """The entry at `path`; None for anything that is not ours."""
    if not _NAME.fullmatch(path.name) or path.is_symlink():
        return None
    try:
        mark = (path / MARK).read_bytes()
        stated = json.loads(mark) if mark else {"fledge-cache": 1}  # its maker was killed
        if "fledge-cache" not in stated:
            return None
        used = (path / MARK).stat().st_mtime
        files = [item for item in os.scandir(path) if _OWN.fullmatch(item.name)]
        size = sum(item.stat(follow_symlinks=False).st_size for item in files)
    except (OSError, ValueError, TypeError):
        return None
    return Entry(path, str(stated.get("what", "")), size, used)


def _take(path: Path, mode: str, *, wait: bool) -> BinaryIO | None:
    """The mark of an entry, open and locked; None where the entry went away meanwhile."""
    try:
        file: BinaryIO = open(path / MARK, mode)  # type: ignore[assignment] # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        lock(file.fileno(), wait=wait)
        # Whoever waited for the lock of an entry that was removed holds a mark without a name.
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path / MARK)):
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None
