"""A network to export, and photos of its classes; those of a run are read here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from export.graph import Exportable
from export.parity import Sample
from export.precision import folds, further_photos
from serving.errors import OptionError, WorkError
from serving.imaging.preprocess import Preprocess
from training.models import backbones
from training.run import checkpoint
from training.run.dataset import load_run_dataset


class Source(NamedTuple):
    """A network to export, and photos of its classes.

    Attributes:
        classifier: The network.
        info: Metadata of the checkpoint.
        name: Name of the run's folder or of the checkpoint file.
        train: Photos for int8 calibration.
        valid: Held-out photos.
        trained: Whether the network was trained on `train`.
        more: Further held-out photos, for comparing precisions and input sizes.
        folds: Runs of other folds, for comparing precisions and input sizes.
        size_report: Comparison of the input's size with that of the training; None: it is that.
    """

    classifier: Exportable
    info: checkpoint.CheckpointInfo
    name: str
    train: Sequence[Sample]
    valid: Sequence[Sample]
    trained: bool = True
    more: Sequence[Sample] = ()
    folds: Sequence[folds.Fold] = ()
    size_report: Mapping[str, Any] | None = None


def read_run(
    run: Path,
    sizes: Sequence[int],
    option: str,
    *,
    data: Path | None,
    photos: Path | None,
    folds_of: Sequence[Path],
    log: Callable[[str], None],
) -> Source:
    """Load a run's best checkpoint, and list its photos.

    Args:
        run: The run's folder, or one of its checkpoint files.
        sizes: Sizes of the input that the network must take.
        option: The option that names the sizes, for error messages.
        data: The photos' folder, if they were moved after training.
        photos: Folder of further held-out photos.
        folds_of: Runs of the other folds.
        log: Function that is called with lines about the photos.

    Raises:
        DataError: There is no checkpoint, the photos are missing, or a fold does not belong to the
            run.
        OptionError: The network does not take a size.
    """
    classifier, info = checkpoint.load(run)
    for size in sizes:
        with_size(info, size, option)
    dataset = load_run_dataset(run, data)
    train, valid = ([(s.path, s.label) for s in part] for part in (dataset.train, dataset.valid))
    more: list[Sample] = []
    if photos is not None:
        known = [path for path, _ in (*train, *valid, *dataset.test)]
        more = further_photos.find(photos, info.classes, known, log)
    counted = [path for path, _ in (*valid, *more)]
    others = folds.find(folds_of, info, counted, data=data, log=log)
    name = checkpoint.run_folder_of(run).resolve().name
    return Source(classifier, info, name, train, valid, more=more, folds=others)


def with_size(info: checkpoint.CheckpointInfo, size: int, option: str = "--size") -> Preprocess:
    """Return the checkpoint's preprocessing with another size.

    Raises:
        OptionError: The size is not from 8 to 4096, or the network does not take it.
    """
    try:
        preprocess = replace(info.preprocess, size=size)
    except OptionError as error:
        raise OptionError(re.sub(r"preprocess\.size = ", f"{option} ", str(error))) from error
    trained, key = info.preprocess.size, backbones.family_of(info.arch).size_option
    if key and size != trained:
        raise OptionError(
            f"{option} {size}: the weights of {info.arch} are for {trained} pixels alone; leave "
            f"{option} out, or train again with another arch_args.{key}"
        )
    backbones.check_size(info.arch, info.arch_args, size, option)
    return preprocess


def check_finite(classifier: Exportable, path: Path) -> None:
    """Check that all weights are finite.

    Raises:
        WorkError: A weight is NaN or infinite.
    """
    for key, value in classifier.state_dict().items():
        if not torch.isfinite(value).all():
            raise WorkError(f"{path}: {key} holds NaN or infinity: its training diverged")
