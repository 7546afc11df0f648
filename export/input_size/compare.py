"""Measure accuracy and speed of a network at several input sizes, on its held-out photos.

Networks with pooling take other input sizes than the one of their training. The random crops of
training show objects larger than the centre crop does afterwards, so a somewhat larger input is
often more accurate (Touvron et al., 2019, "Fixing the train-test resolution discrepancy"). A
smaller one is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from export import benchmark, calibration
from export.calibration import HeldOut, predict_views
from export.graph import assemble
from export.parity import TOLERANCE, Sample, subsample
from export.precision import folds, loss_bounds
from export.precision.loss_bounds import PairedDrop, doubt
from export.precision.select import MAX_PHOTOS
from export.sources.source import Source
from export.writers import onnx
from serving.bundle.manifest import Manifest
from serving.errors import DataError, WorkError
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import views_for
from serving.inference.predictor import Predictor
from serving.inference.runtime import OnnxRuntime
from serving.utils.cpu import cores
from serving.utils.progress import progress_bar
from training.run.checkpoint import CheckpointInfo

MAX_SIZES: Final = 8
"""Each size takes memory: its graph is loaded twice while speed is measured."""

_Flags = npt.NDArray[np.bool_]


class _Network(NamedTuple):
    """The network of the source or of another fold, and the photos that it is compared on.

    Attributes:
        write: Function that writes the network's float32 graph to a file, for a preprocessing.
        held_out: Photos that the network was not trained on.
    """

    write: Callable[[Path, Preprocess], None]
    held_out: Sequence[Sample]


@dataclass(frozen=True)
class SizeResult:
    """Accuracy and speed of a network at one input size.

    Attributes:
        size: Side of the input, in pixels.
        accuracy: Accuracy on the held-out photos, from 0 to 1.
        loss: Log loss on the held-out photos in nats, with a temperature that was fitted at this
            size and cross-validated.
        drop: How far the accuracy is below that at the trained size.
        single: Images per second, one at a time.
        fastest: Images per second in the fastest setting.
        batch: Number of images per run in the fastest setting.
        speedup: Images per second divided by those at the trained size: the median over all
            settings, in each of which the sizes were measured one right after the other. It varies
            less on a busy machine than the quotient of two rates in the fastest setting.
    """

    size: int
    accuracy: float
    loss: float
    drop: PairedDrop
    single: float
    fastest: float
    batch: int
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return {
            "size": self.size,
            "accuracy": self.accuracy,
            "loss": float(f"{self.loss:.4g}"),
            "fell_points": round(self.drop.drop, 3),
            "fell_interval": [round(end, 3) for end in self.drop.interval],
            "fell_at_most": round(self.drop.at_most, 3),
            "fell_at_least": round(self.drop.at_least, 3),
            "images_per_second": {
                "single": float(f"{self.single:.4g}"),
                "fastest": float(f"{self.fastest:.4g}"),
                "batch": self.batch,
            },
            "times_trained": float(f"{self.speedup:.3g}"),
        }


@dataclass(frozen=True)
class SizeComparison:
    """Results at several input sizes on the same photos.

    Attributes:
        trained: Size of the training, one of `results`.
        results: Results, by ascending size.
        photos: Number of held-out photos.
        folds: Number of those that were held out in other folds.
        budget: Largest accepted loss of accuracy, in percentage points.
        skipped: Number of further held-out photos that can't be decoded.
    """

    trained: int
    results: tuple[SizeResult, ...]
    photos: int
    folds: int
    budget: float
    skipped: int = 0

    def at(self, size: int) -> SizeResult:
        """Return the result at a size."""
        return next(one for one in self.results if one.size == size)

    def refusal_reason(self, result: SizeResult) -> str | None:
        """Return why a size is refused: accuracy surely falls by too much; None if it is not."""
        if result.drop.at_least <= self.budget:
            return None
        return (
            f"accuracy falls by {result.drop.drop:.2f} points (at least "
            f"{result.drop.at_least:.2f} with 95 % confidence), and the budget is {self.budget:g}"
        )

    def doubt(self, result: SizeResult) -> str | None:
        """Return why the photos can't tell if the drop is within the budget; None if it is."""
        return doubt(result.drop.at_most, self.budget)

    @property
    def advised(self) -> SizeResult:
        """The size that the photos speak for.

        The most accurate of the sizes that are surely more accurate than the trained size; else the
        smallest of those that are surely accurate enough, of which the trained size is one. Speeds
        have no part in it, because they vary on a busy machine, and a smaller input is faster.
        """
        better = [one for one in self.results if one.drop.at_most < 0]
        if better:
            return max(better, key=lambda one: (one.accuracy, -one.size))
        enough = [one for one in self.results if self.doubt(one) is None]
        return min(enough, key=lambda one: one.size)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as a dictionary for JSON."""
        rows = []
        for one in self.results:
            refused, doubt = self.refusal_reason(one), self.doubt(one)
            sure = doubt is None or refused is not None
            rows.append(one.to_dict() | {"kept": refused is None, "sure": sure})
        return {
            "trained_size": self.trained,
            "photos": self.photos,
            "folds": self.folds,
            "skipped": self.skipped,
            "confidence": loss_bounds.CONFIDENCE,
            "budget_points": self.budget,
            "least_budget_points": round(100 * loss_bounds.least_budget(self.photos), 3),
            "cores": cores(),
            "sizes": rows,
        }


def compare(source: Source, sizes: Sequence[int], budget: float) -> SizeComparison:
    """Run a network and those of its other folds at several sizes on their held-out photos.

    Up to 2,000 photos of the network itself are used. Its speed is measured, too.

    Args:
        source: The network.
        sizes: Sizes that the network takes. The size of the training is added.
        budget: Largest accepted loss of accuracy, in percentage points.

    Raises:
        DataError: There are no held-out photos that can be decoded.
        WorkError: A graph can't be written, or its logits are not finite.
    """
    info, trained = source.info, source.info.preprocess.size
    held_out = subsample([*source.valid, *source.more], MAX_PHOTOS)
    networks = [
        _Network(partial(_write_graph, source), held_out),
        *(_Network(partial(folds.write_graph, fold), fold.held_out) for fold in source.folds),
    ]
    found: dict[int, list[HeldOut]] = {size: [] for size in sorted({*sizes, trained})}
    graphs: dict[str, Path] = {}
    with TemporaryDirectory() as folder:
        for number, network in enumerate(networks):
            for size, parts in found.items():
                path = Path(folder) / f"{number}-{size}.onnx"
                parts.append(_run(network, path, info, size))
                if number:
                    path.unlink()
                else:
                    graphs[str(size)] = path
        if not sum(len(one.labels) for one in found[trained]):
            raise DataError("there are no held-out photos to compare sizes on; use --photos DIR")
        widths = {name: int(name) for name in graphs}
        rates = benchmark.measure(graphs, info.preprocess, sizes=widths)
    right = {size: _right(parts) for size, parts in found.items()}
    results = [_result(size, found[size], right, trained, rates) for size in found]
    photos = len(right[trained])
    of_folds = photos - len(found[trained][0].labels)
    skipped = sum(len(network.held_out) for network in networks) - photos
    return SizeComparison(trained, tuple(results), photos, of_folds, budget, skipped)


def _write_graph(source: Source, path: Path, preprocess: Preprocess) -> None:
    graph, _ = assemble(source.classifier, preprocess)
    labels = source.info.classes
    onnx.write(graph, path, name=source.info.name, labels=labels, preprocess=preprocess)


def _run(network: _Network, path: Path, info: CheckpointInfo, size: int) -> HeldOut:
    """Write the network's graph to `path`, and return its outputs for the held-out photos."""
    preprocess = replace(info.preprocess, size=size)
    with progress_bar() as bar:
        task = bar.add_task(f"graph at {size} pixels", total=1)
        network.write(path, preprocess)
        bar.advance(task)
    entry: dict[str, Any] = {"file": path.name, "accuracy": None, "tolerance": TOLERANCE}
    manifest = Manifest(
        name=info.name,
        version="",
        arch=info.arch,
        labels=info.classes,
        preprocess=preprocess,
        views=views_for(preprocess),
        precisions={"fp32": entry},
        files={},
    )
    predictor = Predictor(manifest, OnnxRuntime(path, device="cpu"))
    title = f"held-out photos at {size} pixels"
    outputs = predict_views(predictor, network.held_out, cores(), views=1, title=title)
    if not np.isfinite(outputs.logits).all():
        raise WorkError(f"the network's logits at {size} pixels are not finite; leave the size out")
    return outputs


