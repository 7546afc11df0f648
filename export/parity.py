"""The parity gate: exported graphs must give the checkpoint's probabilities on held-out photos.

The checkpoint and the graphs are run with the same decoder, preprocessing and softmax (from
`serving`). Only the network differs. This module does not import torch.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from serving.bundle.manifest import Manifest
from serving.errors import DataError, GateError, ImageError
from serving.imaging.decode import decode
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import Probabilities, softmax
from serving.inference.predictor import Predictor, Prepared
from serving.inference.runtime import Runtime
from serving.inputs.file_kinds import is_image
from serving.terminal import show

TOLERANCE: Final = 1e-4
"""Largest accepted difference of a probability, in fp32."""

BATCHES: Final = (1, 2, 7)
MAX_PHOTOS: Final = 500
WORST_SHOWN: Final = 5
"""Number of photos that are logged if the gate fails: those with the largest differences."""
GOLDEN_IMAGES: Final = 8
GOLDEN_BYTES: Final = 16_000_000
MAX_UNREADABLE_SHARE: Final = 0.05
_CHUNK: Final = 14  # photos in memory; a multiple of every batch size, so that all batches are full

Sample = tuple[Path, int]
"""A photo and the index of its class."""


@dataclass
class Agreement:
    """The differences between one graph's answers and the checkpoint's answers.

    Attributes:
        difference: Largest difference of a probability, over all photos and batch sizes; infinite
            if a probability is NaN.
        worst: Path of the photo with the largest difference.
        ties: Paths of the photos whose predicted class differs at any batch size, but for which
            the checkpoint gives the two classes nearly equal probabilities (within `TOLERANCE`).
        changed: Paths of the other photos whose predicted class differs at any batch size.
        right: Number of photos that the graph classifies correctly.
        differences: For each photo, the largest difference of a probability at any batch size.
    """

    difference: float = 0.0
    worst: Path | None = None
    changed: set[Path] = field(default_factory=set)
    ties: set[Path] = field(default_factory=set)
    right: int = 0
    differences: dict[Path, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ParityReport:
    """The result of the parity gate.

    Attributes:
        photos: Number of photos that were compared.
        skipped: Number of photos that could not be decoded.
        checkpoint: Number of photos that the checkpoint classifies correctly.
        graphs: Name of each graph -> its differences from the checkpoint.
        classes: Class index -> number of photos of the class, and number of those that the
            checkpoint classifies correctly.
    """

    photos: int
    skipped: int
    checkpoint: int
    graphs: Mapping[str, Agreement]
    classes: Mapping[int, tuple[int, int]]

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy (0 to 1) by graph name; the key "checkpoint" has the checkpoint's accuracy."""
        right = {"checkpoint": self.checkpoint, **{k: v.right for k, v in self.graphs.items()}}
        return {name: count / self.photos for name, count in right.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's `parity` entry."""
        return {
            "photos": self.photos,
            "skipped": self.skipped,
            "batches": list(BATCHES),
            "tolerance": TOLERANCE,
            "accuracy": self.accuracy,
            "graphs": {
                name: {
                    "largest_difference": agreement.difference,
                    "top1_changed": len(agreement.changed),
                    "ties": len(agreement.ties),
                }
                for name, agreement in self.graphs.items()
            },
            "classes": [
                {"class": index, "photos": photos, "right": right}
                for index, (photos, right) in sorted(self.classes.items())
            ],
        }


def subsample(samples: Sequence[Sample], limit: int = MAX_PHOTOS) -> list[Sample]:
    """Return all samples, or `limit` random ones in their original order.

    The result is the same on every call.
    """
    if len(samples) <= limit:
        return list(samples)
    drawn = random.Random(0).sample(range(len(samples)), limit)
    return [samples[index] for index in sorted(drawn)]


def gate(
    checkpoint: Runtime,
    preprocess: Preprocess,
    graphs: Mapping[str, Predictor],
    samples: Sequence[Sample],
    workers: int = 1,
    log: Callable[[str], None] = show,
) -> ParityReport:
    """Compare every graph with the checkpoint on held-out photos, at several batch sizes.

    Args:
        checkpoint: Runtime of the network as trained: eager, float32, not fused.
        preprocess: The preprocessing saved with the checkpoint.
        graphs: Name of each graph -> predictor that runs the graph.
        samples: Photos and the indices of their classes.
        workers: Number of threads.
        log: Function that is called with lines about the worst photos if the gate fails.

    Raises:
        GateError: A probability differs by more than the tolerance, or a predicted class differs
            without a tie. The message names a photo.
        DataError: There are no photos, or more than 5 % of them can't be decoded.
    """
    agreements = {name: Agreement() for name in graphs}
    unreadable: list[Path] = []
    photos, right = Counter[int](), Counter[int]()
    chunks = [samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    with ThreadPoolExecutor(workers) as pool:
        for scored in pool.map(lambda chunk: _score(chunk, checkpoint, preprocess, graphs), chunks):
            unreadable += scored.unreadable
            if not scored.paths:
                continue
            photos.update(scored.labels)
            predicted = scored.truth.argmax(axis=1)
            right.update(y for y, top in zip(scored.labels, predicted, strict=True) if y == top)
            for name, agreement in agreements.items():
                for answers in scored.answers[name]:
                    _compare(agreement, scored.truth, answers, scored.paths)
                agreement.right += _count_right(scored.answers[name][0], scored.labels)
    _check_photos(photos.total(), unreadable)
    classes = {label: (count, right[label]) for label, count in photos.items()}
    report = ParityReport(photos.total(), len(unreadable), right.total(), agreements, classes)
    _check_agreement(report, log)
    return report


def write_golden(
    payload: Path,
    checkpoint: Runtime,
    manifest: Manifest,
    samples: Sequence[Sample],
) -> tuple[dict[str, Any], ...]:
    """Copy a few photos (golden images) into `payload`, and return the manifest's `golden` entries.

    At most one photo per class is copied. Each entry has the photo's expected probabilities,
    computed with the checkpoint. A service refuses to load a graph whose probabilities for the
    golden images differ by more than the tolerance.
    """
    preprocess = manifest.preprocess
    by_class: dict[int, list[Path]] = {}
    for path, label in samples:
        if path.is_file():
            by_class.setdefault(label, []).append(path)
    labels = sorted(by_class)
    if len(labels) > GOLDEN_IMAGES:
        labels = [labels[i * len(labels) // GOLDEN_IMAGES] for i in range(GOLDEN_IMAGES)]
    (payload / "golden").mkdir()
    chosen: list[dict[str, Any]] = []
    total = 0
    for label in labels:
        for path in sorted(by_class[label], key=lambda p: (p.stat().st_size, p.name)):
            try:
                content = path.read_bytes()
                decoded = decode(content, preprocess=preprocess)
            except (ImageError, OSError):
                continue
            if chosen and total + len(content) > GOLDEN_BYTES:
                break  # the other photos of the class are larger
            total += len(content)
            # A photo that was recognised by its content may have any suffix.
            file = f"golden/{len(chosen)}{path.suffix.lower() if is_image(path.name) else ''}"
            (payload / file).write_bytes(content)
            logits, _ = checkpoint.run(preprocess(decoded.image, decoded.area)[None])
            truth = softmax(logits, manifest.temperature)[0]
            chosen.append({"file": file, "probabilities": {"fp32": truth.tolist()}})
            break
    return tuple(chosen)


class _Scored(NamedTuple):
    """The probabilities for one chunk of photos.

    Attributes:
        paths: Paths of the N photos that could be decoded.
        labels: Indices of their true classes.
        unreadable: Paths of the photos that could not be decoded.
        truth: Probabilities that the checkpoint gives, [N, classes].
        answers: Graph name -> list of the probabilities that the graph gives, [N, classes], one
            array for each batch size.
    """

    paths: list[Path]
    labels: list[int]
    unreadable: list[Path]
    truth: Probabilities
    answers: dict[str, list[Probabilities]]


def _score(
    chunk: Sequence[Sample],
    checkpoint: Runtime,
    preprocess: Preprocess,
    graphs: Mapping[str, Predictor],
) -> _Scored:
    scored = _Scored([], [], [], np.empty((0, 0)), {name: [] for name in graphs})
    data, pixels = [], []
    for path, label in chunk:
        try:
            content = path.read_bytes()
            decoded = decode(content, preprocess=preprocess)
        except (ImageError, OSError):
            scored.unreadable.append(path)
            continue
        scored.paths.append(path)
        scored.labels.append(label)
        data.append(content)
        pixels.append(preprocess(decoded.image, decoded.area))
    if not data:
        return scored
    temperature = next(iter(graphs.values())).manifest.temperature
    truth = softmax(checkpoint.run(np.stack(pixels))[0], temperature)
    for name, predictor in graphs.items():
        prepared = [predictor.prepare(content) for content in data]
        scored.answers[name] += [_predict(predictor, prepared, size) for size in BATCHES]
    return scored._replace(truth=truth)


def _predict(predictor: Predictor, prepared: Sequence[Prepared], size: int) -> Probabilities:
    """Return probabilities [N, classes], computed in batches of `size` images."""
    starts = range(0, len(prepared), size)
    answers = (a for start in starts for a in predictor.predict(prepared[start : start + size]))
    return np.stack([answer.probabilities for answer in answers])


def _count_right(answers: Probabilities, labels: Sequence[int]) -> int:
    return sum(int(row.argmax()) == label for row, label in zip(answers, labels, strict=True))


def _compare(
    agreement: Agreement, truth: Probabilities, answers: Probabilities, paths: Sequence[Path]
) -> None:
    for expected, actual, path in zip(truth, answers, paths, strict=True):
        difference = float(np.abs(expected - actual).max())
        if math.isnan(difference):  # any comparison with NaN is false
            difference = math.inf
        agreement.differences[path] = max(difference, agreement.differences.get(path, 0.0))
        if difference > agreement.difference:
            agreement.difference, agreement.worst = difference, path
        best, other = int(expected.argmax()), int(actual.argmax())
        if best != other:
            tie = expected[best] - expected[other] < TOLERANCE
            (agreement.ties if tie else agreement.changed).add(path)


def _check_photos(photos: int, unreadable: Sequence[Path]) -> None:
    total = photos + len(unreadable)
    if not total:
        raise DataError("there are no validation photos to check the export on; use --data")
    if len(unreadable) > MAX_UNREADABLE_SHARE * total:
        raise DataError(
            f"{len(unreadable)} of {total} validation photos can't be decoded, for example "
            f"{unreadable[0]}; replace them"
        )


def _check_agreement(report: ParityReport, log: Callable[[str], None]) -> None:
    for name, agreement in report.graphs.items():
        reason = None
        if agreement.difference > TOLERANCE:
            reason = f"a probability of {agreement.worst} is off by {agreement.difference:.2g}"
            reason += f", tolerance {TOLERANCE:.0e}"
        elif agreement.changed:
            reason = f"the best class of {min(agreement.changed)} changed"
        if reason:
            log(f"{name}: the photos with the largest differences")
            by_difference = sorted(agreement.differences.items(), key=lambda item: -item[1])
            for path, difference in by_difference[:WORST_SHOWN]:
                changed = ", another best class" if path in agreement.changed else ""
                log(f"  {difference:.2g}  {path}{changed}")
            raise GateError(
                f"{name} and the checkpoint give different answers: {reason} "
                f"({len(agreement.changed)} of {report.photos} photos change their best class); "
                "no bundle was written"
            )
