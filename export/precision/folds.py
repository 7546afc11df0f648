"""Graphs of the other folds of a run, for judging precisions: `fledge export RUN --folds RUN …`.

A recipe with `data.folds` is trained once for each fold. Each photo is held out in one of the runs,
so together they judge a precision on the whole data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from export.graph import assemble
from export.parity import Sample
from export.precision.select import FoldGraph
from export.writers import onnx
from serving.errors import DataError
from serving.imaging.preprocess import Preprocess
from serving.terminal import quote_path
from training.run import checkpoint
from training.run.dataset import load_run_dataset

_SAME = ("arch", "arch_args", "head", "classes", "preprocess")


class Fold(NamedTuple):
    """A run of another fold of the same data set.

    Attributes:
        run: Folder of the run.
        train: Its training photos.
        held_out: Its held-out photos.
    """

    run: Path
    train: Sequence[Sample]
    held_out: Sequence[Sample]


def find(
    runs: Sequence[Path],
    info: checkpoint.CheckpointInfo,
    held_out: Sequence[Path],
    *,
    data: Path | None = None,
    log: Callable[[str], None],
) -> list[Fold]:
    """Check each run, and list its photos.

    Args:
        runs: Folders of the runs.
        info: The checkpoint that is exported.
        held_out: Held-out photos that count already; a photo counts once.
        data: The photos' folder, if they were moved after training.
        log: Function that is called with one line per run.

    Raises:
        DataError: A run has no checkpoint, another network or other classes, its photos are
            missing, or all its held-out photos count already.
    """
    seen, folds = set(held_out), []
    for run in runs:
        named = f"--folds {quote_path(run)}"
        _, own = checkpoint.load(run)
        for name in _SAME:
            if getattr(own, name) != getattr(info, name):
                raise DataError(f"{named}: its {name} differs; name runs of the same recipe")
        dataset = load_run_dataset(run, data)
        new = [(s.path, s.label) for s in dataset.valid if s.path not in seen]
        if not new:
            raise DataError(f"{named}: its held-out photos count already; name runs of other folds")
        seen.update(path for path, _ in new)
        folds.append(Fold(run, [(s.path, s.label) for s in dataset.train], new))
        log(f"{named}: {len(new)} held-out photos")
    return folds


def write_graph(fold: Fold, path: Path, preprocess: Preprocess) -> None:
    """Write the float32 graph of a fold's network for a preprocessing.

    Raises:
        DataError: The checkpoint can't be read any more.
        WorkError: The network can't be exported.
    """
    classifier, info = checkpoint.load(fold.run)
    graph, _ = assemble(classifier, preprocess)
    onnx.write(graph, path, name=info.name, labels=info.classes, preprocess=preprocess)


def write(folds: Sequence[Fold], folder: Path, preprocess: Preprocess) -> list[FoldGraph]:
    """Write the float32 graph of each fold to `folder`; raises the errors of `write_graph`."""
    graphs = []
    for number, fold in enumerate(folds):
        graph = FoldGraph(folder / f"fold{number}.onnx", fold.train, fold.held_out)
        write_graph(fold, graph.path, preprocess)
        graphs.append(graph)
    return graphs
