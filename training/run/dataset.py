"""Load the dataset that a run was trained on, from the split file in the run folder."""

from __future__ import annotations

import os
from pathlib import Path

from serving.errors import DataError
from serving.terminal import quote_path
from training.data import sample, torchvision_sets
from training.data.dataset import SAMPLE, SPLIT_FILE, Dataset, read_split
from training.run import checkpoint
from training.utils import archive


def load_run_dataset(run: Path, data: Path | None = None, part: str = "valid") -> Dataset:
    """Load the dataset of a run, with the training/validation split that the run used.

    Args:
        run: The run folder, or the .safetensors file of a checkpoint in the run folder.
        data: Folder or archive of the photos. None: the folder that the run was trained on. If that
            folder is gone and the dataset is the sample dataset, a torchvision dataset or an
            archive, the copy in the user's cache is used.
        part: The split whose photos must all exist: "train", "valid" or "test"; "" if no photo has
            to exist.

    Raises:
        DataError: `data` is no folder or archive, photos of `part` are missing, or the split file
            can't be read.
    """
    if data is not None and archive.is_archive(data):
        data = archive.extracted(data)
    if data is not None and os.path.isfile(data):
        folder = quote_path(os.path.dirname(data) or ".")
        raise DataError(
            f"--data {quote_path(data)}: a file; the run knows its photos and labels, name "
            f"their folder alone: --data {folder}"
        )
    if data is not None and not os.path.isdir(data):
        raise DataError(f"--data {data}: no such folder or archive")
    path = checkpoint.weights_path(run)
    info = checkpoint.read_info(path.with_suffix(".json"))
    stated = info.data.get("root")
    try:
        if data is None and not isinstance(stated, str):
            raise ValueError(f"data.root = {stated!r:.80}")
        root = (data or Path(str(stated))).resolve()
        found = root.is_dir()
    except (OSError, ValueError) as error:  # also a name that is too long, or has a NUL
        raise DataError(
            f"{path.with_suffix('.json')} has no folder of photos; say where with --data"
        ) from error
    source = str(info.data.get("source", root))
    if data is None and not found:
        if source == SAMPLE:
            root = sample.cached_sample()
        elif source in torchvision_sets.NAMES:
            root, _ = torchvision_sets.find(source)
        else:
            root = archive.found_again(root, source)
    return read_split(
        checkpoint.run_folder_of(run) / SPLIT_FILE,
        root,
        info.classes,
        source,
        needed=(part,) if part else (),
    )
