"""The bundle: `manifest.json` and the payload folder that it names. Read, verify, publish.

    bundle/
      manifest.json         what the service needs to know; its last write makes a version live
      manifest.sha256       catches accidents
      manifest.sig          catches forgery, where the export signed it and the reader asks for it
      VERSION/              model.onnx, model.ts, model.pt2, golden/, README.md

A new version is a new payload folder; `manifest.json` is replaced by one rename. Whoever reads the
bundle meanwhile sees the old version or the new one, never half of each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serving.bundle import signing
from serving.bundle.manifest import Manifest, content_version
from serving.errors import BundleError
from serving.utils.files import write_aside

MANIFEST: Final = "manifest.json"
CHECKSUM: Final = "manifest.sha256"
SIGNATURE: Final = "manifest.sig"
_TRIES: Final = 5


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    folder: holds `manifest.json`; payload: folder/VERSION.
    signers: names of the keys that signed it, as `signing.check`; trusted: whether these had to be
        known.
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
        return self.payload / str(entry["file"])

    @property
    def signature_warning(self) -> str:
        """What must be said behind a signer's name: anybody can sign with a key of his own."""
        return "" if self.trusted else f", whom nobody vouches for: {signing.TRUSTED} is not set"

    def load(self, name: str) -> bytes:
        """The bytes of a payload file, which are those that the manifest speaks of.

        What is used is what was checked: the file may have been changed since the bundle was read.

        Raises:
            BundleError: It was.
        """
        path = self.payload / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} can't be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name]["sha256"]:
            raise BundleError(f"{path} was changed after export: its sha256 is not the manifest's")
        return data


def read(folder: Path, *, whoever: bool = False) -> Bundle:
    """Read a bundle, check every byte of it against its manifest, and who signed that.

    By whatever door it is read: where FLEDGE_TRUSTED_KEYS is set, one of those keys has signed it;
    unless `whoever`, for an export that is about to replace it.

    Raises:
        BundleError: Nothing there; a file is missing, changed or not listed; no trusted key signed
            it. Names the file.
        OptionError: As `signing.trusted`.
    """
    keys = None if whoever else signing.trusted()
    path = folder / MANIFEST
    try:
        for turn in range(_TRIES):
            last = turn == _TRIES - 1
            raw = path.read_bytes()
            # Either may be of another version that came in between: then once more.
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
                f"{path} was changed after export, or {CHECKSUM} was: its sha256 is another"
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
    except ValueError as error:  # a name that is none, such as one with a NUL in it
        raise BundleError(f"{path}: not a manifest: {error}") from error
    return bundle


def _verify_files(bundle: Bundle) -> None:
    payload, listed = bundle.payload, bundle.manifest.files
    version = str(bundle.manifest.version)
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
        if actual != facts.get("sha256"):
            raise BundleError(f"{path} was changed after export: its sha256 is not the manifest's")
    present = {
        path.relative_to(payload).as_posix() for path in payload.rglob("*") if path.is_file()
    }
    extra = sorted(present - set(listed))
    if extra:
        raise BundleError(f"{payload / extra[0]} is not listed in the manifest; remove it")
    graphs = bundle.manifest.graphs
    for name in [*graphs, *(str(item.get("file")) for item in bundle.manifest.golden)]:
        if name not in listed:
            raise BundleError(f"{bundle.folder / MANIFEST}: {name} has no sha256")
    digests = {name: str(listed[name]["sha256"]) for name in graphs}
    if version != content_version(bundle.manifest, digests):
        raise BundleError(
            f"{bundle.folder / MANIFEST} was changed after export: its version is of other content"
        )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(payload: Path) -> dict[str, dict[str, Any]]:
    """`Manifest.files` of a payload folder."""
    return {
        path.relative_to(payload).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(payload.rglob("*"))
        if path.is_file()
    }


def publish(manifest: Manifest, folder: Path, sign: signing.Sign | None = None) -> None:
    """Make `manifest` the live one of `folder`, whose payload must lie there already.

    The rename of the manifest is the moment of change. Around it the files beside it list the old
    and the new digest, and the old and the new signature, so that a kill at any point leaves a
    bundle that reads as one or the other. Only who trusts keys alone may see neither, where one of
    the two is not signed.
    """
    text = manifest.to_json().encode()
    path, checksum, signature = folder / MANIFEST, folder / CHECKSUM, folder / SIGNATURE
    new = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"
    old = f"{sha256(path)}  {MANIFEST}\n" if path.exists() else ""
    signed = f"{sign(text)}\n" if sign else ""
    before = _signatures(folder) or ""
    # Alone beside a manifest that it is not of, a signature would look forged.
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
    with write_aside(path) as aside:
        aside.write_bytes(data)
