"""The dataset of a finished run, read back from its split file."""

from __future__ import annotations

import os
from pathlib import Path

from serving.errors import DataError
from training.data import sample, torchvision_sets
from training.data.dataset import SAMPLE, SPLIT_FILE, Dataset, read_split
from training.run import checkpoint


def of_run(run: Path, data: Path | None = None, part: str = "valid") -> Dataset:
    """The split that a run used.

    Args:
        run: The run's folder, or its checkpoint.
        data: Where the photos are now, if they have moved.
        part: Whose photos must all be there; "" asks for none.

    Raises:
        DataError: The photos are not where they were; names `--data`.
    """
    if data is not None and not os.path.isdir(data):
        raise DataError(f"--data {data}: no such folder")
    path = checkpoint.find(run)
    info = checkpoint.read_info(path.with_suffix(".json"))
    root = (data or Path(str(info.data["root"]))).resolve()
    source = str(info.data.get("source", root))
    if data is None and not root.is_dir():
        if source == SAMPLE:
            root = sample.cached_sample()
        elif source in torchvision_sets.NAMES:
            root, _ = torchvision_sets.find(source)
    return read_split(
        checkpoint.folder_of(run) / SPLIT_FILE,
        root,
        info.classes,
        source,
        needed=(part,) if part else (),
    )
