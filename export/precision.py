"""Which precisions a bundle keeps: tried, scored on held-out photos, and kept or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from onnx import ModelProto

from export import half, onnx, quantize, tuning
from export.confidence import Held, ask
from export.verify import Sample
from serving import runtime
from serving.errors import GateError, OptionError, WorkError
from serving.manifest import Manifest
from serving.predictor import Predictor
from serving.preprocess import Pixels
from serving.settings import cores

FILES: Final = {"fp32": "model.onnx", "int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}

BUDGET: Final = 0.5
"""Points of accuracy that a faster precision may cost."""


class Kind(NamedTuple):
    """A precision beside fp32.

    device: what it is for, and is judged on. tolerance: of a golden probability.
    make: the fp32 graph, training photos, points of accuracy -> a graph, and facts about it.
    """

    device: str
    tolerance: float
    make: Callable[[Path, Pixels, float], tuple[ModelProto, dict[str, Any]]]


def _int8(source: Path, pixels: Pixels, budget: float) -> tuple[ModelProto, dict[str, Any]]:
    found = quantize.search(source, pixels, 1 - budget / 100)
    return found.model, found.to_dict()


KINDS: Final = {
    # GPUs differ in the order in which they add up.
    "fp16": Kind("cuda", 0.01, lambda source, pixels, _: half.convert(source, pixels)),
    # Processors without VNNI add up in other ways.
    "int8": Kind("cpu", 0.05, _int8),
}
CHOICES: Final = ("auto", "fp32", "int8", "fp16")


@dataclass(frozen=True)
class Verdict:
    """What became of a precision that was tried.

    accuracy, of_fp32: fractions of 1 on the same photos. fell: points; interval: its 95 %.
    faster: photos a second as a multiple of fp32's, each in its best setting.
    """

    photos: int
    accuracy: float
    of_fp32: float
    fell: float
    interval: tuple[float, float]
    faster: float
    budget: float

    @property
    def refusal(self) -> str | None:
        """Why it is not kept; None where it is."""
        if self.fell > self.budget:
            return f"accuracy falls by {self.fell:.2f} points, and the budget is {self.budget:g}"
        if self.faster <= 1:
            return f"it is no faster here: {self.faster:.2f} times fp32"
        return None

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it under `tried`; without the timing, which decides no answer."""
        return {
            "kept": self.refusal is None,
            "why_not": self.refusal,
            "photos": self.photos,
            "accuracy": self.accuracy,
            "accuracy_fp32": self.of_fp32,
            "fell_points": round(self.fell, 3),
            "fell_interval": [round(end, 3) for end in self.interval],
            "budget_points": self.budget,
            "times_fp32": float(f"{self.faster:.3g}"),
        }

    def told(self, name: str) -> str:
        """In a line, for a person."""
        low, high = self.interval
        kept = f"refused: {self.refusal}" if self.refusal else "kept"
        return (
            f"{name} {kept}; on {self.photos} held-out photos {self.accuracy:.2%}, fp32 "
            f"{self.of_fp32:.2%} (falls by {self.fell:.2f} points, {low:.2f} to {high:.2f}), "
            f"{self.faster:.2f} times as fast"
        )


def judge(
    fp32: Sequence[int],
    other: Sequence[int],
    labels: Sequence[int],
    *,
    faster: float,
    budget: float = BUDGET,
) -> Verdict:
    """Compare best classes of the same photos.

    Args:
        fp32, other: Best class of each photo, by each graph.
        labels: Of each photo; at least one.
        faster: As in `Verdict`.
        budget: Points that may be lost.
    """
    truth = np.asarray(labels)
    was, now = np.asarray(fp32) == truth, np.asarray(other) == truth
    lost, won = int((was & ~now).sum()), int((now & ~was).sum())
    return Verdict(
        photos=len(truth),
        accuracy=float(now.mean()),
        of_fp32=float(was.mean()),
        fell=100 * (lost - won) / len(truth),
        interval=_paired_interval(lost, won, len(truth)),
        faster=faster,
        budget=budget,
    )


