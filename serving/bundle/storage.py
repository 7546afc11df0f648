"""Bundle folders: read and verify a bundle, publish a new version.

    bundle/
      manifest.json         everything about the live version; see `serving.bundle.manifest`
      manifest.sha256       checksum of the manifest; detects accidental changes
      manifest.sig          signatures of the manifest; detect forgery if trusted keys are set
      VERSION/              the payload: model.onnx, model.ts, model.pt2, golden/, README.md

A new version is a new payload folder. Publishing replaces `manifest.json` by one rename, so a
concurrent reader gets the old version or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serving.bundle import signing
from serving.bundle.entries import FileEntry
from serving.bundle.manifest import Manifest, content_version
from serving.errors import BundleError
from serving.utils.files import atomic_write

MANIFEST: Final = "manifest.json"
CHECKSUM: Final = "manifest.sha256"
SIGNATURE: Final = "manifest.sig"
_TRIES: Final = 5  # attempts to read the manifest and the checksum of the same version


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        folder: The folder of `manifest.json`.
        manifest: Content of that file.
        signers: Names of the keys that signed the manifest, from `signing.check`.
        trusted: Whether the signers were checked against trusted keys.
    """

    folder: Path
    manifest: Manifest
    signers: tuple[str, ...] = ()
    trusted: bool = False

    @property
    def payload(self) -> Path:
        """The folder of this version's files."""
        return self.folder / self.manifest.version

    def graph(self, precision: str) -> Path:
        """The ONNX file of a precision.

        Raises:
            BundleError: The bundle has no such precision.
        """
        entry = self.manifest.precisions.get(precision)
        if entry is None:
            have = ", ".join(self.manifest.precisions)
            raise BundleError(f"{self.folder} has no {precision} graph; it has {have}")
        return self.payload / entry["file"]

    @property
    def signature_warning(self) -> str:
        """Text to put after the signers' names; empty if their keys are trusted."""
        return "" if self.trusted else f" (key not verified: {signing.TRUSTED} is not set)"

    def load(self, name: str) -> bytes:
        """The bytes of a payload file, checked against the manifest.

        The sha256 is that of the returned bytes, so a file that changed after the bundle was read
        is refused.

        Raises:
            BundleError: The file can't be read, or its sha256 differs from the manifest's.
        """
        path = self.payload / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} can't be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name]["sha256"]:
            raise BundleError(f"{path} was changed after export: its sha256 is not the manifest's")
        return data


def read(folder: Path, *, require_trusted: bool = True) -> Bundle:
    """Read a bundle, check every file against the manifest, and check the signatures.

    Args:
        folder: The bundle.
        require_trusted: Whether one of the keys of FLEDGE_TRUSTED_KEYS, if it is set, must have
            signed the manifest. An export that replaces the bundle passes False.

    Raises:
        BundleError: There is no bundle, a file is missing, changed or not listed in the manifest,
            or no trusted key signed the manifest. The message names the file.
        OptionError: The file of FLEDGE_TRUSTED_KEYS can't be used.
    """
    keys = signing.trusted() if require_trusted else None
    path = folder / MANIFEST
    try:
        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1
            raw = path.read_bytes()
            # The files disagree if a version was published between the two reads, so try again.
            stated = (folder / CHECKSUM).read_text().split()[::2]
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
        raise BundleError(f"{folder} can't be read: {reason}") from error
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
    for name, facts in listed.items():
        path = payload / name
        if not path.resolve().is_relative_to(payload.resolve()):
            raise BundleError(f"{bundle.folder / MANIFEST}: {name} lies outside the bundle")
        try:
            actual = sha256(path)
        except OSError as error:
            raise BundleError(f"{path} is listed in the manifest and can't be read") from error
        if actual != facts["sha256"]:
            raise BundleError(f"{path} was changed after export: its sha256 is not the manifest's")
    present = {
        path.relative_to(payload).as_posix() for path in payload.rglob("*") if path.is_file()
    }
    extra = sorted(present - set(listed))
    if extra:
        raise BundleError(f"{payload / extra[0]} is not listed in the manifest; remove it")
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


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(payload: Path) -> dict[str, FileEntry]:
    """The value of `Manifest.files` for a payload folder."""
    return {
        path.relative_to(payload).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(payload.rglob("*"))
        if path.is_file()
    }


def publish(manifest: Manifest, folder: Path, sign: signing.Sign | None = None) -> None:
    """Make `manifest` the live version of `folder`; its payload must already be there.

    The rename of the manifest switches the version. Before the rename, the checksum and signature
    files get entries of both the old and the new manifest. A kill at any point therefore leaves a
    bundle that can be read as the old or the new version, with one exception: if only one of the
    two versions is signed, a reader that requires trusted keys may be able to read neither.
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
    _replace(checksum, new.encode())
    if signed:
        _replace(signature, signed.encode())


def _signatures(folder: Path) -> str | None:
    try:
        return (folder / SIGNATURE).read_text(errors="replace")
    except FileNotFoundError:
        return None


def _replace(path: Path, data: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(data)
