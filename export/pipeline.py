"""Checkpoint -> bundle: fuse, write, prove equal, and only then go live.

    checkpoint ─fuse─> graph ─write─> OUT/.partial-PID/ ─gate─> OUT/VERSION/ ─> OUT/manifest.json

Everything is written aside; until the last rename an older bundle in OUT is what it was.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from export import graph as contract
from export import onnx, torchscript, verify
from export.card import card
from serving import bundle, views
from serving.bundle import Manifest
from serving.errors import BundleError, OptionError, WorkError
from serving.files import is_running
from serving.predictor import Predictor
from serving.runtime import OnnxRuntime, Runtime
from serving.runtime_torchscript import TorchScriptRuntime
from training import checkpoint
from training.data import of_run
from training.model import Classifier

ONNX: Final = "model.onnx"
TORCHSCRIPT: Final = "model.ts"

_WORKERS: Final = 4
"""Each holds a chunk's activations; more would need memory more than they save time."""
_PARTIAL: Final = re.compile(r"\.partial-(\d+)")
_VERSION: Final = re.compile(r"[0-9a-f]{12}")
_PACKAGES: Final = ("fledge", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime")


def export(
    run: Path,
    out: Path,
    *,
    data: Path | None = None,
    name: str | None = None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Export a run's best checkpoint to a bundle that has proved to answer as it does.

    Args:
        run: The run's folder, or its checkpoint.
        out: The bundle's folder; made if it is not there, and superseded if it is.
        data: Where the photos are now, if they have moved since training.
        name: Of the model; the run's own name by default.
        say: Takes one line about each step.

    Raises:
        DataError: No checkpoint or no photos there.
        OptionError: `out` or `name` can't be used.
        GateError: The exported graphs do not answer as the checkpoint does; no bundle is written.
        WorkError: Weights that are not finite, a network that can't be exported, a full disk.
    """
    _check_target(out)
    classifier, info = checkpoint.load(run)
    _check_finite(classifier, run)
    name = _check_name(info.name if name is None else name)
    samples = verify.held_out([(s.path, s.label) for s in of_run(run, data).valid])
    try:
        with _aside(out) as payload:
            manifest = _build(payload, classifier, info, name, samples, say)
            manifest = replace(manifest, provenance=_provenance(run, info))
            (payload / "README.md").write_text(card(manifest), encoding="utf-8")
            manifest = replace(manifest, files=bundle.describe_files(payload))
            manifest = _go_live(payload, manifest, out)
    except OSError as error:
        reason = error.strerror or error
        raise WorkError(f"--out {out} can't be written: {reason}; nothing was changed") from error
    say(f"{out}: {manifest.name} {manifest.version} is live")
    return manifest


def _build(
    payload: Path,
    classifier: Classifier,
    info: checkpoint.CheckpointInfo,
    name: str,
    samples: Sequence[verify.Sample],
    say: Callable[[str], None],
) -> Manifest:
    """Fill `payload` with graphs and golden images that passed the gate; all but card and files."""
    graph, report = contract.assemble(classifier, info.preprocess)
    say(f"{info.arch}: folded {len(report.folded)} of {report.before} BatchNorms")
    for write, file in ((onnx.write, ONNX), (torchscript.write, TORCHSCRIPT)):
        write(graph, payload / file, name=name, labels=info.classes, preprocess=info.preprocess)
        say(f"wrote {file}, {(payload / file).stat().st_size / 1e6:.1f} MB")
    digests = {file: bundle.sha256(payload / file) for file in (ONNX, TORCHSCRIPT)}
    entry: dict[str, Any] = {"file": ONNX, "accuracy": None, "tolerance": verify.TOLERANCE}
    manifest = Manifest(
        name=name,
        version=bundle.content_version(
            digests, info.classes, info.preprocess, 1.0, views.VIEWS, "mean"
        ),
        arch=info.arch,
        labels=info.classes,
        preprocess=info.preprocess,
        precisions={"fp32": entry},
        files={},
        graph=contract.contract(graph, info.preprocess),
        torchscript=TORCHSCRIPT,
        batchnorm=report.to_dict(),
        tuning={"cpu": {"max_batch": 1}},
    )
    original = contract.CheckpointRuntime(classifier, info.preprocess)
    engines: dict[str, Runtime] = {
        "onnx": OnnxRuntime(payload / ONNX, device="cpu"),
        "torchscript": TorchScriptRuntime(payload / TORCHSCRIPT, device="cpu"),
    }
    predictors = {key: Predictor(manifest, engine) for key, engine in engines.items()}
    with _one_thread_each() as workers:
        outcome = verify.gate(original, info.preprocess, predictors, samples, workers)
        golden = verify.golden(payload, original, info.preprocess, samples)
    largest = max(found.difference for found in outcome.graphs.values())
    say(
        f"checked on {outcome.photos} held-out photos: largest difference {largest:.1e}, "
        f"accuracy {outcome.accuracy['onnx']:.1%}"
    )
    entry["accuracy"] = outcome.accuracy["onnx"]
    return replace(
        manifest,
        precisions={"fp32": entry},
        parity=outcome.to_dict(),
        golden=golden,
    )


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


def _provenance(run: Path, info: checkpoint.CheckpointInfo) -> dict[str, Any]:
    """Where the model comes from, without a path or a host's name in it."""
    photos = {key: value for key, value in info.data.items() if key != "root"}
    photos["source"] = Path(str(photos.get("source", ""))).name
    return {
        "run": checkpoint.folder_of(run).resolve().name,
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


def _check_finite(classifier: Classifier, run: Path) -> None:
    for key, value in classifier.state_dict().items():
        if not torch.isfinite(value).all():
            raise WorkError(f"{run}: {key} holds NaN or infinity; train again at a lower rate")


def _check_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w. -]{0,99}", name):
        raise OptionError(f"name = {name!r}: use up to 100 letters, digits, '.', '-', '_'")
    return name


def _check_target(out: Path) -> None:
    """Refuse a file, and a folder that holds other things: an export deletes what it supersedes."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OptionError(f"--out {out} is a file; name a folder for the bundle")
    present = {path.name for path in out.iterdir()}
    if {bundle.MANIFEST, bundle.CHECKSUM} <= present:
        return
    # What an export that was killed may leave behind is no stranger.
    left = {bundle.CHECKSUM, *(f".{n}.partial" for n in (bundle.MANIFEST, bundle.CHECKSUM))}
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
def _aside(out: Path) -> Iterator[Path]:
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


def _go_live(payload: Path, manifest: Manifest, out: Path) -> Manifest:
    """Give the payload its place, switch the manifest, and remove what is superseded for good."""
    try:
        live = bundle.read(out).manifest
    except BundleError:
        live = None
    if live is not None and live.version == manifest.version:
        # The same graphs. Somebody may be reading that folder: it stays as it is, with its golden
        # images, and only the manifest is new.
        manifest = replace(manifest, files=live.files, golden=live.golden)
    else:
        for path in payload.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        place = out / manifest.version
        shutil.rmtree(place, ignore_errors=True)  # of an export that never went live, or broken
        payload.rename(place)
    bundle.publish(manifest, out)
    keep = {manifest.version, live.version if live else None}
    for path in out.iterdir():
        if _VERSION.fullmatch(path.name) and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)
    return manifest
