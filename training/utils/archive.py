"""Extract an archive of photos into the disk cache, so that it is read like any data folder.

    CACHE/archive-KEY/files/NAME/...   the photos and tables of NAME.zip

KEY stands for the archive as it is: path, size, time, first and last bytes. A changed archive is
extracted again. Only photos and tables are extracted, with names below the folder. A process that
has asked for the folder keeps the entry from being removed until it ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Final

from serving.errors import DataError, FledgeError, ImageError
from serving.inputs import archives
from serving.inputs.archive_members import Member
from serving.inputs.file_kinds import is_image_content, may_be_image, member_kind, path_kind
from serving.inputs.passed_over import PassedOver
from serving.tables.reader import TABLES as TABLE_SUFFIXES
from serving.utils.files import atomic_folder, atomic_write
from serving.utils.progress import progress_bar
from training.utils import disk_cache
from training.utils.console import log_to_stderr, pluralize
from training.utils.disk_cache import abbreviate_home, format_size

MAX_FILES: Final = 2_000_000
"""Largest number of files that are extracted from an archive."""

TABLES: Final = frozenset(
    {
        *(*TABLE_SUFFIXES, ".txt", ".json"),
        *(".xml", ".yaml", ".yml"),  # by these, annotations of objects are recognised
    }
)
"""Suffixes of the files that are extracted besides photos."""

_VERSION: Final = 1
_ENDS: Final = 2**16  # bytes at both ends of an archive that are part of its key
_SHOWN: Final = 3
_DRIVE: Final = re.compile(r"[A-Za-z]:[/\\]")
_SPOILT_NAMES: Final = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ)
"""Errors of a member whose name can't be a file beside the others."""

_sources: dict[Path, str] = {}
"""Name of the archive, as it was given, by the folder with its files."""

_held: dict[Path, BinaryIO] = {}
"""Entries of this process, by folder, with the locks that keep them."""


def is_archive(source: str | os.PathLike[str]) -> bool:
    """Return whether a data source is a file that is an archive by its suffix.

    Raises:
        DataError: It is an archive of a kind that is not read.
    """
    path = os.path.expanduser(source)
    if not os.path.isfile(path):
        return False
    archives.check_kind(path)
    return archives.is_archive(path)


def extracted(source: str | os.PathLike[str]) -> Path:
    """Return the folder with the files of an archive; extract them at first use.

    Several processes may call this function at the same time. They all return the same folder.

    Raises:
        DataError: The archive can't be read as a whole, is encrypted, or is larger than the cache
            may be.
    """
    path = Path(os.path.expanduser(source)).resolve()
    try:
        cache = disk_cache.open_cache()
        entry = cache.folder / f"{disk_cache.ARCHIVE}{_key(path)}"
        folder = entry / disk_cache.FILES / _stem(path)
        while folder not in _held:
            held = disk_cache.hold_entry(entry)
            if held is not None and disk_cache.archive_size(entry) is not None:
                _held[folder] = held
                break
            if held is not None:
                held.close()
            try:
                _extract(path, cache, entry, folder)
            except BaseException:
                disk_cache.remove(entry)
                raise
        disk_cache.mark_used(entry)
        _sources[folder] = os.fspath(source)
    except OSError as error:
        where = error.filename or abbreviate_home(disk_cache.cache_folder())
        raise DataError(
            f"{path} can't be extracted: {where}: {error.strerror or error}; unpack it, "
            "or set FLEDGE_CACHE to another folder"
        ) from error
    return folder


def restore_names(error: FledgeError) -> None:
    """Replace folders of the cache in a message by the names of the archives, as they were given.

    Those after `--data` are kept: what is in an archive can only be given by its folder.
    """
    for folder, source in _sources.items():
        for path in {str(folder), os.path.realpath(folder)}:
            kept = rf"(?<!--data )(?<!--data '){re.escape(path)}"
            error.args = tuple(re.sub(kept, lambda _: source, str(arg)) for arg in error.args)  # noqa: B023


def found_again(root: Path, source: str) -> Path:
    """Return a data folder; if it was in the cache and was removed, extract its archive again.

    Args:
        root: The folder.
        source: The value of `--data` with which it was found.

    Raises:
        DataError: As `extracted`.
    """
    return root if root.is_dir() or not is_archive(source) else extracted(source)


def _key(path: Path) -> str:
    status = path.stat()
    digest = hashlib.sha256(
        repr((_VERSION, os.fsencode(path), status.st_size, status.st_mtime_ns)).encode()
    )
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(0, status.st_size - _ENDS))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()[:32]


def _stem(path: Path) -> str:
    suffix = next(s for s in sorted(archives.SUFFIXES, key=len, reverse=True)
                  if path.name.lower().endswith(s))  # fmt: skip
    return path.name[: -len(suffix)].strip(". ") or "photos"


