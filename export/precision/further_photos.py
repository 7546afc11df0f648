"""Photos that a run has not seen, for comparing precisions: `fledge export RUN --photos DIR`."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from export import torchvision_checkpoint
from export.parity import Sample
from serving.errors import DataError
from serving.terminal import quote_path


def find(
    folder: Path, labels: Sequence[str], known: Iterable[Path], log: Callable[[str], None]
) -> list[Sample]:
    """List the photos in a folder with one folder per class, without those that the run has.

    Args:
        folder: The folder.
        labels: Class names of the run, in the order of the logits.
        known: Photos of the run. Copies of them, by content, are left out too.
        log: Function that is called with one line about the photos.

    Raises:
        DataError: The folder can't be read, a class folder has no name of `labels`, or the run has
            all photos.
    """
    parts = torchvision_checkpoint.photos(folder, labels, "the run has its classes", log)
    samples = sorted({*parts[0], *parts[1]})
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in known:
        by_size[_size(path)].append(path)
    digests: dict[int, set[bytes]] = {}

    def is_known(path: Path) -> bool:
        size = _size(path)
        if size not in by_size:
            return False
        if size not in digests:
            digests[size] = {_digest(one) for one in by_size[size]}
        return _digest(path) in digests[size]

    new = [sample for sample in samples if not is_known(sample[0])]
    left_out = len(samples) - len(new)
    if not new:
        raise DataError(
            f"--photos {quote_path(folder)}: the run has all {left_out} photos already; name "
            "photos that it was not trained on"
        )
    also = f"; {left_out} that the run has are left out" if left_out else ""
    log(f"--photos {quote_path(folder)}: {len(new)} further held-out photos{also}")
    return new


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return bytes(path)
