"""Calibrate confidence on held-out photos: temperature, thresholds, benefit of TTA.

TTA is test-time augmentation: probabilities are averaged over several views (crops or flips) of a
photo. All figures come from the exported graph, run on photos decoded as in the service. The same
photos were used to choose the best epoch, so the figures are slightly optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

IN_DISTRIBUTION_SHARE: Final = 0.95
"""Share of held-out photos whose energy is at most the threshold."""

_LOWEST, _HIGHEST = 0.05, 20.0  # temperature
_FOLDS: Final = 5
_MANY: Final = 100
"""Number of photos below which the calibration error is mostly chance: it has 10 bins."""


class HeldOut(NamedTuple):
    """Outputs of the graph for N held-out photos, with V TTA views (crops or flips) of each photo.

    Attributes:
        logits: Logits, float32 [N, V, classes]. The first view is the unaugmented photo.
        labels: True classes, int64 [N].
    """

    logits: npt.NDArray[np.float32]
    labels: Labels


@dataclass(frozen=True)
class ConfidenceTarget:
    """The precision or coverage that the confidence threshold must reach.

    Attributes:
        kind: "precision" or "coverage".
        share: For "precision", the share of the confident answers that must be right. For
            "coverage", the share of all answers that must be confident.
    """

    kind: Literal["precision", "coverage"]
    share: float

    @classmethod
    def parse(cls, text: str) -> ConfidenceTarget:
        """Parse an option value, `precision=SHARE` or `coverage=SHARE`.

        Raises:
            OptionError: The text has another form, or the share is not in (0, 1].
        """
        kind, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if kind not in ("precision", "coverage") or not 0 < share <= 1:
            raise OptionError(
                f"--confident {text}: use precision=0.99 or coverage=0.9, for example"
            )
        return cls("precision" if kind == "precision" else "coverage", share)


def predict_views(
    predictor: Predictor,
    samples: Sequence[Sample],
    workers: int = 1,
    views: int | None = None,
    title: str = "views of held-out photos",
) -> HeldOut:
    """Run the graph on the first `views` TTA views (crops or flips) of each photo; None: all views.

    Photos that can't be read are left out. `title` is shown with the progress.
    """
    count = len(predictor.manifest.views) if views is None else views

    def run(sample: Sample) -> npt.NDArray[np.float32] | None:
        try:
            pixels = predictor.prepare(sample[0].read_bytes(), count).pixels
        except (ImageError, OSError):
            return None
        # In batches of 1, as in a service with single requests, because other batch sizes round
        # differently.
        return np.concatenate([predictor.runtime.run(pixels[i : i + 1])[0] for i in range(count)])

    logits, labels = [], []
    with ThreadPoolExecutor(workers) as pool, progress_bar() as bar:
        task = bar.add_task(title, total=len(samples))
        for sample, of_views in zip(samples, pool.map(run, samples), strict=True):
            bar.advance(task)
            if of_views is not None:
                logits.append(of_views)
                labels.append(sample[1])
    shape = (0, count, len(predictor.manifest.labels))
    stacked = np.stack(logits) if logits else np.empty(shape, np.float32)
    return HeldOut(stacked, np.array(labels, np.int64))


def calibrate(
    manifest: Manifest,
    held_out: HeldOut,
    target: ConfidenceTarget | None,
    log: Callable[[str], None],
) -> Manifest:
    """Return a copy of the manifest with temperature, thresholds and TTA advice.

    These values are computed from the graph's outputs for held-out photos. Without photos, the
    manifest is returned unchanged. If `target` is None, no confidence threshold is set.
    """
    if not len(held_out.labels):  # the parity gate raises the error
        return manifest
    temperature = fit_temperature(held_out.logits[:, 0], held_out.labels)
    report = calibration_report(held_out, temperature)
    before, after = report["before"]["ece"], report["after"]["ece"]
    few = "; on so few photos a rise is mostly chance" if report["photos"] < _MANY else ""
    log(
        f"calibrated on {report['photos']} held-out photos: temperature {temperature:g}, expected "
        f"calibration error {before:.1%} -> {after:.1%}{few if after > before else ''}"
    )
    if target is not None:
        report["confident"] = chosen = confidence_threshold(held_out, temperature, target)
        low, high = chosen["precision_interval"]
        log(
            f"confident from probability {chosen['threshold']:g} on: {chosen['coverage']:.1%} of "
            f"answers, {chosen['precision']:.1%} of them right ({low:.1%} to {high:.1%})"
        )
    advice = tta_advice(held_out, temperature, manifest.average)
    log(f"views: {tta_summary(advice)}")
    return manifest.model_copy(
        update={
            "temperature": temperature,
            "thresholds": {
                "confident": report["confident"]["threshold"] if target else None,
                "energy": energy_threshold(held_out),
            },
            "calibration": report,
            "tta": advice,
        }
    )


def fit_temperature(logits: npt.NDArray[np.float32], labels: Labels) -> float:
    """Return the temperature with the lowest log loss (Guo et al., 2017, "On Calibration").

    The target probability of the true class is 1 - 1 / (N + 2), and the rest is divided among the
    other classes, as in Platt (1999, "Probabilistic outputs for support vector machines", 2.2).
    With a target of 1, the best temperature would be 0 if all N photos were classified correctly.

    Args:
        logits: Logits [N, classes], with N at least 1.
        labels: True classes [N].

    Returns:
        A temperature from 0.05 to 20, rounded to three significant digits.
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
    best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(f"{math.exp(best.x):.3g}")


