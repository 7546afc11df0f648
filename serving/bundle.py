"""The bundle: `manifest.json` and the payload folder it names. Read, verify, write.

    bundle/
      manifest.json         what the service needs to know; its last write makes a version live
      manifest.sha256       catches accidents (forgery needs a signature)
      VERSION/              model.onnx, model.ts, golden/, README.md

A new version is a new payload folder; `manifest.json` is replaced by one rename. Whoever reads the
bundle meanwhile sees the old version or the new one, never half of each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from serving.errors import BundleError, OptionError
from serving.files import write_aside
from serving.preprocess import Preprocess
from serving.views import VIEWS, View

SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
CHECKSUM: Final = "manifest.sha256"
_TRIES: Final = 5


@dataclass(frozen=True)
class Manifest:
    """Everything that decides or describes the answers of one exported model.

    name: the model's name; version: hash of what decides answers (see `content_version`).
    labels: class names in the order of the logits.
    temperature: logits are divided by it before softmax; 1 until calibrated.
    views: in the order in which `tta=N` takes them; average: "mean" or "log_mean" over them.
    thresholds: {"confident": probability or None, "energy": -log sum exp of logits or None}: an
        answer is confident from the one on; a photo may be a stranger above the other.
    graph: the graph contract, for readers of the file.
    precisions: {"fp32": {"file", "accuracy", "tolerance"}}; tolerance is the largest probability
        difference that golden images may show.
    golden: [{"file", "probabilities": {precision: [classes]}}], plain view.
    files: every payload file but none other: {relative path: {"sha256", "bytes"}}.
    tried: of each precision beside fp32 whether it was kept, or why not, with the figures.
    calibration, tta, parity, batchnorm, tuning, provenance: reports; they decide nothing.
    """

    name: str
    version: str
    arch: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    precisions: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Any]]
    views: tuple[View, ...] = VIEWS
    average: str = "mean"
    temperature: float = 1.0
    thresholds: Mapping[str, float | None] = field(
        default_factory=lambda: {"confident": None, "energy": None}
    )
    calibration: Mapping[str, Any] | None = None
    tried: Mapping[str, Any] = field(default_factory=dict)
    graph: Mapping[str, Any] = field(default_factory=dict)
    torchscript: str | None = None
    golden: tuple[Mapping[str, Any], ...] = ()
    tta: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] = field(default_factory=dict)
    batchnorm: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Indented JSON, keys in the order above."""
        values = asdict(self)
        values["views"] = [view._asdict() for view in self.views]
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            BundleError: Not a manifest of this schema.
        """
        try:
            values = json.loads(text)
            if values.get("schema") != SCHEMA:
                found = values.get("schema")
                raise BundleError(f"schema {found!r} is not {SCHEMA}; export the model again")
            unknown = set(values) - {item.name for item in fields(cls)}
            if unknown:
                raise BundleError(f"unknown fields {', '.join(sorted(unknown))}")
            values["labels"] = tuple(values["labels"])
            values["preprocess"] = Preprocess.from_dict(values["preprocess"])
            values["views"] = tuple(View(**view) for view in values["views"])
            values["golden"] = tuple(values["golden"])
            manifest = cls(**values)
            entries = [manifest.files, manifest.precisions]
            entries += [*manifest.files.values(), *manifest.precisions.values(), *manifest.golden]
            if not all(isinstance(entry, dict) for entry in entries):
                raise TypeError("files, precisions and golden hold objects")
            if not (math.isfinite(manifest.temperature) and manifest.temperature > 0):
                raise ValueError(f"temperature = {manifest.temperature}: it must be above 0")
            if not manifest.views or manifest.views[0][1:] != VIEWS[0][1:]:
                raise ValueError("the first view must be the plain one")
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError, OptionError) as error:
            raise BundleError(f"not a manifest: {error}") from error


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    folder: holds `manifest.json`; payload: folder/VERSION.
    """

    folder: Path
    manifest: Manifest

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


def read(folder: Path) -> Bundle:
    """Read a bundle and check every byte of it against its manifest.

    Raises:
        BundleError: Nothing there, or a file is missing, changed or not listed; names the file.
    """
    path = folder / MANIFEST
    try:
        for _ in range(_TRIES):
            raw = path.read_bytes()
            stated = (folder / CHECKSUM).read_text().split()[::2]
            if hashlib.sha256(raw).hexdigest() in stated:
                break  # else a new version may have come between the two
        else:
            raise BundleError(
                f"{path} was changed after export: its sha256 is not that of {CHECKSUM}"
            )
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise BundleError(
            f"no bundle in {folder}: {missing} is missing; make one with `fledge export`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder} can't be read: {error}") from error
    try:
        bundle = Bundle(folder, Manifest.from_json(raw.decode()))
    except (BundleError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: {error}") from error
    _verify_files(bundle)
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
    named = [str(entry.get("file")) for entry in bundle.manifest.precisions.values()]
    named += [str(item.get("file")) for item in bundle.manifest.golden]
    named += [bundle.manifest.torchscript] if bundle.manifest.torchscript else []
    for name in named:
        if name not in listed:
            raise BundleError(f"{bundle.folder / MANIFEST}: {name} has no sha256")


def content_version(manifest: Manifest, graphs: Mapping[str, str]) -> str:
    """Twelve hex digits that change when, and only when, something that decides answers does.

    Args:
        manifest: Its labels, preprocess, temperature, thresholds, views and average count.
        graphs: File name -> sha256 of every graph.
    """
    decides = {
        "graphs": dict(sorted(graphs.items())),
        "labels": manifest.labels,
        "preprocess": manifest.preprocess.to_dict(),
        "temperature": manifest.temperature,
        "thresholds": dict(manifest.thresholds),
        "views": manifest.views,
        "average": manifest.average,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


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


def publish(manifest: Manifest, folder: Path) -> None:
    """Make `manifest` the live one of `folder`, whose payload must lie there already.

    The rename of the manifest is the moment of change. Around it the checksum file lists the old
    and the new digest, so that a kill at any point leaves a bundle that reads as one or the other.
    """
    text = manifest.to_json().encode()
    path, checksum = folder / MANIFEST, folder / CHECKSUM
    new = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"
    old = f"{sha256(path)}  {MANIFEST}\n" if path.exists() else ""
    _replace(checksum, (new + old).encode())
    _replace(path, text)
    _replace(checksum, new.encode())


def _replace(path: Path, data: bytes) -> None:
    with write_aside(path) as aside:
        aside.write_bytes(data)
