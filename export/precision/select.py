"""Choose precisions: convert to int8 and fp16, compare with fp32, and keep the acceptable ones.

A precision is kept if it is certain enough that it loses at most the accepted amount of accuracy,
and if it is faster than fp32. Where even equal answers to all photos could not show that, it is not
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np
from onnx import ModelProto

from export import benchmark
from export.calibration import HeldOut, predict_views
from export.parity import Sample
from export.precision import fp16, int8, loss_bounds
from export.precision.evidence import Answers, can_weight, evidence
from export.precision.verdict import Verdict, compare_with_fp32, decide, remedy
from export.writers import onnx
from serving.bundle.manifest import Manifest
from serving.errors import FledgeError, GateError, OptionError
from serving.imaging.preprocess import Pixels
from serving.imaging.tta import energies, softmax
from serving.inference import runtime
from serving.inference.predictor import Predictor
from serving.utils.cpu import cores

FILES: Final = {"fp32": "model.onnx", "int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}

MAX_PHOTOS: Final = 2000
"""Largest number of photos on which a precision is compared with fp32."""


class PrecisionKind(NamedTuple):
    """A precision other than fp32.

    Attributes:
        device: The device on which graphs of this precision are served and compared with fp32.
        tolerance: Largest accepted difference of a probability of a golden image (a photo that is
            stored in the bundle with its expected probabilities).
        convert: Function of the fp32 graph's path, training photos and the accuracy budget in
            percentage points.
    """

    device: str
    tolerance: float
    convert: Callable[[Path, Pixels, float], Converted]


class Converted(NamedTuple):
    """A converted graph.

    Attributes:
        model: The graph.
        facts: A dict for the manifest.
        again: Converts the graph of another fold in the same way; function of the fp32 graph's path
            and of training photos of that fold.
    """

    model: ModelProto
    facts: dict[str, Any]
    again: Callable[[Path, Pixels], ModelProto]


class FoldGraph(NamedTuple):
    """The network of another fold of the same data set.

    Attributes:
        path: File of its fp32 graph.
        train: Its training photos, for calibration.
        held_out: Its held-out photos.
    """

    path: Path
    train: Sequence[Sample]
    held_out: Sequence[Sample]


def _int8(source: Path, pixels: Pixels, budget: float) -> Converted:
    result = int8.search(source, pixels, 1 - budget / 100)
    return Converted(result.model, result.to_dict(), partial(int8.quantise, config=result.config))


def _fp16(source: Path, pixels: Pixels, budget: float) -> Converted:
    return Converted(*fp16.convert(source, pixels), lambda *fold: fp16.convert(*fold)[0])


KINDS: Final = {
    # Tolerance: GPUs add in different orders.
    "fp16": PrecisionKind("cuda", 0.01, _fp16),
    # Tolerance: CPUs round differently, so a value near the boundary of a step may become the next
    # integer.
    "int8": PrecisionKind("cpu", 0.05, _int8),
}


@dataclass(frozen=True)
class PrecisionRequest:
    """The precisions to try.

    Attributes:
        precision: "fp32": no other precision is tried. "int8" or "fp16": this one is tried.
            "auto": both are tried.
        budget: Percentage points of accuracy that a precision may lose.
        train: Photos for calibration.
        trained: Whether the network was trained on `train`. If not, those that calibration and
            search don't use are held-out photos.
        held_out: Further held-out photos, besides those of the parity gate.
        folds: Networks of the other folds.
    """

    precision: str
    budget: float
    train: Sequence[Sample]
    trained: bool = True
    held_out: Sequence[Sample] = ()
    folds: Sequence[FoldGraph] = ()

    def more_held_out(self, count: int) -> list[Sample]:
        """Return the held-out photos that are compared besides the first `count`."""
        unused = [] if self.trained else self._unused()
        return [*self.held_out, *unused][: max(0, MAX_PHOTOS - count)]

    def training(self, count: int) -> list[Sample]:
        """Return training photos that can be compared besides `count` held-out ones."""
        if not self.trained or not can_weight(count):
            return []
        return self._unused()[: max(0, MAX_PHOTOS - count)]

    def _unused(self) -> list[Sample]:
        labels = dict(self.train)
        return [(path, labels[path]) for path in int8.order(self.train)[int8.DRAWN :]]


def check_request(precision: str, budget: float) -> None:
    """Check the options about precisions before the export starts.

    Raises:
        OptionError: fp16 was requested and there is no GPU, or the budget is not from 0 to 100.
    """
    if not 0 <= budget <= 100:
        raise OptionError(f"--accuracy-budget {budget:g}: use points of accuracy, 0 to 100")
    if precision in KINDS and not _usable(KINDS[precision].device):
        raise OptionError(f"--precision {precision}: no usable GPU here to try it on; use auto")


def select_precisions(
    payload: Path,
    manifest: Manifest,
    held_out: HeldOut,
    samples: Sequence[Sample],
    request: PrecisionRequest,
    log: Callable[[str], None],
) -> Manifest:
    """Try the requested precisions, and return the manifest with the results.

    The results of all tried precisions are in the manifest, including those that are not kept.

    Args:
        payload: Folder with the fp32 graph; the graphs that are kept are written to it.
        manifest: Manifest of the bundle with the fp32 graph.
        held_out: Outputs of the fp32 graph for `samples`.
        samples: Held-out photos.
        request: The precisions to try.
        log: Function that is called with one line per precision that is tried.

    Raises:
        GateError: A precision that was requested by name is refused.
        WorkError, OptionError: A precision that was requested by name can't be tried.
    """
    tried: dict[str, Any] = {}
    tuning: dict[str, Any] = {}
    for name, kind in KINDS.items():
        if reason := _skip_reason(name, kind, request.precision):
            tried[name] = {"kept": False, "why_not": f"not tried: {reason}"}
            continue
        if reason := _too_few(name, len(held_out.labels), request):
            tried[name] = {"kept": False, "why_not": f"not tried: {reason}", "sure": False}
            log(f"{name} not tried, fp32 is served: {reason}")
            continue
        path = payload / FILES[name]
        try:
            verdict, facts, rates, accuracy = _try(
                name, kind, payload, manifest, held_out, samples, request
            )
            if verdict.kept:
                manifest = _add_precision(name, kind, payload, manifest, accuracy)
        except FledgeError as error:
            path.unlink(missing_ok=True)  # a graph that was not compared must not be in the bundle
            if request.precision == name:
                raise
            tried[name] = {"kept": False, "why_not": f"not tried: {error}"}
            log(f"{name} not tried: {error}")
            continue
        log(verdict.summary(name, has_run=request.trained))
        if not verdict.kept and request.precision == name:
            raise GateError(
                f"--precision {name} is refused: {verdict.refusal_reason}; no bundle was written"
            )
        tried[name] = {**verdict.to_dict(), **facts}
        if not verdict.kept:
            path.unlink()
            del rates[name]
        tuning[kind.device] = benchmark.advice(rates)
    for device in {kind.device for kind in KINDS.values() if _usable(kind.device)} - set(tuning):
        rates = _rates({"fp32": payload / FILES["fp32"]}, payload, manifest, device)
        tuning[device] = benchmark.advice(rates)
    return manifest.model_copy(update={"tried": tried, "tuning": dict(sorted(tuning.items()))})


@cache
def _usable(device: str) -> bool:
    """Check whether this machine can run a graph on the device.

    A minimal graph is loaded, because a GPU driver and a GPU build of ONNX Runtime may be installed
    and still not work together.
    """
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


def _skip_reason(name: str, kind: PrecisionKind, requested: str) -> str:
    """Return why a precision is not tried, or "" if it is tried."""
    if requested not in ("auto", name):
        return f"--precision {requested}"
    return "" if _usable(kind.device) else "no GPU here"


def _too_few(name: str, photos: int, request: PrecisionRequest) -> str:
    """Return why no answers to the photos could show that a precision is accurate enough, or ""."""
    photos += len(request.more_held_out(photos))
    photos += sum(len(fold.held_out) for fold in request.folds)
    photos += len(request.training(photos))
    if request.precision == name or 100 * loss_bounds.least_budget(photos) <= request.budget:
        return ""
    helps = remedy(name, request.budget, photos, has_run=request.trained)
    return f"too few photos to judge accuracy: {helps}"


def _try(
    name: str,
    kind: PrecisionKind,
    payload: Path,
    manifest: Manifest,
    held_out: HeldOut,
    samples: Sequence[Sample],
    request: PrecisionRequest,
) -> tuple[Verdict, dict[str, Any], benchmark.Rates, float]:
    """Write the graph of a precision, and compare its accuracy and speed with fp32.

    Returns:
        The verdict, facts and speeds for the manifest, and the accuracy on `samples`.
    """
    source, path = payload / FILES["fp32"], payload / FILES[name]
    workers = cores()
    pixels = int8.draw(request.train, manifest.preprocess, workers)
    converted = kind.convert(source, pixels, request.budget)
    facts = converted.facts

    def save(model: ModelProto, path: Path) -> None:
        labels, preprocess = manifest.labels, manifest.preprocess
        onnx.save(model, path, name=manifest.name, labels=labels, preprocess=preprocess)

    save(converted.model, path)
    predictor = Predictor(manifest, runtime.OnnxRuntime(path, device=kind.device))
    outputs = predict_views(predictor, samples, workers, views=1)
    rates = _rates({"fp32": source, name: path}, payload, manifest, kind.device)
    best = {graph: by_setting[benchmark.fastest(by_setting)] for graph, by_setting in rates.items()}
    facts |= _threshold_facts(manifest, outputs)
    accuracy = float((outputs.logits[:, 0].argmax(axis=1) == outputs.labels).mean())
    reference = Predictor(manifest, runtime.OnnxRuntime(source, device="cpu"))

    def both(
        more: Sequence[Sample], graphs: Sequence[Predictor] = (reference, predictor)
    ) -> tuple[HeldOut, HeldOut]:
        one, other = (predict_views(graph, more, workers, views=1) for graph in graphs)
        return one, other

    pairs = [(held_out, outputs), both(request.more_held_out(len(held_out.labels)))]
    for fold in request.folds:
        target = fold.path.with_suffix(f".{name}.onnx")
        save(
            converted.again(fold.path, int8.draw(fold.train, manifest.preprocess, workers)), target
        )
        engines = (
            runtime.OnnxRuntime(fold.path, device="cpu"),
            runtime.OnnxRuntime(target, device=kind.device),
        )
        pairs.append(both(fold.held_out, [Predictor(manifest, engine) for engine in engines]))
    first, second = (np.concatenate([pair[i].logits[:, 0] for pair in pairs]) for i in (0, 1))
    labels = np.concatenate([pair[0].labels for pair in pairs])
    answers = Answers.of(first, second, labels)
    folds = sum(len(pair[0].labels) for pair in pairs[2:])

    def judge(training: Answers | None) -> Verdict:
        return compare_with_fp32(
            first.argmax(axis=1).tolist(),
            second.argmax(axis=1).tolist(),
            labels.tolist(),
            speedup=best[name] / best["fp32"],
            budget=request.budget,
            evidence=evidence(answers, training, folds),
            insisted=request.precision == name,
        )

    logits = [second]

    def training() -> Answers | None:
        photos = request.training(len(labels))
        if not photos:
            return None
        one, other = (outputs.logits[:, 0] for outputs in both(photos))
        logits.append(other)
        return Answers.of(one, other, None)

    verdict = decide(judge, training)
    not_finite = int((~np.isfinite(np.concatenate(logits)).all(axis=1)).sum())
    return replace(verdict, not_finite=not_finite), facts, rates, accuracy


def _rates(
    graphs: dict[str, Path], payload: Path, manifest: Manifest, device: str
) -> benchmark.Rates:
    photos = [(payload / str(item["file"])).read_bytes() for item in manifest.golden]
    return benchmark.measure(graphs, manifest.preprocess, photos, device)


def _threshold_facts(manifest: Manifest, outputs: HeldOut) -> dict[str, Any]:
    """Return a graph's coverage and precision at the thresholds that were fitted on fp32."""
    plain = outputs.logits[:, 0]
    energy, confident = (manifest.thresholds[name] for name in ("energy", "confident"))
    facts: dict[str, Any] = {}
    if energy is not None:
        facts["within_energy"] = float((energies(plain) <= energy).mean())
    if confident is not None:
        probabilities = softmax(plain, manifest.temperature)
        is_confident = probabilities.max(axis=1) >= confident
        right = (probabilities.argmax(axis=1) == outputs.labels)[is_confident]
        facts["confident_coverage"] = float(is_confident.mean())
        facts["confident_precision"] = float(right.mean()) if len(right) else None
    return facts


def _add_precision(
    name: str, kind: PrecisionKind, payload: Path, manifest: Manifest, accuracy: float
) -> Manifest:
    """Return a copy of the manifest with a precision and its probabilities for the golden images.

    Golden images are photos that are stored in the bundle with their expected probabilities.
    """
    engine = runtime.OnnxRuntime(payload / FILES[name], device=kind.device)
    predictor = Predictor(manifest, engine, name)
    golden = []
    for item in manifest.golden:
        prepared = predictor.prepare((payload / str(item["file"])).read_bytes())
        answer = predictor.predict([prepared])[0].probabilities
        golden.append({**item, "probabilities": {**item["probabilities"], name: answer.tolist()}})
    entry = {"file": FILES[name], "accuracy": accuracy, "tolerance": kind.tolerance}
    precisions = {**manifest.precisions, name: entry}
    return manifest.model_copy(update={"precisions": precisions, "golden": tuple(golden)})
