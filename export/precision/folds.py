"""Graphs of the other folds of a run, for judging precisions: `fledge export RUN --folds RUN …`.

A recipe with `data.folds` is trained once for each fold. Each photo is held out in one of the runs,
so together they judge a precision on the whole data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from export.graph import assemble
from export.precision.select import FoldGraph
from export.writers import onnx
from serving.errors import DataError
from serving.terminal import quote_path
from training.run import checkpoint
from training.run.dataset import load_run_dataset

_SAME = ("arch", "arch_args", "head", "classes", "preprocess")


def write(
    runs: Sequence[Path],
    info: checkpoint.CheckpointInfo,
    held_out: Sequence[Path],
    folder: Path,
    *,
    data: Path | None = None,
    log: Callable[[str], None],
) -> list[FoldGraph]:
    """Write the float32 graph of each run, and list its photos.

    Args:
        runs: Folders of the runs.
        info: The checkpoint that is exported.
        held_out: Held-out photos that count already; a photo counts once.
        folder: Where the graphs are written.
        data: The photos' folder, if they were moved after training.
        log: Function that is called with one line per run.

    Raises:
        DataError: A run has no checkpoint, another network or other classes, its photos are
            missing, or all its held-out photos count already.
    """
    seen, folds = set(held_out), []
    for number, run in enumerate(runs):
        named = f"--folds {quote_path(run)}"
        classifier, own = checkpoint.load(run)
        for name in _SAME:
            if getattr(own, name) != getattr(info, name):
                raise DataError(f"{named}: its {name} differs; name runs of the same recipe")
        dataset = load_run_dataset(run, data)
        new = [(s.path, s.label) for s in dataset.valid if s.path not in seen]
        if not new:
            raise DataError(f"{named}: its held-out photos count already; name runs of other folds")
        seen.update(path for path, _ in new)
        graph, _ = assemble(classifier, own.preprocess)
        path = folder / f"fold{number}.onnx"
        onnx.write(graph, path, name=own.name, labels=own.classes, preprocess=own.preprocess)
        train = [(s.path, s.label) for s in dataset.train]
        folds.append(FoldGraph(path, train, new))
        log(f"{named}: {len(new)} held-out photos")
    return folds