def calibration_report(held_out: HeldOut, temperature: float) -> dict[str, Any]:
    """Return the manifest's `calibration` entry: metrics with and without the temperature.

    The metrics are accuracy, log loss and ECE (expected calibration error). Those under "before"
    are computed without a temperature. Those under "after" are cross-validated: for each fifth of
    the photos, the temperature is fitted on the other four fifths.
    """
    plain, labels = held_out.logits[:, 0], held_out.labels
    calibrated = softmax(plain, temperature)
    folds = np.arange(len(labels)) % _FOLDS
    for fold in range(_FOLDS if len(labels) >= 2 * _FOLDS else 0):
        inside = folds == fold
        fitted = fit_temperature(plain[~inside], labels[~inside])
        calibrated[inside] = softmax(plain[inside], fitted)
    return {
        "photos": len(labels),
        "temperature": temperature,
        "before": _metrics(softmax(plain), labels),
        "after": _metrics(calibrated, labels),
    }


def confidence_threshold(
    held_out: HeldOut, temperature: float, target: ConfidenceTarget
) -> dict[str, Any]:
    """Choose the probability from which an answer counts as confident.

    Returns:
        A dict with these keys:

            - asked: the target as text, such as "precision=0.99".
            - threshold: the lowest probability of a confident answer.
            - coverage: share of the held-out photos with a confident answer.
            - precision: share of these confident answers that are right.
            - precision_interval: confidence interval of `precision`, as [low, high].

    Raises:
        OptionError: No threshold reaches the requested precision.
    """
    probabilities = softmax(held_out.logits[:, 0], temperature)
    highest = probabilities.max(axis=1)
    order = np.argsort(-highest, kind="stable")
    right = (probabilities.argmax(axis=1) == held_out.labels)[order].cumsum()
    ranked, count = highest[order], np.arange(1, len(order) + 1)
    last = np.append(ranked[1:] < ranked[:-1], True)  # of a group of equal probabilities
    if target.kind == "coverage":
        reaches = last & (count >= target.share * len(order))
    else:
        reaches = last & (right >= target.share * count)
    if not reaches.any():
        best = float((right / count)[last].max())
        raise OptionError(
            f"--confident precision={target.share:g}: at any threshold at most {best:.1%} of the "
            f"confident answers to {len(order)} held-out photos are right; choose a lower precision"
        )
    index = int(np.flatnonzero(reaches)[0 if target.kind == "coverage" else -1])
    confident, hits = index + 1, int(right[index])
    # Rounded down, so that this photo is also confident on machines that round differently.
    threshold = math.floor(float(ranked[index]) * 1e4) / 1e4
    low, high = metrics.interval(hits, confident)
    return {
        "asked": f"{target.kind}={target.share:g}",
        "threshold": threshold,
        "coverage": confident / len(order),
        "precision": hits / confident,
        "precision_interval": [low, high],
    }


def energy_threshold(held_out: HeldOut) -> float:
    """Return the 95 % quantile of the held-out photos' energies.

    Energy is -log sum exp of the logits. An image with a higher energy often belongs to no class.
    """
    quantile = np.quantile(energies(held_out.logits[:, 0]), IN_DISTRIBUTION_SHARE)
    return float(f"{quantile:.4g}")


def tta_advice(held_out: HeldOut, temperature: float, how: str = "mean") -> dict[str, Any]:
    """Return the manifest's `tta` entry: how accurate the average of several views is.

    A view is a crop or flip of a photo. The average of the first N views is computed for every N
    from 2 on, and compared with the unaugmented view. It takes N times as long.

    Returns:
        A dict with these keys:

            - photos: number of held-out photos.
            - advised: the N with the most correct answers, the smallest one of several. 0 if no N
              has more correct answers than the unaugmented view.
            - plain: metrics of the unaugmented view.
            - views: a list with a dict for every N:
                - views: the number N.
                - accuracy, loss, ece: metrics of the average.
                - fixed: number of photos that only the average classifies correctly.
                - broken: number of photos that only the unaugmented view classifies correctly.
                - p: p-value of the exact two-sided McNemar test (1947) of `fixed` and `broken`.
    """
    by_view = softmax(held_out.logits, temperature)
    plain, labels = by_view[:, 0], held_out.labels
    was_right = plain.argmax(axis=1) == labels
    rows = []
    for views in range(2, by_view.shape[1] + 1):
        averaged = np.stack([average(photo[:views], how) for photo in by_view])
        is_right = averaged.argmax(axis=1) == labels
        fixed, broken = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
        p = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
        rows.append(
            {
                "views": views,
                **_metrics(averaged, labels),
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
        "plain": _metrics(plain, labels),
        "views": rows,
    }


def tta_summary(advice: Mapping[str, Any]) -> str:
    """Describe the result of `tta_advice` in one line."""
    if not advice["advised"]:
        return f"no number of them gets more of {advice['photos']} held-out photos right"
    best = next(row for row in advice["views"] if row["views"] == advice["advised"])
    chance = "" if best["p"] < 0.05 else f", which may be chance (p = {best['p']:.2f})"
    return (
        f"averaging {best['views']} of them puts {best['fixed']} of {advice['photos']} held-out "
        f"photos right and {best['broken']} wrong{chance}, for {best['views']} times the work"
    )


def _metrics(probabilities: Probabilities, labels: Labels) -> dict[str, float]:
    return {
        "accuracy": metrics.accuracy(probabilities, labels),
        "loss": metrics.log_loss(probabilities, labels),
        "ece": metrics.calibration(probabilities, labels).ece,
    }