def _extract(path: Path, cache: disk_cache.DiskCache, entry: Path, folder: Path) -> None:
    def on_wait() -> None:
        log_to_stderr(f"{path}: waiting for another process that extracts it")

    with disk_cache.locked_entry(entry, f"files of {path}", on_wait):
        if disk_cache.archive_size(entry) is not None:
            return  # by the other process
        size = path.stat().st_size
        cache.evict(size, {entry.name})
        where = abbreviate_home(entry)
        log_to_stderr(f"{path}: extracting {format_size(size)} into the cache, {where}")
        extraction = _Extraction(path, cache.budget)
        with atomic_folder(folder.parent) as partial:
            (partial / folder.name).mkdir()
            extraction.run(partial / folder.name)
            os.sync()
        with atomic_write(entry / disk_cache.INDEX, 0o600) as index:
            index.write_text(json.dumps({"bytes": extraction.bytes}))
        log_to_stderr(f"{path}: {extraction.summary()}")
    cache.evict(0, {entry.name})


def _is_table(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in TABLES


class _Extraction:
    """Extracts one archive, and counts what is passed over.

    Attributes:
        bytes: Size of the files that were extracted.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self._path, self._budget = path, budget
        self.bytes = self._photos = self._tables = 0
        self._passed_over, self._others = PassedOver(), Counter[str]()
        self._unreadable: list[str] = []
        self._archives: list[str] = []

    def run(self, folder: Path) -> None:
        """Extract the files.

        Raises:
            DataError: The archive can't be read as a whole, or is too large.
            OSError: A file can't be written.
        """
        stamp = self._path.stat().st_mtime_ns
        try:
            with progress_bar() as bar:
                task = bar.add_task("extracting", total=None)
                for member in archives.members(str(self._path), self._is_wanted):
                    self._write(member, folder, stamp)
                    bar.advance(task)
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from error
        if not self._photos:
            inner = self._archives
            more = f" and {len(inner) - _SHOWN} more" if len(inner) > _SHOWN else ""
            raise DataError(
                f"{self._path}: no photo in it: {self.summary()}"
                + f"; it holds archives ({', '.join(inner[:_SHOWN])}{more}): unpack it, and give "
                "one of them, or its folder when these are unpacked, too" * bool(inner)
            )

    def _is_wanted(self, name: str) -> bool:
        kind = member_kind(name)
        if name.startswith("/") or ".." in name.split("/") or _DRIVE.match(name) or "\0" in name:
            self._others["with a name that leads out of the folder"] += 1
            return False
        wanted = _is_table(name) or may_be_image(name)
        if kind is None or (wanted and path_kind(name) is None):
            return True
        self._passed_over(kind.reason, name, kind.detail)
        if archives.is_archive(name) and len(self._archives) < MAX_FILES:
            self._archives.append(name)
        return False

    def _write(self, member: Member, folder: Path, stamp: int) -> None:
        name = member.path
        if member.encrypted:
            raise DataError(f"{name} is encrypted; unpack the archive with its password")
        try:
            data = member.read()
        except ImageError as error:
            self._unreadable.append(f"{name}: {error}")
            return
        kind = None if _is_table(name) or is_image_content(data) else member_kind(name)
        if kind:
            self._passed_over(kind.reason, name, kind.detail)
            return
        if self.bytes + len(data) > self._budget:
            raise DataError(
                f"its files are larger than the cache may be, {format_size(self._budget)}; "
                "set FLEDGE_CACHE_GB to more gigabytes, free disk space, or unpack it"
            )
        target = folder.joinpath(*(part for part in name.split("/") if part not in ("", ".")))
        try:
            opened = self._open(member, target)
        except OSError as error:
            if error.errno not in _SPOILT_NAMES:
                raise
            self._unreadable.append(f"{name}: {error.strerror}")
            return
        self.bytes += len(data)
        with open(opened, "wb") as file:
            file.write(data)
        os.utime(target, ns=(stamp, stamp))
        self._count(name, 1)
        if self._photos + self._tables > MAX_FILES:
            raise DataError(f"it has more than {MAX_FILES} photos and tables; unpack it")

    def _open(self, member: Member, target: Path) -> int:
        """Create the file of a member, and return its descriptor.

        Raises:
            DataError: The disk takes the name for that of another file.
            OSError: The name is too long, or that of a file and of a folder.
        """
        name = member.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "one of its folders is a file, too") from error
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the same name")
        if member.name != name and target.exists():  # unpacking keeps the last one of a name
            self.bytes -= target.stat().st_size
            self._count(name, -1)
            target.unlink()
            self._others["replaced by a later one of the same name"] += 1
        try:
            return os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise DataError(
                f"{name} differs from another name only in case or in the form of its letters, and "
                "this disk can't hold both; rename one of them"
            ) from None

    def _count(self, name: str, number: int) -> None:
        if _is_table(name):
            self._tables += number
        else:
            self._photos += number

    def summary(self) -> str:
        """Return what was extracted and passed over, as one line."""
        tables = f" and {pluralize(self._tables, 'table')}" if self._tables else ""
        line = f"{pluralize(self._photos, 'photo')}{tables} extracted"
        if self._passed_over:
            line += f"; {self._passed_over.line()}"
        for reason, count in self._others.most_common():
            line += f"; {count} {reason}"
        if self._unreadable:
            more = ", …" if len(self._unreadable) > _SHOWN else ""
            shown = ", ".join(self._unreadable[:_SHOWN])
            line += f"; {len(self._unreadable)} unreadable ({shown}{more})"
        return line
