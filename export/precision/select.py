"""Which precisions a bundle keeps: tried, scored on held-out photos, and kept or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np
from onnx import ModelProto

from export import benchmark
from export.calibration import HeldOut, predict_views
from export.parity import Sample
from export.precision import fp16, int8
from export.precision.verdict import Verdict, judge
from export.writers import onnx
from serving.bundle.manifest import Manifest
from serving.errors import FledgeError, GateError, OptionError
from serving.imaging.preprocess import Pixels
from serving.imaging.tta import energies, softmax
from serving.inference import runtime
from serving.inference.predictor import Predictor
from serving.utils.cpu import cores

FILES: Final = {"fp32": "model.onnx", "int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}


class PrecisionKind(NamedTuple):
    """A precision beside fp32.

    device: what it is for, and is judged on. tolerance: of a golden probability.
    make: the fp32 graph, training photos, points of accuracy -> a graph, and facts about it.
    """

    device: str
    tolerance: float
    make: Callable[[Path, Pixels, float], tuple[ModelProto, dict[str, Any]]]


def _int8(source: Path, pixels: Pixels, budget: float) -> tuple[ModelProto, dict[str, Any]]:
    found = int8.search(source, pixels, 1 - budget / 100)
    return found.model, found.to_dict()


KINDS: Final = {
    # GPUs differ in the order in which they add up.
    "fp16": PrecisionKind("cuda", 0.01, lambda source, pixels, _: fp16.convert(source, pixels)),
    # Processors round differently, and a value at the edge of a step falls on its other side.
    "int8": PrecisionKind("cpu", 0.05, _int8),
}


@dataclass(frozen=True)
class PrecisionRequest:
    """What was asked for.

    precision: one of `KINDS`, "fp32" or "auto"; budget: points of accuracy; train: photos to
    calibrate on.
    """

    precision: str
    budget: float
    train: Sequence[Sample]


def check(precision: str, budget: float) -> None:
    """Refuse what can't be tried, before the work.

    Raises:
        OptionError: fp16 without a GPU; a budget that is no number of points.
    """
    if not 0 <= budget <= 100:
        raise OptionError(f"--accuracy-budget {budget:g}: use points of accuracy, 0 to 100")
    if precision in KINDS and not _usable(KINDS[precision].device):
        raise OptionError(f"--precision {precision}: no usable GPU here to try it on; use auto")


def select_precisions(
    payload: Path,
    manifest: Manifest,
    held: HeldOut,
    samples: Sequence[Sample],
    wanted: PrecisionRequest,
    log: Callable[[str], None],
) -> Manifest:
    """Try what is wanted beside fp32, and keep what is worth it; the manifest that says so.

    Args:
        payload: Holds the fp32 graph, and gets what is kept.
        manifest: Of the bundle so far.
        held: What the fp32 graph says of `samples`.
        samples: Held-out photos.
        wanted: As there.
        say: Takes a line about each.

    Raises:
        GateError: The precision that was asked for by name is refused.
        WorkError, OptionError: It could not be tried.
    """
    tried: dict[str, Any] = {}
    tuned: dict[str, Any] = {}
    for name, kind in KINDS.items():
        if why_not := _why_not(name, kind, wanted.precision):
            tried[name] = {"kept": False, "why_not": f"not tried: {why_not}"}
            continue
        path = payload / FILES[name]
        try:
            verdict, facts, rates = _attempt(name, kind, payload, manifest, held, samples, wanted)
            if not verdict.refusal:
                manifest = _with(name, kind, payload, manifest, verdict)
        except FledgeError as error:
            path.unlink(missing_ok=True)  # nothing that was not judged is shipped
            if wanted.precision == name:
                raise
            tried[name] = {"kept": False, "why_not": f"not tried: {error}"}
            log(f"{name} not tried: {error}")
            continue
        log(verdict.told(name))
        if verdict.refusal and wanted.precision == name:
            raise GateError(
                f"--precision {name} is refused: {verdict.refusal}; no bundle was written"
            )
        tried[name] = {**verdict.to_dict(), **facts}
        if verdict.refusal:
            path.unlink()
            del rates[name]
        tuned[kind.device] = benchmark.advice(rates)
    for device in {kind.device for kind in KINDS.values() if _usable(kind.device)} - set(tuned):
        alone = {"fp32": payload / FILES["fp32"]}
        rates = _rates(alone, payload, manifest, device)
        tuned[device] = benchmark.advice(rates)
    return replace(manifest, tried=tried, tuning=dict(sorted(tuned.items())))


@once
def _usable(device: str) -> bool:
    """Whether a graph runs on it here: a driver and a wheel that promise it are not enough."""
    if device == "cpu":
        return True
    if runtime.expected("auto") != runtime.PROVIDERS[device]:
        return False
    with TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(onnx.probe())
        try:
            runtime.OnnxRuntime(path, device=device)
        except FledgeError:
            return False
    return True


def _why_not(name: str, kind: PrecisionKind, wanted: str) -> str:
    if wanted not in ("auto", name):
        return f"--precision {wanted}"
    return "" if _usable(kind.device) else "no GPU here"


def _attempt(
    name: str,
    kind: PrecisionKind,
    payload: Path,
    manifest: Manifest,
    held: HeldOut,
    samples: Sequence[Sample],
    wanted: PrecisionRequest,
) -> tuple[Verdict, dict[str, Any], benchmark.Rates]:
    """Make a graph, score it, time it beside fp32, and remove it where it is refused."""
    source, path = payload / FILES["fp32"], payload / FILES[name]
    workers = cores()
    pixels = int8.draw(wanted.train, manifest.preprocess, workers)
    model, facts = kind.make(source, pixels, wanted.budget)
    onnx.save(
        model,
        path,
        name=manifest.name,
        labels=manifest.labels,
        preprocess=manifest.preprocess,
    )
    predictor = Predictor(manifest, runtime.OnnxRuntime(path, device=kind.device))
    mine = predict_views(predictor, samples, workers, views=1)
    rates = _rates({"fp32": source, name: path}, payload, manifest, kind.device)
    best = {graph: by[benchmark.fastest(by)] for graph, by in rates.items()}
    facts |= _thresholds_hold(manifest, mine)
    verdict = judge(
        held.logits[:, 0].argmax(axis=1).tolist(),
        mine.logits[:, 0].argmax(axis=1).tolist(),
        held.labels.tolist(),
        faster=best[name] / best["fp32"],
        budget=wanted.budget,
    )
    broken = int((~np.isfinite(mine.logits).all(axis=(1, 2))).sum())
    return replace(verdict, broken=broken), facts, rates


def _rates(
    graphs: dict[str, Path], payload: Path, manifest: Manifest, device: str
) -> benchmark.Rates:
    photos = [(payload / str(item["file"])).read_bytes() for item in manifest.golden]
    return benchmark.measure(graphs, manifest.preprocess, photos, device)


def _thresholds_hold(manifest: Manifest, mine: HeldOut) -> dict[str, Any]:
    """What the thresholds, fitted on fp32, give with this graph on the same photos."""
    plain = mine.logits[:, 0]
    energy, confident = (manifest.thresholds[name] for name in ("energy", "confident"))
    facts: dict[str, Any] = {}
    if energy is not None:
        facts["within_energy"] = float((energies(plain) <= energy).mean())
    if confident is not None:
        probabilities = softmax(plain, manifest.temperature)
        sure = probabilities.max(axis=1) >= confident
        right = probabilities.argmax(axis=1) == mine.labels
        facts["confident_coverage"] = float(sure.mean())
        facts["confident_precision"] = float(right[sure].mean()) if sure.any() else None
    return facts


def _with(
    name: str, kind: PrecisionKind, payload: Path, manifest: Manifest, verdict: Verdict
) -> Manifest:
    """The manifest with the precision and what golden photos give in it, which is its own truth."""
    engine = runtime.OnnxRuntime(payload / FILES[name], device=kind.device)
    predictor = Predictor(manifest, engine, name)
    golden = []
    for item in manifest.golden:
        prepared = predictor.prepare((payload / str(item["file"])).read_bytes())
        answer = predictor.predict([prepared])[0].probabilities
        golden.append({**item, "probabilities": {**item["probabilities"], name: answer.tolist()}})
    entry = {"file": FILES[name], "accuracy": verdict.accuracy, "tolerance": kind.tolerance}
    precisions = {**manifest.precisions, name: entry}
    return replace(manifest, precisions=precisions, golden=tuple(golden))
