"""Read and verify the folder of a bundle, and publish a new version in it.

    bundle/
      manifest.json         describes the current version; see `serving.bundle.manifest`
      manifest.sha256       checksum of the manifest, detects accidental changes
      manifest.sig          signatures of the manifest, detect forgery if trusted keys are set
      VERSION/              the payload: model.onnx, model.ts, model.pt2, golden/, README.md

Each version has its own payload folder. Publishing a version replaces `manifest.json` by a rename.
A concurrent reader therefore sees either the old version or the new version, never a mixture.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serving.bundle import signing
from serving.bundle.entries import FileEntry
from serving.bundle.manifest import Manifest, content_version
from serving.errors import BundleError
from serving.utils.files import atomic_write, files_below
from serving.utils.json_reader import MAX_BYTES
from serving.utils.regular_files import open_regular, read_limited

MANIFEST: Final = "manifest.json"
CHECKSUM: Final = "manifest.sha256"
SIGNATURE: Final = "manifest.sig"
MAX_COMPANION: Final = 2**16
"""Largest `manifest.sha256` or `manifest.sig` in bytes. An export writes two lines at most."""
MAX_PAYLOAD: Final = 2**34
"""Largest sum of the sizes of the payload files, in bytes; all of them are hashed."""
_MAX_NAME: Final = 1000  # characters of a payload file's path
_MAX_FOLDERS: Final = 1000  # of a payload
_TRIES: Final = 5  # attempts to read the manifest and the checksum of the same version


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified.

    Attributes:
        folder: Folder that contains `manifest.json`.
        manifest: Content of `manifest.json`.
        signers: Names of the keys that signed the manifest, from `signing.check`.
        trusted: Whether the signatures were checked against trusted keys.
    """

    folder: Path
    manifest: Manifest
    signers: tuple[str, ...] = ()
    trusted: bool = False

    @property
    def payload(self) -> Path:
        """Payload folder: the folder with the files of this version."""
        return self.folder / self.manifest.version

    def graph(self, precision: str) -> Path:
        """Return the path of the ONNX graph of a precision.

        Raises:
            BundleError: The bundle has no graph of this precision.
        """
        entry = self.manifest.precisions.get(precision)
        if entry is None:
            have = ", ".join(self.manifest.precisions)
            raise BundleError(f"{self.folder} has no {precision} graph; it has {have}")
        return self.payload / entry["file"]

    @property
    def signature_warning(self) -> str:
        """Warning to print after the names of the signers; "" if trusted keys are set."""
        return "" if self.trusted else f" (key not verified: {signing.TRUSTED} is not set)"

    def load(self, name: str) -> bytes:
        """Read a payload file and check its sha256 against the manifest.

        The check detects a file that was changed after the bundle was verified.

        Args:
            name: Path of the file, relative to the payload folder.

        Raises:
            BundleError: The file can't be read, or its sha256 is not the one in the manifest.
        """
        path, stated = self.payload / name, self.manifest.files[name]
        try:
            data = read_limited(path, stated["bytes"])
        except OSError as error:
            raise BundleError(f"{path} can't be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != stated["sha256"]:
            raise BundleError(f"{path} was changed after export: its sha256 is not the manifest's")
        return data


def read(folder: Path, *, require_trusted: bool = True) -> Bundle:
    """Read a bundle, check all files against the manifest, and check the signatures.

    Args:
        folder: The bundle.
        require_trusted: Whether the manifest must be signed by a trusted key if FLEDGE_TRUSTED_KEYS
            is set. An export that replaces the bundle passes False.

    Raises:
        BundleError: There is no bundle; or a file is missing, changed or not listed in the
            manifest; or no trusted key signed the manifest. The message names the file.
        OptionError: The file that FLEDGE_TRUSTED_KEYS names can't be used.
    """
    keys = signing.trusted() if require_trusted else None
    path = folder / MANIFEST
    try:
        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1
            raw = read_limited(path, MAX_BYTES)
            # The files disagree if a version was published between the two reads, so try again.
            stated = read_limited(folder / CHECKSUM, MAX_COMPANION).decode().split()[::2]
            if hashlib.sha256(raw).hexdigest() not in stated:
                continue
            try:
                signers = signing.check(raw, _signatures(folder), keys)
            except BundleError as error:
                if last:
                    raise BundleError(f"{folder / SIGNATURE}: {error}") from error
                continue
            break
        else:
            raise BundleError(
                f"{path} or {CHECKSUM} was changed after export: the checksum does not match"
            )
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise BundleError(
            f"no bundle in {folder}: {missing} is missing; make one with `fledge export`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        name = getattr(error, "filename", None) or folder
        raise BundleError(f"{name} can't be read: {reason}") from error
    try:
        manifest = Manifest.from_json(raw.decode())
        bundle = Bundle(folder, manifest, tuple(signers), keys is not None)
    except (BundleError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: {error}") from error
    try:
        _verify_files(bundle)
    except ValueError as error:  # an invalid file name, such as one with a NUL character
        raise BundleError(f"{path}: not a manifest: {error}") from error
    return bundle


def _verify_files(bundle: Bundle) -> None:
    payload, listed = bundle.payload, bundle.manifest.files
    version = bundle.manifest.version
    if version in ("", "..") or Path(version).name != version:
        raise BundleError(f"{bundle.folder / MANIFEST}: version is not a folder name")
    if sum(facts["bytes"] for facts in listed.values()) > MAX_PAYLOAD:
        raise BundleError(
            f"{bundle.folder / MANIFEST}: its files have more than {MAX_PAYLOAD:,} bytes"
        )
    for name, facts in listed.items():
        if len(name) > _MAX_NAME:
            raise BundleError(f"{bundle.folder / MANIFEST}: {name:.60}… is too long a file name")
        path = payload / name
        try:
            inside = path.resolve().is_relative_to(payload.resolve())
        except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
            raise BundleError(f"{path} is listed in the manifest and can't be read") from error
        if not inside:
            raise BundleError(f"{bundle.folder / MANIFEST}: {name} lies outside the bundle")
        _verify_file(path, facts)
    try:
        extra = _unlisted_file(payload, listed)
    except OSError as error:
        raise BundleError(f"{payload} can't be read: {error.strerror or error}") from error
    if extra:
        raise BundleError(f"{payload / extra} is not listed in the manifest; remove it")
    graphs = bundle.manifest.graphs
    for name in [*graphs, *(image["file"] for image in bundle.manifest.golden)]:
        if name not in listed:
            raise BundleError(f"{bundle.folder / MANIFEST}: {name} has no sha256")
    digests = {name: listed[name]["sha256"] for name in graphs}
    if version != content_version(bundle.manifest, digests):
        raise BundleError(
            f"{bundle.folder / MANIFEST} was changed after export: its version does not match its "
            "content"
        )


def _verify_file(path: Path, facts: FileEntry) -> None:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            # The size first: hashing a file of another size could take hours.
            actual = size == facts["bytes"] and hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError) else f": {error.strerror or error}"
        raise BundleError(f"{path} is listed in the manifest and can't be read{reason}") from error
    if actual != facts["sha256"]:
        which = "sha256" if actual else f"size of {size:,} bytes"
        raise BundleError(f"{path} was changed after export: its {which} is not the manifest's")


def _unlisted_file(payload: Path, listed: Container[str]) -> str | None:
    """Return the relative path of a file, device or the like that is not listed, or None.

    Links to folders are not followed.

    Raises:
        OSError: A folder can't be read, or there are too many.
    """
    folders, number = [""], 0
    while folders:
        folder = folders.pop()
        number += 1
        if number > _MAX_FOLDERS:
            raise OSError(errno.EFBIG, f"it has more than {_MAX_FOLDERS:,} folders", str(payload))
        with os.scandir(payload / folder) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif name not in listed and not entry.is_dir():
                    return name
    return None


def sha256(path: Path) -> str:
    """Return the sha256 of a regular file as hex digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(payload: Path) -> dict[str, FileEntry]:
    """Return sha256 and size of all files in a payload folder, as needed for `Manifest.files`."""
    return {
        path.relative_to(payload).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in files_below(payload)
    }


def publish(manifest: Manifest, folder: Path, sign: signing.Sign | None = None) -> None:
    """Make `manifest` the current version of the bundle in `folder`.

    The payload folder of the version must already exist.

    A rename of the manifest file switches the version. Before the rename, entries of both the old
    and the new manifest are written to the checksum and signature files. If the process is killed
    at any point, the bundle can therefore be read as the old or the new version. There is an
    exception: if one version is signed and the other is not, a reader that requires trusted keys
    may refuse the bundle.

    Args:
        manifest: The new manifest.
        folder: The bundle.
        sign: Function that signs the manifest, from `signing.signer`; None: not signed.
    """
    text = manifest.to_json().encode()
    path, checksum, signature = folder / MANIFEST, folder / CHECKSUM, folder / SIGNATURE
    new = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"
    old = f"{sha256(path)}  {MANIFEST}\n" if path.exists() else ""
    signed = f"{sign(text)}\n" if sign else ""
    before = _signatures(folder) or ""
    # A signature file without an entry of the live manifest would look forged.
    if signed and before:
        _replace(signature, (signed + before).encode())
    else:
        signature.unlink(missing_ok=True)
    _replace(checksum, (new + old).encode())
    _replace(path, text)
    with suppress(OSError):  # `manifest` is live; the entries of the old one do no harm
        _replace(checksum, new.encode())
        if signed:
            _replace(signature, signed.encode())


def _signatures(folder: Path) -> str | None:
    try:
        return read_limited(folder / SIGNATURE, MAX_COMPANION).decode(errors="replace")
    except FileNotFoundError:
        return None


def _replace(path: Path, data: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(data)
