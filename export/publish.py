"""Publish a bundle version: build it in a partial folder, then replace the manifest atomically."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from serving.bundle import storage
from serving.bundle.manifest import Manifest
from serving.bundle.signing import Sign
from serving.errors import BundleError, OptionError
from serving.utils.files import files_below, lock, partial_of, sync
from serving.utils.process import is_running

_PARTIAL: Final = re.compile(r"\.partial-(\d+)")
_VERSION: Final = re.compile(r"[0-9a-f]{12}")


def check_target(out: Path) -> None:
    """Check that `out` is missing, an empty folder or a bundle.

    Other folders are refused, because an export deletes old bundle versions in `out`.

    Raises:
        OptionError: `out` is a file, or a folder with other content.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OptionError(f"--out {out} is a file; name a folder for the bundle")
    present = {path.name for path in out.iterdir()}
    if {storage.MANIFEST, storage.CHECKSUM} <= present:
        return
    # Files that a killed export can leave in the folder are accepted.
    companions = {storage.CHECKSUM, storage.SIGNATURE}
    foreign = sorted(
        name
        for name in present - companions
        if partial_of(name) not in (storage.MANIFEST, *companions)
        and not (_PARTIAL.fullmatch(name) or _VERSION.fullmatch(name))
    )
    if foreign:
        raise OptionError(
            f"--out {out} is no bundle and holds {foreign[0]}; name an empty or a new folder"
        )


@contextmanager
def partial_payload(out: Path) -> Iterator[Path]:
    """Create a partial folder in `out` for the files of a new version, and delete it at the end.

    The folder is not deleted if `publish` has renamed it. Partial folders of exports that are no
    longer running are deleted, too.
    """
    is_new = not out.exists()
    payload = out / f".partial-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            match = _PARTIAL.fullmatch(path.name)
            if match and (int(match[1]) == os.getpid() or not is_running(int(match[1]))):
                shutil.rmtree(path, ignore_errors=True)
        payload.mkdir()
        yield payload
    finally:
        shutil.rmtree(payload, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                out.rmdir()  # fails if it is not empty


def publish(payload: Path, manifest: Manifest, out: Path, sign: Sign | None = None) -> Manifest:
    """Rename the folder `payload` to its version, replace the manifest, and delete older versions.

    The version that was live before is kept until the next export, because running services may
    still read it.
    """
    with _locked(out):
        return _publish(payload, manifest, out, sign)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock `out` against other exports on this machine.

    An export deletes all versions except the live one and the previous one. Without the lock it
    could delete a folder that another export has renamed but not yet written to the manifest.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # without support for locks, the export runs unlocked
            lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _publish(payload: Path, manifest: Manifest, out: Path, sign: Sign | None) -> Manifest:
    try:
        live = storage.read(out, require_trusted=False).manifest
    except BundleError:
        live = None
    same = live is not None and live.version == manifest.version
    if live is not None and same and (sign is None or live.files == manifest.files):
        # The graphs are the same. A service may be reading the published folder, so its files,
        # including the golden images (photos stored with their expected probabilities), stay, and
        # only the manifest is replaced. A signed manifest must describe the files of this export,
        # so with `sign` the folder is kept only if its files are identical.
        manifest = manifest.model_copy(update={"files": live.files, "golden": live.golden})
    else:
        for path in files_below(payload):
            sync(path)
        version = out / manifest.version
        shutil.rmtree(version, ignore_errors=True)  # interrupted, damaged, or other files
        payload.rename(version)
    storage.publish(manifest, out, sign)
    keep = {manifest.version, live.version if live else None}
    with suppress(OSError):  # the next export deletes them
        for path in out.iterdir():
            if _VERSION.fullmatch(path.name) and path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)
    return manifest