def _right(parts: Sequence[HeldOut]) -> _Flags:
    """Return which photos are classified correctly, bool [N]."""
    return np.concatenate([one.logits[:, 0].argmax(axis=1) == one.labels for one in parts])


def _result(
    size: int,
    parts: Sequence[HeldOut],
    right: Mapping[int, _Flags],
    trained: int,
    rates: benchmark.Rates,
) -> SizeResult:
    here, before = right[size], right[trained]
    lost, won = int((before & ~here).sum()), int((here & ~before).sum())
    drop = PairedDrop.of(lost, won, len(here))
    speeds, reference = rates[str(size)], rates[str(trained)]
    best = benchmark.fastest(speeds)
    return SizeResult(
        size=size,
        accuracy=float(here.mean()),
        loss=sum(len(one.labels) * _loss(one) for one in parts) / len(here),
        drop=PairedDrop(0.0, (0.0, 0.0), 0.0, 0.0) if size == trained else drop,
        single=max(rate for s, rate in speeds.items() if s.workers == s.batch == 1),
        fastest=speeds[best],
        batch=best.batch,
        speedup=statistics.median(speeds[setting] / reference[setting] for setting in speeds),
    )


def _loss(outputs: HeldOut) -> float:
    if not len(outputs.labels):
        return 0.0
    temperature = calibration.fit_temperature(outputs.logits[:, 0], outputs.labels)
    return float(calibration.calibration_report(outputs, temperature)["after"]["loss"])
