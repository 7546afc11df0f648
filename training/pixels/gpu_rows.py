"""Move decoded photos to a GPU: all at once if they fit in its memory, else batch by batch.

A row is the uint8 pixels of one photo, [S, S, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from serving.utils.parallel import map_ordered
from training.pixels.part import PixelSet
from training.pixels.rows import AHEAD, Rows
from training.utils import device, disk_cache
from training.utils.console import Log
from training.utils.device import DeviceCopier, Transfer, upload

GPU_MEMORY_SHARE: Final = 0.5
"""Share of the free GPU memory that the photos of a split may take; training needs the rest."""

CHUNK_BYTES: Final = 64 * 2**20
"""Number of bytes that `GpuRows` copies to the GPU at a time."""


class GpuRows:
    """Rows (the uint8 pixels of one photo each) that are all stored in GPU memory."""

    def __init__(self, rows: Rows, where: torch.device, copier: DeviceCopier | None = None) -> None:
        """Copy all rows to the device `where`, in chunks.

        Args:
            rows: Rows on the CPU.
            where: Device to copy to.
            copier: Copies tensors to the device; None: `device_copier(where)`.

        Raises:
            torch.OutOfMemoryError: The rows don't fit in the memory of the device.
        """
        first, count = rows[:1], len(rows)
        self._pixels = torch.empty(count, *first.shape[1:], dtype=first.dtype, device=where)
        step = max(CHUNK_BYTES // max(first.nbytes, 1), 1)
        parts = [slice(start, start + step) for start in range(0, count, step)]
        with closing(PrefetchedRows(rows, where, copier).batches(parts)) as chunks:
            for part, chunk in zip(parts, chunks, strict=True):
                self._pixels[part].copy_(chunk)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return a copy of the selected rows, uint8 [N, S, S, 3], on the device."""
        if isinstance(index, slice):
            return self._pixels[index].clone()
        return self._pixels.index_select(0, upload(index, self._pixels.device))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """For each index (int64 [N] or slice) in `order`, yield the rows, uint8 [N, S, S, 3]."""
        for index in upload_indices(order, self._pixels.device):
            yield self[index]


class PrefetchedRows:
    """Rows on the CPU; a background thread copies the next batches to the device in advance."""

    def __init__(self, rows: Rows, where: torch.device, copier: DeviceCopier | None = None) -> None:
        """Store the arguments.

        Args:
            rows: Rows (the uint8 pixels of one photo each) on the CPU.
            where: Device to copy to.
            copier: Copies tensors to the device; None: `device_copier(where)`.
        """
        self._rows, self._copier = rows, copier or device.device_copier(where)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return a copy of the selected rows, uint8 [N, S, S, 3], on the device."""
        return self._copier.receive(self._copier.send(self._rows[index]))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """For each index (int64 [N] or slice) in `order`, yield the rows, on the device.

        The rows are uint8 [N, S, S, 3]. A background thread reads and copies the next `AHEAD`
        batches. An error in the thread is raised by this generator. The thread ends when the
        generator is closed.
        """
        batches = self._rows.batches(order)

        def send(_: object) -> Transfer:
            return self._copier.send(next(batches))

        sent = map_ordered(send, order, workers=1, window=AHEAD + 1, name="pixels")
        with closing(batches), closing(sent):  # the thread ends before `batches` is closed
            # `map` holds no reference to a batch; a loop variable would keep its memory in use.
            yield from map(self._copier.receive, sent)


def upload_indices(order: Iterable[Tensor | slice], where: torch.device) -> list[Tensor | slice]:
    """Copy index tensors to the device in a single transfer. Slices are returned unchanged."""
    order = list(order)
    tensors = [index for index in order if isinstance(index, Tensor)]
    if where.type == "cpu" or not tensors:
        return order
    copies = iter(upload(torch.cat(tensors), where).split([len(index) for index in tensors]))
    return [index if isinstance(index, slice) else next(copies) for index in order]


def place_rows(
    part: PixelSet,
    name: str,
    where: torch.device,
    log: Log,
    free: Callable[[torch.device], int] = device.free_memory,
) -> PixelSet:
    """Return `part` with its rows moved to GPU memory (`GpuRows`) if they fit.

    Otherwise the rows become `PrefetchedRows`: a thread copies them to the GPU batch by batch.
    If the device is the CPU, `part` is returned unchanged.

    Args:
        part: The photos of one split (train or valid), with rows on the CPU.
        name: Name of the split in the log.
        where: Training device.
        log: Function that writes a log line.
        free: Function that returns the free memory of a device in bytes.
    """
    if where.type == "cpu" or not len(part):
        return part
    size, available = len(part) * part.pixels[:1].nbytes, int(GPU_MEMORY_SHARE * free(where))
    if size <= available:
        try:
            on_gpu = replace(part, pixels=GpuRows(part.pixels, where))
        except torch.OutOfMemoryError:
            pass
        else:
            log(
                f"pixels: {len(part):,} {name} photos are in GPU memory: "
                f"{disk_cache.format_size(size)}"
            )
            return on_gpu
    log(
        f"pixels: {len(part):,} {name} photos are copied to the GPU batch by batch: their "
        f"{disk_cache.format_size(size)} are more than {GPU_MEMORY_SHARE:.0%} of its free memory"
    )
    return replace(part, pixels=PrefetchedRows(part.pixels, where))
