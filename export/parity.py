"""The ship gate: from encoded photos to probabilities, the exported graphs against the checkpoint.

Everything runs as production runs it: `serving`'s decoder, preprocessing, runtimes and softmax. The
one thing that differs between the two sides is the network. Needs no torch itself.
"""

from __future__ import annotations

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
from serving.imaging import decode as images
from serving.imaging import tta as views
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import Probabilities
from serving.inference.predictor import Predictor, Prepared
from serving.inference.runtime import Runtime

TOLERANCE: Final = 1e-4
"""Largest difference of a probability, in fp32."""

BATCHES: Final = (1, 2, 7)
LIMIT: Final = 500
WORST: Final = 5
"""Photos that are named where the gate does not open."""
GOLDEN_IMAGES: Final = 8
GOLDEN_BYTES: Final = 4_000_000
BROKEN_SHARE: Final = 0.05
_AT_ONCE: Final = 14  # photos in memory; a multiple of every batch size, so no batch is cut short

Sample = tuple[Path, int]


@dataclass
class Agreement:
    """How far one graph is from the checkpoint.

    difference: largest of a probability, over all photos and batch sizes; worst: on which photo.
    changed: photos whose best class differs at any batch size.
    ties: photos of which that is no wonder: the checkpoint itself holds the two classes apart by
        less than the tolerance. They are not in `changed`.
    right: how many photos it gets right. off: largest difference of each photo.
    """

    difference: float = 0.0
    worst: Path | None = None
    changed: set[Path] = field(default_factory=set)
    ties: set[Path] = field(default_factory=set)
    right: int = 0
    off: dict[Path, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ParityReport:
    """What the gate measured.

    photos: how many were compared; skipped: how many could not be decoded.
    checkpoint: how many photos the checkpoint gets right; graphs: by name of the graph.
    classes: for each index of a class how many photos of it there were, and how many of them the
        checkpoint gets right.
    """

    photos: int
    skipped: int
    checkpoint: int
    graphs: Mapping[str, Agreement]
    classes: Mapping[int, tuple[int, int]]

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of 1 that each gets right."""
        right = {"checkpoint": self.checkpoint, **{k: v.right for k, v in self.graphs.items()}}
        return {name: count / self.photos for name, count in right.items()}

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it under `parity`."""
        return {
            "photos": self.photos,
            "skipped": self.skipped,
            "batches": list(BATCHES),
            "tolerance": TOLERANCE,
            "accuracy": self.accuracy,
            "graphs": {
                name: {
                    "largest_difference": found.difference,
                    "top1_changed": len(found.changed),
                    "ties": len(found.ties),
                }
                for name, found in self.graphs.items()
            },
            "classes": [
                {"class": index, "photos": photos, "right": right}
                for index, (photos, right) in sorted(self.classes.items())
            ],
        }


def held_out(samples: Sequence[Sample], limit: int = LIMIT) -> list[Sample]:
    """All samples, or a draw of `limit` of them that is the same every time, in their order."""
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
    log: Callable[[str], None] = print,
) -> ParityReport:
    """Compare every graph with the checkpoint on held-out photos, at several batch sizes.

    Args:
        checkpoint: The network as trained: eager, float32, unfused.
        preprocess: Saved with the checkpoint.
        graphs: Name -> predictor, each with its own runtime.
        samples: Photos and the indices of their classes.
        workers: Threads that score side by side.
        say: Takes lines about the worst photos, where the gate does not open.

    Raises:
        GateError: A probability is off by more than the tolerance, or a top-1 differs; names the
            worst photo.
        DataError: No photo, or more than 5 % of them can't be decoded.
    """
    agreements = {name: Agreement() for name in graphs}
    broken: list[Path] = []
    seen, right = Counter[int](), Counter[int]()
    chunks = [samples[start : start + _AT_ONCE] for start in range(0, len(samples), _AT_ONCE)]
    with ThreadPoolExecutor(workers) as pool:
        for scored in pool.map(lambda chunk: _score(chunk, checkpoint, preprocess, graphs), chunks):
            broken += scored.broken
            if not scored.paths:
                continue
            seen.update(scored.labels)
            best = scored.truth.argmax(axis=1)
            right.update(y for y, found in zip(scored.labels, best, strict=True) if y == found)
            for name, found in agreements.items():
                for answers in scored.answers[name]:
                    _compare(found, scored.truth, answers, scored.paths)
                found.right += _right(scored.answers[name][0], scored.labels)
    _check_photos(seen.total(), broken)
    classes = {label: (count, right[label]) for label, count in seen.items()}
    outcome = ParityReport(seen.total(), len(broken), right.total(), agreements, classes)
    _check_agreement(outcome, log)
    return outcome


