"""Export pipeline: fuse BatchNorms, write the graphs, calibrate, check parity, publish the bundle.

    checkpoint -fuse-> graph -write-> OUT/.partial-PID/ -calibrate, parity gate-> OUT/VERSION/
    -> OUT/manifest.json

All files are written to a partial folder, so an older bundle in OUT stays unchanged until the last
rename. The parity gate checks that the exported graphs give the checkpoint's probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from export import calibration, parity, torchvision_checkpoint
from export.graph import CheckpointRuntime, assemble, contract
from export.input_size.choose import resize
from export.model_card import card
from export.precision import folds as other_folds
from export.precision.select import (
    FILES,
    MAX_PHOTOS,
    PrecisionRequest,
    check_request,
    select_precisions,
)
from export.precision.verdict import DEFAULT_BUDGET
from export.publish import check_target, partial_payload, publish
from export.sources.source import Source, check_finite, read_run
from export.writers import onnx
from export.writers.formats import FORMATS, GraphFormat
from serving.bundle import signing, storage
from serving.bundle.manifest import Manifest, content_version
from serving.errors import OptionError, WorkError
from serving.imaging.tta import views_for
from serving.inference.predictor import Predictor
from serving.inference.runtime import OnnxRuntime, Runtime
from serving.terminal import show, valid_utf8
from training.run import checkpoint

ONNX: Final = FILES["fp32"]

_WORKERS: Final = 4
"""Threads of the parity gate.

Each holds the activations of a chunk of photos in memory. More threads would need much more memory
and save little time.
"""
_PACKAGES: Final = ("fledge", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        name: Name of the model; None: the recipe's name.
        confident: Precision or coverage to reach with the confidence threshold; None: no threshold.
        precision: "fp32": no other precision is tried. "int8" or "fp16": this precision is tried,
            and the export fails if it is refused. "auto": both are tried, and each is kept if it is
            faster than fp32 and accurate enough.
        accuracy_budget: Percentage points of accuracy that a faster precision may lose.
        sign: PEM file with the private key that signs the manifest; None: no signature.
    """

    name: str | None = None
    confident: calibration.ConfidenceTarget | None = None
    precision: str = "auto"
    accuracy_budget: float = DEFAULT_BUDGET
    sign: Path | None = None


def export(
    run: Path,
    out: Path,
    options: ExportOptions = ExportOptions(),
    *,
    data: Path | None = None,
    photos: Path | None = None,
    folds: Sequence[Path] = (),
    size: int | None = None,
    formats: Sequence[GraphFormat] = FORMATS,
    log: Callable[[str], None] = show,
) -> Manifest:
    """Export a run's best checkpoint to a bundle, and check that both give the same probabilities.

    Args:
        run: The run's folder, or one of its checkpoint files.
        out: The bundle's folder. If it has a bundle, the new version replaces the old one.
        options: Name, precisions, confidence target and signing key.
        data: The photos' folder, if they were moved after training.
        photos: Folder of further held-out photos, with one folder per class, for comparing
            precisions and input sizes.
        folds: Runs of the other folds of the same data, for comparing precisions and input sizes.
        size: Side of the network's input in pixels, if not that of the training.
        formats: File formats in which the graph is written besides ONNX.
        log: Function that is called with one line per step.

    Raises:
        DataError: There is no checkpoint, or the photos are missing.
        OptionError: `out` or an option can't be used, no threshold reaches the requested precision,
            or fp16 was requested and there is no GPU.
        GateError: A graph's probabilities differ too much from those of the checkpoint, or the
            requested precision or size is refused. No bundle is written.
        WorkError: Weights are not finite, the network can't be exported, or the disk is full.
    """
    check_target(out)
    sizes = [] if size is None else [size]
    source = read_run(run, sizes, "--size", data=data, photos=photos, folds_of=folds, log=log)
    return _export(source, run, out, options, formats, log, size)


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
    formats: Sequence[GraphFormat] = FORMATS,
    log: Callable[[str], None] = show,
) -> Manifest:
    """Export a torchvision checkpoint that was trained outside Fledge.

    Args:
        path: File with a state dict, such as a `.pth` or `.safetensors` file.
        out: The bundle's folder. If it has a bundle, the new version replaces the old one.
        options: Name, precisions, confidence target and signing key.
        arch: torchvision's name of the network.
        labels: Text file with one class name per line, in the order of the logits.
        photos: Folder of photos that the network was not trained on, with one folder per class.
        arch_args: Keyword arguments of torchvision's model builder.
        size: Side of the input in training, in pixels; None: the network's default size.
        crop: Share of the photo's short side that the centre crop keeps; None: 0.875.
        formats: File formats in which the graph is written besides ONNX.
        log: Function that is called with one line per step.

    Raises:
        FledgeError: The checkpoint, the labels or the photos can't be read, or the export fails
            for one of the reasons listed in `export`.
    """
    check_target(out)
    names = torchvision_checkpoint.read_labels(labels)
    classifier, info = torchvision_checkpoint.load(
        path, arch, names, arch_args=arch_args, size=size, crop=crop
    )
    train, valid = torchvision_checkpoint.photos(photos, names, log=log)
    info = replace(info, data={"source": str(photos), "train": 0, "valid": len(valid)})
    exported = Source(classifier, info, path.name, train, valid, trained=False)
    return _export(exported, path, out, options, formats, log)