@dataclass(frozen=True)
class Wanted:
    """What was asked for: one of `CHOICES`, points of accuracy, training photos to calibrate on."""

    precision: str
    budget: float
    train: Sequence[Sample]


def check(precision: str) -> None:
    """Refuse what can't be tried here, before the work.

    Raises:
        OptionError: fp16 without a GPU.
    """
    if precision in KINDS and not _usable(KINDS[precision].device):
        raise OptionError(f"--precision {precision}: no usable GPU here to try it on; use auto")


def keep(
    payload: Path,
    manifest: Manifest,
    held: Held,
    samples: Sequence[Sample],
    wanted: Wanted,
    say: Callable[[str], None],
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
        try:
            verdict, facts, rates = _attempt(name, kind, payload, manifest, held, samples, wanted)
        except (WorkError, OptionError) as error:
            if wanted.precision == name:
                raise
            tried[name] = {"kept": False, "why_not": f"not tried: {error}"}
            say(f"{name} not tried: {error}")
            continue
        say(verdict.told(name))
        if verdict.refusal and wanted.precision == name:
            raise GateError(
                f"--precision {name} is refused: {verdict.refusal}; no bundle was written"
            )
        tried[name] = {**verdict.to_dict(), **facts}
        if verdict.refusal:
            del rates[name]
        else:
            manifest = _with(name, kind, payload, manifest, verdict)
        tuned[kind.device] = tuning.advice(rates)
    for device in {kind.device for kind in KINDS.values() if _usable(kind.device)} - set(tuned):
        alone = {"fp32": payload / FILES["fp32"]}
        rates = tuning.measure(alone, manifest.preprocess.size, device)
        tuned[device] = tuning.advice(rates)
    return replace(manifest, tried=tried, tuning=dict(sorted(tuned.items())))


def _usable(device: str) -> bool:
    return device == "cpu" or runtime.expected("auto") == runtime.PROVIDERS[device]


def _why_not(name: str, kind: Kind, wanted: str) -> str:
    if wanted not in ("auto", name):
        return f"--precision {wanted}"
    return "" if _usable(kind.device) else "no GPU here"


def _attempt(
    name: str,
    kind: Kind,
    payload: Path,
    manifest: Manifest,
    held: Held,
    samples: Sequence[Sample],
    wanted: Wanted,
) -> tuple[Verdict, dict[str, Any], tuning.Rates]:
    """Make a graph, score it, time it beside fp32, and remove it where it is refused."""
    source, path = payload / FILES["fp32"], payload / FILES[name]
    workers = cores()
    pixels = quantize.draw(wanted.train, manifest.preprocess, workers)
    model, facts = kind.make(source, pixels, wanted.budget)
    onnx.save(
        model,
        path,
        name=manifest.name,
        labels=manifest.labels,
        preprocess=manifest.preprocess,
    )
    predictor = Predictor(manifest, runtime.OnnxRuntime(path, device=kind.device))
    mine = ask(predictor, samples, workers, views=1)
    rates = tuning.measure({"fp32": source, name: path}, manifest.preprocess.size, kind.device)
    best = {graph: max(by.values()) for graph, by in rates.items()}
    verdict = judge(
        held.logits[:, 0].argmax(axis=1).tolist(),
        mine.logits[:, 0].argmax(axis=1).tolist(),
        held.labels.tolist(),
        faster=best[name] / best["fp32"],
        budget=wanted.budget,
    )
    if verdict.refusal:
        path.unlink()
    return verdict, facts, rates


def _with(name: str, kind: Kind, payload: Path, manifest: Manifest, verdict: Verdict) -> Manifest:
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


def _paired_interval(lost: int, won: int, photos: int) -> tuple[float, float]:
    """95 % interval of the fall in points, photos being paired.

    Agresti & Min, 2005, "Simple improved confidence intervals for comparing matched proportions":
    half a photo is added to each cell, so that it has a width where nothing changed.
    """
    count = photos + 2
    middle = (lost - won) / count
    variance = (lost + won + 1 - (lost - won) ** 2 / count) / count**2
    half = 1.959964 * math.sqrt(variance)
    return 100 * (middle - half), 100 * (middle + half)