def golden(
    payload: Path,
    original: Runtime,
    manifest: Manifest,
    samples: Sequence[Sample],
) -> tuple[dict[str, Any], ...]:
    """Copy a few photos into `payload`, one a class, and state what they must give.

    That is what the checkpoint says; graphs have to stay within the tolerance of it everywhere.
    """
    preprocess = manifest.preprocess
    by_class: dict[int, list[Path]] = {}
    for path, label in samples:
        if path.is_file():
            by_class.setdefault(label, []).append(path)
    labels = sorted(by_class)
    if len(labels) > GOLDEN_IMAGES:  # spread over the classes
        labels = [labels[i * len(labels) // GOLDEN_IMAGES] for i in range(GOLDEN_IMAGES)]
    (payload / "golden").mkdir()
    chosen: list[dict[str, Any]] = []
    total = 0
    for label in labels:
        for path in sorted(by_class[label], key=lambda p: (p.stat().st_size, p.name)):
            try:
                content = path.read_bytes()
                decoded = images.decode(content, background=preprocess.background)
            except (ImageError, OSError):
                continue
            total += len(content)
            if chosen and total > GOLDEN_BYTES:
                return tuple(chosen)
            file = f"golden/{len(chosen)}{path.suffix.lower()}"
            (payload / file).write_bytes(content)
            logits, _ = original.run(preprocess(decoded.image)[None])
            truth = views.softmax(logits, manifest.temperature)[0]
            chosen.append({"file": file, "probabilities": {"fp32": truth.tolist()}})
            break
    return tuple(chosen)


class _Scored(NamedTuple):
    """What all say to one chunk: probabilities [N, classes], of each graph for each batch size."""

    paths: list[Path]
    labels: list[int]
    broken: list[Path]
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
            decoded = images.decode(content, background=preprocess.background)
        except (ImageError, OSError):
            scored.broken.append(path)
            continue
        scored.paths.append(path)
        scored.labels.append(label)
        data.append(content)
        pixels.append(preprocess(decoded.image))
    if not data:
        return scored
    temperature = next(iter(graphs.values())).manifest.temperature
    truth = views.softmax(checkpoint.run(np.stack(pixels))[0], temperature)
    for name, predictor in graphs.items():
        prepared = [predictor.prepare(content) for content in data]
        scored.answers[name] += [_predict(predictor, prepared, size) for size in BATCHES]
    return scored._replace(truth=truth)


def _predict(predictor: Predictor, prepared: Sequence[Prepared], size: int) -> Probabilities:
    """Probabilities [N, classes], `size` images at a time."""
    starts = range(0, len(prepared), size)
    answers = (a for start in starts for a in predictor.predict(prepared[start : start + size]))
    return np.stack([answer.probabilities for answer in answers])


def _right(answers: Probabilities, labels: Sequence[int]) -> int:
    return sum(int(row.argmax()) == label for row, label in zip(answers, labels, strict=True))


def _compare(
    found: Agreement, truth: Probabilities, answers: Probabilities, paths: Sequence[Path]
) -> None:
    for expected, actual, path in zip(truth, answers, paths, strict=True):
        off = float(np.abs(expected - actual).max())
        found.off[path] = max(off, found.off.get(path, 0.0)) if off == off else np.inf
        if not off <= found.difference:  # so that "not a number" is the worst of all
            found.difference, found.worst = off, path
        best, other = int(expected.argmax()), int(actual.argmax())
        if best != other:
            tie = expected[best] - expected[other] < TOLERANCE
            (found.ties if tie else found.changed).add(path)


def _check_photos(photos: int, broken: Sequence[Path]) -> None:
    total = photos + len(broken)
    if not total:
        raise DataError("there are no validation photos to check the export on; use --data")
    if len(broken) > BROKEN_SHARE * total:
        raise DataError(
            f"{len(broken)} of {total} validation photos can't be decoded, as {broken[0]}; "
            "replace them"
        )


def _check_agreement(outcome: ParityReport, log: Callable[[str], None]) -> None:
    for name, found in outcome.graphs.items():
        reason = None
        if not found.difference <= TOLERANCE:
            reason = f"a probability of {found.worst} is off by {found.difference:.2g}"
            reason += f", tolerance {TOLERANCE:.0e}"
        elif found.changed:
            reason = f"the best class of {min(found.changed)} is another"
        if reason:
            log(f"{name}: the photos that are furthest off")
            for path, off in sorted(found.off.items(), key=lambda item: -item[1])[:WORST]:
                log(f"  {off:.2g}  {path}{', another best class' if path in found.changed else ''}")
            raise GateError(
                f"{name} does not answer as the checkpoint does: {reason} "
                f"({len(found.changed)} of {outcome.photos} photos change their best class); "
                "no bundle was written"
            )