def _export(
    source: Source,
    path: Path,
    out: Path,
    options: ExportOptions,
    formats: Sequence[GraphFormat],
    log: Callable[[str], None],
    size: int | None = None,
) -> Manifest:
    check_finite(source.classifier, path)
    name = _check_name(source.info.name if options.name is None else options.name)
    check_request(options.precision, options.accuracy_budget)
    sign = signing.signer(options.sign) if options.sign else None
    signing.trusted()  # raises errors in the trusted keys now, not after minutes of work
    if size is not None:
        source = resize(source, size, options.accuracy_budget, log)
    valid = parity.subsample(source.valid)
    rest = sorted({*source.valid} - {*valid})
    source = source._replace(valid=valid, more=[*parity.subsample(rest, MAX_PHOTOS), *source.more])
    try:
        with partial_payload(out) as payload:
            manifest = _build(payload, source, name, options, formats, log)
            provenance = _provenance(source.name, source.info)
            manifest = manifest.model_copy(update={"provenance": provenance})
            (payload / "README.md").write_text(card(manifest), encoding="utf-8")
            files = storage.describe_files(payload)
            manifest = manifest.model_copy(update={"files": files})
            manifest = publish(payload, manifest, out, sign)
    except OSError as error:
        reason = error.strerror or error
        raise WorkError(f"--out {out} can't be written: {reason}; nothing was changed") from error
    log(f"{out}: {manifest.name} {manifest.version} is live")
    return manifest


def _build(
    payload: Path,
    source: Source,
    name: str,
    options: ExportOptions,
    formats: Sequence[GraphFormat],
    log: Callable[[str], None],
) -> Manifest:
    """Write graphs and golden images to `payload`, and return the manifest.

    Golden images are photos stored with their expected probabilities. The manifest's `files` and
    `provenance` are still empty.
    """
    classifier, info, samples = source.classifier, source.info, source.valid
    graph, fusion = assemble(classifier, info.preprocess)
    log(f"{info.arch}: folded {len(fusion.folded)} of {fusion.before} BatchNorms")
    for write, file in ((onnx.write, ONNX), *((one.write, one.file) for one in formats)):
        write(graph, payload / file, name=name, labels=info.classes, preprocess=info.preprocess)
        log(f"wrote {file}, {(payload / file).stat().st_size / 1e6:.1f} MB")
    entry: dict[str, Any] = {"file": ONNX, "accuracy": None, "tolerance": parity.TOLERANCE}
    manifest = Manifest(
        name=name,
        version="",
        arch=info.arch,
        labels=info.classes,
        preprocess=info.preprocess,
        views=views_for(info.preprocess),
        precisions={"fp32": entry},
        files={},
        graph=contract(graph, info.preprocess),
        batchnorm=fusion.to_dict(),
    ).model_copy(update={one.field: one.file for one in formats})
    original = CheckpointRuntime(classifier, info.preprocess)
    engines: dict[str, Runtime] = {
        "onnx": OnnxRuntime(payload / ONNX, device="cpu"),
        **{one.name: one.open(payload / one.file) for one in formats},
    }
    with _single_threaded_torch() as workers:
        held_out = calibration.predict_views(Predictor(manifest, engines["onnx"]), samples, workers)
        manifest = calibration.calibrate(manifest, held_out, options.confident, log)
        predictors = {key: Predictor(manifest, engine) for key, engine in engines.items()}
        report = parity.gate(original, info.preprocess, predictors, samples, workers, log)
        entry["accuracy"] = report.accuracy["onnx"]
        manifest = manifest.model_copy(
            update={
                "precisions": {"fp32": entry},
                "parity": report.to_dict()
                | ({"size": source.size_report} if source.size_report else {}),
                "golden": parity.write_golden(payload, original, manifest, samples),
            }
        )
    largest = max(agreement.difference for agreement in report.graphs.values())
    log(
        f"checked on {report.photos} held-out photos: largest difference {largest:.1e}, "
        f"accuracy {report.accuracy['onnx']:.1%}"
    )
    commonest = max(photos for photos, _ in report.classes.values()) / report.photos
    if report.accuracy["onnx"] <= commonest:
        log(
            f"warning: always predicting the most common class would be right in {commonest:.1%}; "
            "are the labels in the order of the logits?"
        )
    with TemporaryDirectory() as folder:
        folds = source.folds if options.precision != "fp32" else ()
        request = PrecisionRequest(
            options.precision,
            options.accuracy_budget,
            source.train,
            trained=source.trained,
            held_out=source.more,
            folds=other_folds.write(folds, Path(folder), info.preprocess),
        )
        manifest = select_precisions(payload, manifest, held_out, samples, request, log)
    digests = {file: storage.sha256(payload / file) for file in manifest.graphs}
    return manifest.model_copy(update={"version": content_version(manifest, digests)})


@contextmanager
def _single_threaded_torch() -> Iterator[int]:
    """Set torch to one thread during the context, and yield the number of worker threads to use.

    Torch's own threads busy-wait for each other. When other programs used the cores, this made the
    parity gate ten times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(before, _WORKERS)
    finally:
        torch.set_num_threads(before)


def _provenance(source: str, info: checkpoint.CheckpointInfo) -> dict[str, Any]:
    """Return the manifest's `provenance` entry, without paths and host names."""
    photos = {key: value for key, value in info.data.items() if key != "root"}
    photos["source"] = valid_utf8(Path(str(photos.get("source", ""))).name)
    return {
        "run": valid_utf8(source),
        "recipe": info.name,
        "seed": info.seed,
        "data": photos,
        "trained": dict(info.metrics),
        "trained_with": dict(info.versions),
        "exported_with": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _check_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w. -]{0,99}", name):
        raise OptionError(f"name = {name!r}: use up to 100 letters, digits, '.', '-', '_'")
    return name
