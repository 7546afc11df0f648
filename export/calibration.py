"""What a probability is worth: temperature, when to abstain, strangers, and whether views help.

All of it is fitted or counted on held-out photos, from their encoded bytes, through the graph that
is shipped. They chose the best epoch, too, so what is measured on them flatters a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import binomtest

from export.parity import Sample
from serving.bundle.manifest import Manifest
from serving.errors import ImageError, OptionError
from serving.imaging.tta import average, energies, softmax
from serving.inference.predictor import Predictor
from serving.utils.progress import progress_bar
from training.evaluation import metrics
from training.evaluation.metrics import Labels, Probabilities

FAMILIAR: Final = 0.95
"""Share of held-out photos whose energy is within the threshold."""

_LOWEST, _HIGHEST = 0.05, 20.0
_PARTS: Final = 5


class HeldOut(NamedTuple):
    """What the graph says of held-out photos: logits float32 [N, V, C], labels int64 [N].

    The first of the V views is the plain one.
    """

    logits: npt.NDArray[np.float32]
    labels: Labels


@dataclass(frozen=True)
class ConfidenceTarget:
    """What "confident" shall mean: answers of at least this precision, or this share of answers."""

    kind: Literal["precision", "coverage"]
    share: float

    @classmethod
    def parse(cls, text: str) -> ConfidenceTarget:
        """Read `precision=0.99` or `coverage=0.9`.

        Raises:
            OptionError: Something else.
        """
        kind, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if kind not in ("precision", "coverage") or not 0 < share <= 1:
            raise OptionError(f"--confident {text}: use precision=0.99 or coverage=0.9, say")
        return cls("precision" if kind == "precision" else "coverage", share)


def predict_views(
    predictor: Predictor, samples: Sequence[Sample], workers: int = 1, views: int | None = None
) -> HeldOut:
    """Run the first views of held-out photos, all by default; broken photos are left out."""
    most = len(predictor.manifest.views) if views is None else views

    def one(sample: Sample) -> npt.NDArray[np.float32] | None:
        try:
            pixels = predictor.prepare(sample[0].read_bytes(), most).pixels
        except (ImageError, OSError):
            return None
        # One by one: other batches round differently, and a lone request is what the service sees.
        return np.concatenate([predictor.runtime.run(pixels[i : i + 1])[0] for i in range(most)])

    logits, labels = [], []
    with ThreadPoolExecutor(workers) as pool, progress_bar() as bar:
        task = bar.add_task("views of held-out photos", total=len(samples))
        for sample, found in zip(samples, pool.map(one, samples), strict=True):
            bar.advance(task)
            if found is not None:
                logits.append(found)
                labels.append(sample[1])
    shape = (0, most, len(predictor.manifest.labels))
    stacked = np.stack(logits) if logits else np.empty(shape, np.float32)
    return HeldOut(stacked, np.array(labels, np.int64))


def calibrated(
    manifest: Manifest,
    held: HeldOut,
    wanted: ConfidenceTarget | None,
    log: Callable[[str], None],
) -> Manifest:
    """With the temperature, thresholds and advice that held-out photos give."""
    if not len(held.labels):  # the gate will say so
        return manifest
    temperature = fit_temperature(held.logits[:, 0], held.labels)
    report = calibration(held, temperature)
    log(
        f"calibrated on {report['photos']} held-out photos: temperature {temperature:g}, expected "
        f"calibration error {report['before']['ece']:.1%} -> {report['after']['ece']:.1%}"
    )
    if wanted is not None:
        report["confident"] = found = confident(held, temperature, wanted)
        low, high = found["precision_interval"]
        log(
            f"confident from probability {found['threshold']:g} on: {found['coverage']:.1%} of "
            f"answers, {found['precision']:.1%} of them right ({low:.1%} to {high:.1%})"
        )
    advice = tta_advice(held, temperature, manifest.average)
    log(f"views: {told(advice)}")
    return replace(
        manifest,
        temperature=temperature,
        thresholds={
            "confident": report["confident"]["threshold"] if wanted else None,
            "energy": energy_threshold(held),
        },
        calibration=report,
        tta=advice,
    )


def fit_temperature(logits: npt.NDArray[np.float32], labels: Labels) -> float:
    """The temperature whose probabilities lose least (Guo et al., 2017, "On Calibration").

    Labels count as 1 - 1 / (N + 2), the rest spread over the other classes, after Platt (1999,
    "Probabilistic outputs for support vector machines", 2.2): where all N photos are right, the
    bare loss would have the model infinitely sure.

    Args:
        logits: [N, C], N at least 1.
        labels: [N].

    Returns:
        Between 0.05 and 20, of three significant digits.
    """
    count, classes = logits.shape
    if classes < 2:
        return 1.0
    rest = 1 / (count + 2) / (classes - 1)
    targets = np.full((count, classes), rest)
    targets[np.arange(count), labels] = 1 - 1 / (count + 2)
    logits64 = logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        scaled = logits64 / math.exp(log_temperature)
        return float((targets * (logsumexp(scaled, axis=1, keepdims=True) - scaled)).sum() / count)

    bounds = (math.log(_LOWEST), math.log(_HIGHEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(f"{math.exp(found.x):.3g}")


def calibration(held: HeldOut, temperature: float) -> dict[str, Any]:
    """ECE and log loss of the plain view before and after, as the manifest has them.

    "After" is not measured on what was fitted: each fifth of the photos gets the temperature that
    the other four give.
    """
    plain, labels = held.logits[:, 0], held.labels
    crossed = softmax(plain, temperature)
    parts = np.arange(len(labels)) % _PARTS
    for part in range(_PARTS if len(labels) >= 2 * _PARTS else 0):
        inside = parts == part
        crossed[inside] = softmax(plain[inside], fit_temperature(plain[~inside], labels[~inside]))
    return {
        "photos": len(labels),
        "temperature": temperature,
        "before": _worth(softmax(plain), labels),
        "after": _worth(crossed, labels),
    }


def confident(held: HeldOut, temperature: float, wanted: ConfidenceTarget) -> dict[str, Any]:
    """The least probability of a confident answer, and what it gives on the held-out photos.

    Raises:
        OptionError: No threshold gives the precision.
    """
    probabilities = softmax(held.logits[:, 0], temperature)
    sure = probabilities.max(axis=1)
    order = np.argsort(-sure, kind="stable")
    right = (probabilities.argmax(axis=1) == held.labels)[order].cumsum()
    ranked, kept = sure[order], np.arange(1, len(order) + 1)
    last = np.append(ranked[1:] < ranked[:-1], True)  # equals stand or fall together
    if wanted.kind == "coverage":
        good = last & (kept >= wanted.share * len(order))
    else:
        good = last & (right >= wanted.share * kept)
    if not good.any():
        best = float((right / kept)[last].max())
        raise OptionError(
            f"--confident precision={wanted.share:g}: whatever the threshold, at most {best:.1%} "
            f"of the confident answers to {len(order)} held-out photos are right; ask for less"
        )
    index = int(np.flatnonzero(good)[0 if wanted.kind == "coverage" else -1])
    count, hits = index + 1, int(right[index])
    # Rounded down: the photo that it comes from shall be confident on other machines, too.
    threshold = math.floor(float(ranked[index]) * 1e4) / 1e4
    low, high = metrics.interval(hits, count)
    return {
        "asked": f"{wanted.kind}={wanted.share:g}",
        "threshold": threshold,
        "coverage": count / len(order),
        "precision": hits / count,
        "precision_interval": [low, high],
    }


def energy_threshold(held: HeldOut) -> float:
    """The energy that 95 % of the held-out photos stay within; beyond it may be a stranger."""
    return float(f"{np.quantile(energies(held.logits[:, 0]), FAMILIAR):.4g}")


def tta_advice(held: HeldOut, temperature: float, how: str = "mean") -> dict[str, Any]:
    """What averaging the first N views would give, for every N; the default stays plain.

    Returns:
        {"photos", "advised", "plain": {...}, "views": [{"views", "accuracy", "loss", "ece",
        "fixed", "broken", "p"}]}. fixed, broken: photos that become right, or wrong. p: of the two
        counts differing so by chance (exact, two-sided: McNemar, 1947). advised: the fewest views
        with the most right answers, 0 where none has more than the plain view; as many times the
        work.
    """
    by_view = softmax(held.logits, temperature)
    plain, labels = by_view[:, 0], held.labels
    was_right = plain.argmax(axis=1) == labels
    rows = []
    for views in range(2, by_view.shape[1] + 1):
        averaged = np.stack([average(rows_[:views], how) for rows_ in by_view])
        is_right = averaged.argmax(axis=1) == labels
        fixed, broken = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
        p = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
        rows.append(
            {
                "views": views,
                **_worth(averaged, labels),
                "fixed": fixed,
                "broken": broken,
                "p": float(f"{p:.3g}"),
            }
        )
    best = max(rows, key=lambda row: row["fixed"] - row["broken"], default=None)
    gains = best is not None and best["fixed"] > best["broken"]
    return {
        "photos": len(labels),
        "advised": best["views"] if best and gains else 0,
        "plain": _worth(plain, labels),
        "views": rows,
    }


def told(advice: Mapping[str, Any]) -> str:
    """The advice in a line."""
    if not advice["advised"]:
        return f"no number of them gets more of {advice['photos']} held-out photos right"
    best = next(row for row in advice["views"] if row["views"] == advice["advised"])
    sure = "" if best["p"] < 0.05 else f", which may be chance (p = {best['p']:.2f})"
    return (
        f"averaging {best['views']} of them puts {best['fixed']} of {advice['photos']} held-out "
        f"photos right and {best['broken']} wrong{sure}, for {best['views']} times the work"
    )


def _worth(probabilities: Probabilities, labels: Labels) -> dict[str, float]:
    return {
        "accuracy": metrics.accuracy(probabilities, labels),
        "loss": metrics.log_loss(probabilities, labels),
        "ece": metrics.calibration(probabilities, labels).ece,
    }
