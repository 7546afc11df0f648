"""The bundle's folder while an export works in it: written aside, then live by one rename."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from serving.bundle import storage
from serving.bundle.manifest import Manifest
from serving.bundle.signing import Sign
from serving.errors import BundleError, OptionError
from serving.utils.files import is_running, lock, sync

_PARTIAL: Final = re.compile(r"\.partial-(\d+)")
_VERSION: Final = re.compile(r"[0-9a-f]{12}")


def check_target(out: Path) -> None:
    """Refuse a file, and a folder that holds other things: an export deletes what it supersedes."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OptionError(f"--out {out} is a file; name a folder for the bundle")
    present = {path.name for path in out.iterdir()}
    if {storage.MANIFEST, storage.CHECKSUM} <= present:
        return
    # What an export that was killed may leave behind is no stranger.
    beside = {storage.CHECKSUM, storage.SIGNATURE}
    left = beside | {f".{name}.partial" for name in (storage.MANIFEST, *beside)}
    strange = sorted(
        name
        for name in present - left
        if not (_PARTIAL.fullmatch(name) or _VERSION.fullmatch(name))
    )
    if strange:
        raise OptionError(
            f"--out {out} is no bundle and holds {strange[0]}; name an empty or a new folder"
        )


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder in `out` to build the payload in; gone at the end unless it was renamed."""
    made = not out.exists()
    payload = out / f".partial-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            found = _PARTIAL.fullmatch(path.name)
            if found and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
                shutil.rmtree(path, ignore_errors=True)
        payload.mkdir()
        yield payload
    finally:
        shutil.rmtree(payload, ignore_errors=True)
        if made:
            with suppress(OSError):
                out.rmdir()  # only if it is empty


def go_live(payload: Path, manifest: Manifest, out: Path, sign: Sign | None = None) -> Manifest:
    """Give the payload its place, switch the manifest, and remove what is superseded for good."""
    with _alone(out):
        return _go_live(payload, manifest, out, sign)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other exports on this machine out: they delete what is neither live nor just replaced.

    That is what a payload looks like that has its place and no manifest yet.
    """
    opened = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a system or a disk without locks keeps nobody out
            lock(opened, wait=True)
        yield
    finally:
        os.close(opened)


def _go_live(payload: Path, manifest: Manifest, out: Path, sign: Sign | None) -> Manifest:
    try:
        live = storage.read(out, whoever=True).manifest
    except BundleError:
        live = None
    same = live is not None and live.version == manifest.version
    if live is not None and same and (sign is None or live.files == manifest.files):
        # The same graphs. Somebody may be reading that folder: it stays as it is, with its golden
        # images, and only the manifest is new. What is to be signed is what this export made.
        manifest = replace(manifest, files=live.files, golden=live.golden)
    else:
        for path in payload.rglob("*"):
            if path.is_file():
                sync(path)
        place = out / manifest.version
        shutil.rmtree(place, ignore_errors=True)  # of an export that never went live, or broken
        payload.rename(place)
    storage.publish(manifest, out, sign)
    keep = {manifest.version, live.version if live else None}
    for path in out.iterdir():
        if _VERSION.fullmatch(path.name) and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)
    return manifest
