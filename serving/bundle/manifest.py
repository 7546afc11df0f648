"""`manifest.json`: everything that decides or describes the answers of one exported model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from serving.errors import BundleError, OptionError
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import AVERAGES, VIEWS, View

SCHEMA: Final = 1


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
    torch_export: str | None = None
    golden: tuple[Mapping[str, Any], ...] = ()
    tta: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] = field(default_factory=dict)
    batchnorm: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def graphs(self) -> list[str]:
        """The files that hold graphs."""
        files = [str(entry.get("file")) for entry in self.precisions.values()]
        return files + [file for file in (self.torchscript, self.torch_export) if file]

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
            _check(manifest)
            return manifest
        except KeyError as error:
            raise BundleError(f"not a manifest: {error} is missing") from error
        except AttributeError as error:
            reason = "it is no object, or holds none where one belongs"
            raise BundleError(f"not a manifest: {reason}") from error
        except (TypeError, ValueError, OptionError) as error:
            raise BundleError(f"not a manifest: {error}") from error


def _check(manifest: Manifest) -> None:
    """Find what would fail later, in the middle of an answer.

    Raises:
        TypeError, ValueError: Something is of the wrong kind, or out of its range.
    """
    entries = [manifest.files, manifest.precisions, manifest.thresholds]
    entries += [*manifest.files.values(), *manifest.precisions.values(), *manifest.golden]
    if not all(isinstance(entry, dict) for entry in entries):
        raise TypeError("files, precisions, golden and thresholds hold objects")
    if not manifest.labels:
        raise ValueError("labels is empty")
    names = [manifest.name, manifest.version, *manifest.labels, *manifest.files, *manifest.graphs]
    names += [one for one in (manifest.torchscript, manifest.torch_export) if one is not None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a name, a label or a file is no text")
    numbers = [manifest.temperature, *filter(None, manifest.thresholds.values())]
    for view in manifest.views:
        numbers += [view.zoom, view.x, view.y]
        if not (view.zoom > 0 and 0 <= view.x <= 1 and 0 <= view.y <= 1):
            raise ValueError(f"view {view.name} lies outside the picture")
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ValueError("a temperature, threshold or view is no number")
    if not manifest.temperature > 0:
        raise ValueError(f"temperature = {manifest.temperature}: it must be above 0")
    if not manifest.views or manifest.views[0][1:] != VIEWS[0][1:]:
        raise ValueError("the first view must be the plain one")
    if manifest.average not in AVERAGES:
        raise ValueError(f"average = {manifest.average!r}: use {' or '.join(AVERAGES)}")


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
