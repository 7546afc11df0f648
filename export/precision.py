"""Which precisions a bundle keeps: tried, scored on held-out photos, and kept or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from export import onnx, quantize, tuning
from export.confidence import Held, ask
from export.quantize import Found
from export.verify import Sample
from serving.errors import GateError, OptionError, WorkError
from serving.manifest import Manifest
from serving.predictor import Predictor
from serving.runtime import OnnxRuntime
from serving.settings import cores

FILES: Final = {"fp32": "model.onnx", "int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}

BUDGET: Final = 0.5
"""Points of accuracy that a faster precision may cost."""

INT8_TOLERANCE: Final = 0.05
"""Of a golden probability: processors without VNNI add up int8 in other ways."""

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


def keep(
    payload: Path,
    manifest: Manifest,
    held: Held,
    samples: Sequence[Sample],
    wanted: Wanted,
    say: Callable[[str], None],
) -> Manifest:
    """Try what is wanted beside fp32, and keep what is worth it; the manifest that says so.

    Raises:
        OptionError: fp16 without a GPU.
        GateError: The precision that was asked for by name is refused.
        WorkError: As `int8`.
    """
    if wanted.precision == "fp16":
        raise OptionError("--precision fp16: no usable GPU here to try it on; use auto or int8")
    tried: dict[str, Any] = {"fp16": {"kept": False, "why_not": "not tried: no GPU here"}}
    why_not = "not tried: --precision fp32" if wanted.precision == "fp32" else ""
    try:
        if not why_not:
            verdict, found, rates = int8(
                payload,
                wanted.train,
                manifest,
                held,
                samples,
                budget=wanted.budget,
                workers=cores(),
            )
    except WorkError as error:
        if wanted.precision == "int8":
            raise
        why_not = f"not tried: {error}"
        say(f"int8 {why_not}")
    if why_not:
        rates = tuning.measure({"fp32": payload / FILES["fp32"]}, manifest.preprocess.size)
        tried["int8"] = {"kept": False, "why_not": why_not}
        return replace(manifest, tried=tried, tuning={"cpu": tuning.advice(rates)})
    say(verdict.told("int8"))
    if verdict.refusal and wanted.precision == "int8":
        raise GateError(f"--precision int8 is refused: {verdict.refusal}; no bundle was written")
    tried["int8"] = {
        **verdict.to_dict(),
        "way": found.way.to_dict(),
        "ways": [way.to_dict() for way in found.tried],
    }
    if verdict.refusal:
        rates = {"fp32": rates["fp32"]}
    else:
        manifest = _with_int8(payload, manifest, verdict)
    return replace(manifest, tried=tried, tuning={"cpu": tuning.advice(rates)})


def _with_int8(payload: Path, manifest: Manifest, verdict: Verdict) -> Manifest:
    """The manifest with the precision and what golden photos give in it, which is its own truth."""
    engine = OnnxRuntime(payload / FILES["int8"], device="cpu")
    predictor = Predictor(manifest, engine, "int8")
    golden = []
    for item in manifest.golden:
        prepared = predictor.prepare((payload / str(item["file"])).read_bytes())
        answer = predictor.predict([prepared])[0].probabilities
        stated = {**item["probabilities"], "int8": answer.tolist()}
        golden.append({**item, "probabilities": stated})
    entry = {"file": FILES["int8"], "accuracy": verdict.accuracy, "tolerance": INT8_TOLERANCE}
    return replace(
        manifest, precisions={**manifest.precisions, "int8": entry}, golden=tuple(golden)
    )


def int8(
    payload: Path,
    train: Sequence[Sample],
    manifest: Manifest,
    held: Held,
    samples: Sequence[Sample],
    *,
    budget: float,
    workers: int,
) -> tuple[Verdict, Found, tuning.Rates]:
    """Quantise `payload`'s graph, score it, time it beside fp32, and remove it where refused.

    Args:
        payload: Holds the fp32 graph, and gets the other.
        train: Training photos, to calibrate and search on.
        manifest: Of the bundle so far.
        held: What the fp32 graph says of `samples`.
        samples: Held-out photos.
        budget: Points of accuracy.
        workers: Threads that score side by side.

    Raises:
        WorkError: The graph can't be quantised; too few training photos.
    """
    source, path = payload / FILES["fp32"], payload / FILES["int8"]
    pixels = quantize.draw(train, manifest.preprocess, workers)
    found = quantize.search(source, pixels, 1 - budget / 100)
    onnx.save(
        found.model,
        path,
        name=manifest.name,
        labels=manifest.labels,
        preprocess=manifest.preprocess,
    )
    mine = ask(Predictor(manifest, OnnxRuntime(path, device="cpu")), samples, workers, views=1)
    rates = tuning.measure({"fp32": source, "int8": path}, manifest.preprocess.size)
    best = {name: max(by.values()) for name, by in rates.items()}
    verdict = judge(
        held.logits[:, 0].argmax(axis=1).tolist(),
        mine.logits[:, 0].argmax(axis=1).tolist(),
        held.labels.tolist(),
        faster=best["int8"] / best["fp32"],
        budget=budget,
    )
    if verdict.refusal:
        path.unlink()
    return verdict, found, rates


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
