"""Checkpoint -> bundle: fuse, write, prove equal, and only then go live.

    checkpoint ─fuse─> graph ─write─> OUT/.partial-PID/ ─calibrate, gate─> OUT/VERSION/
    ─> OUT/manifest.json

Everything is written aside; until the last rename an older bundle in OUT is what it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from export import calibration, publish, torchvision_checkpoint
from export import graph as contract
from export import parity as verify
from export.model_card import card
from export.precision import select as precisions
from export.precision.verdict import BUDGET
from export.writers import onnx, torchscript
from export.writers import torch_export as pt2
from serving.bundle import signing, storage
from serving.bundle.manifest import Manifest, content_version
from serving.errors import OptionError, WorkError
from serving.inference.predictor import Predictor
from serving.inference.runtime import OnnxRuntime, Runtime
from serving.inference.torchscript import TorchScriptRuntime
from training.run import checkpoint
from training.run.dataset import of_run

ONNX: Final = precisions.FILES["fp32"]
TORCHSCRIPT: Final = "model.ts"
TORCH_EXPORT: Final = "model.pt2"

_WORKERS: Final = 4
"""Each holds a chunk's activations; more would need memory more than they save time."""
_PACKAGES: Final = ("fledge", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """What an export may be asked for.

    name: of the model; the run's own name by default.
    confident: what the service shall call a confident answer; it says nothing by default.
    precision: "fp32" tries no other; "int8" and "fp16" fail where they are refused.
    accuracy_budget: points of accuracy that a faster precision may cost.
    sign: a PEM file with the private key that signs the manifest.
    """

    name: str | None = None
    confident: calibration.ConfidenceTarget | None = None
    precision: str = "auto"
    accuracy_budget: float = BUDGET
    sign: Path | None = None


def export(
    run: Path,
    out: Path,
    options: ExportOptions = ExportOptions(),
    *,
    data: Path | None = None,
    log: Callable[[str], None] = print,
) -> Manifest:
    """Export a run's best checkpoint to a bundle that has proved to answer as it does.

    Args:
        run: The run's folder, or its checkpoint.
        out: The bundle's folder; made if it is not there, and superseded if it is.
        options: As `Options`.
        data: Where the photos are now, if they have moved since training.
        say: Takes one line about each step.

    Raises:
        DataError: No checkpoint or no photos there.
        OptionError: `out` or an option can't be used; no threshold is as precise as is asked;
            fp16 without a GPU.
        GateError: The exported graphs do not answer as the checkpoint does, or the precision that
            was asked for is refused; no bundle is written.
        WorkError: Weights that are not finite, a network that can't be exported, a full disk.
    """
    publish.check_target(out)
    classifier, info = checkpoint.load(run)
    dataset = of_run(run, data)
    train, valid = ([(s.path, s.label) for s in part] for part in (dataset.train, dataset.valid))
    source = checkpoint.folder_of(run).resolve().name
    return _export(_Model(classifier, info, source, train, valid), run, out, options, log)


def export_checkpoint(
    path: Path,
    out: Path,
    options: ExportOptions = ExportOptions(),
    *,
    arch: str,
    labels: Path,
    photos: Path,
    arch_args: Mapping[str, Any] | None = None,
    size: int | None = None,
    crop: float | None = None,
    log: Callable[[str], None] = print,
) -> Manifest:
    """Export a torchvision checkpoint that was made elsewhere, proved on photos that one names.

    Args:
        path, arch, arch_args, size, crop: As `foreign.load`.
        labels: A file of class names, one a line, in the order of the logits.
        photos: A folder a class, of photos that it was not trained on.
        out, options, say: As `export`.

    Raises:
        FledgeError: As `export`, `foreign.load` and `foreign.photos`.
    """
    publish.check_target(out)
    names = torchvision_checkpoint.read_labels(labels)
    classifier, info = torchvision_checkpoint.load(
        path, arch, names, arch_args=arch_args, size=size, crop=crop
    )
    train, valid = torchvision_checkpoint.photos(photos, names)
    facts = {"source": str(photos), "train": 0, "valid": len(valid)}
    info = replace(info, data=facts)
    return _export(_Model(classifier, info, path.name, train, valid), path, out, options, log)


class _Model(NamedTuple):
    """What is exported. source: the name of the run or the file; photos to calibrate, to decide."""

    classifier: contract.Exportable
    info: checkpoint.CheckpointInfo
    source: str
    train: Sequence[verify.Sample]
    valid: Sequence[verify.Sample]


def _export(
    model: _Model, origin: Path, out: Path, options: ExportOptions, log: Callable[[str], None]
) -> Manifest:
    _check_finite(model.classifier, origin)
    name = _check_name(model.info.name if options.name is None else options.name)
    precisions.check(options.precision, options.accuracy_budget)
    sign = signing.signer(options.sign) if options.sign else None
    signing.trusted()  # it reads what is live at the end, and a mistake in that is better known now
    model = model._replace(valid=verify.held_out(model.valid))
    try:
        with publish.aside(out) as payload:
            manifest = _build(payload, model, name, options, log)
            manifest = replace(manifest, provenance=_provenance(model.source, model.info))
            (payload / "README.md").write_text(card(manifest), encoding="utf-8")
            manifest = replace(manifest, files=storage.describe_files(payload))
            manifest = publish.go_live(payload, manifest, out, sign)
    except OSError as error:
        reason = error.strerror or error
        raise WorkError(f"--out {out} can't be written: {reason}; nothing was changed") from error
    log(f"{out}: {manifest.name} {manifest.version} is live")
    return manifest


def _build(
    payload: Path, model: _Model, name: str, options: ExportOptions, log: Callable[[str], None]
) -> Manifest:
    """Fill `payload` with graphs and golden images that passed the gate; all but card and files."""
    classifier, info, samples = model.classifier, model.info, model.valid
    graph, report = contract.assemble(classifier, info.preprocess)
    log(f"{info.arch}: folded {len(report.folded)} of {report.before} BatchNorms")
    for write, file in (
        (onnx.write, ONNX),
        (torchscript.write, TORCHSCRIPT),
        (pt2.write, TORCH_EXPORT),
    ):
        write(graph, payload / file, name=name, labels=info.classes, preprocess=info.preprocess)
        log(f"wrote {file}, {(payload / file).stat().st_size / 1e6:.1f} MB")
    entry: dict[str, Any] = {"file": ONNX, "accuracy": None, "tolerance": verify.TOLERANCE}
    manifest = Manifest(
        name=name,
        version="",
        arch=info.arch,
        labels=info.classes,
        preprocess=info.preprocess,
        precisions={"fp32": entry},
        files={},
        graph=contract.contract(graph, info.preprocess),
        torchscript=TORCHSCRIPT,
        torch_export=TORCH_EXPORT,
        batchnorm=report.to_dict(),
    )
    original = contract.CheckpointRuntime(classifier, info.preprocess)
    engines: dict[str, Runtime] = {
        "onnx": OnnxRuntime(payload / ONNX, device="cpu"),
        "torchscript": TorchScriptRuntime(payload / TORCHSCRIPT, device="cpu"),
        "torch.export": pt2.ExportedRuntime(payload / TORCH_EXPORT),
    }
    with _one_thread_each() as workers:
        held = calibration.predict_views(Predictor(manifest, engines["onnx"]), samples, workers)
        manifest = calibration.calibrated(manifest, held, options.confident, log)
        predictors = {key: Predictor(manifest, engine) for key, engine in engines.items()}
        outcome = verify.gate(original, info.preprocess, predictors, samples, workers, log)
        entry["accuracy"] = outcome.accuracy["onnx"]
        manifest = replace(
            manifest,
            precisions={"fp32": entry},
            parity=outcome.to_dict(),
            golden=verify.golden(payload, original, manifest, samples),
        )
    largest = max(found.difference for found in outcome.graphs.values())
    log(
        f"checked on {outcome.photos} held-out photos: largest difference {largest:.1e}, "
        f"accuracy {outcome.accuracy['onnx']:.1%}"
    )
    commonest = max(photos for photos, _ in outcome.classes.values()) / outcome.photos
    if outcome.accuracy["onnx"] <= commonest:
        log(
            f"careful: the commonest class alone would be right in {commonest:.1%}; "
            "are the labels in the order of the logits?"
        )
    wanted = precisions.PrecisionRequest(options.precision, options.accuracy_budget, model.train)
    manifest = precisions.select_precisions(payload, manifest, held, samples, wanted, log)
    digests = {file: storage.sha256(payload / file) for file in manifest.graphs}
    return replace(manifest, version=content_version(manifest, digests))


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """How many workers to score with, while torch uses one thread in each, as production does.

    Torch's own threads spin while they wait for each other: where something else wants the cores
    too, that made the gate ten times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(before, _WORKERS)
    finally:
        torch.set_num_threads(before)


def _provenance(source: str, info: checkpoint.CheckpointInfo) -> dict[str, Any]:
    """Where the model comes from, without a path or a host's name in it."""
    photos = {key: value for key, value in info.data.items() if key != "root"}
    photos["source"] = Path(str(photos.get("source", ""))).name
    return {
        "run": source,
        "recipe": info.name,
        "seed": info.seed,
        "data": photos,
        "trained": dict(info.metrics),
        "trained_with": dict(info.versions),
        "exported_with": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _check_finite(classifier: contract.Exportable, origin: Path) -> None:
    for key, value in classifier.state_dict().items():
        if not torch.isfinite(value).all():
            raise WorkError(f"{origin}: {key} holds NaN or infinity: its training diverged")


def _check_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w. -]{0,99}", name):
        raise OptionError(f"name = {name!r}: use up to 100 letters, digits, '.', '-', '_'")
    return name
