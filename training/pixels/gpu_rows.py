"""Row sources for a GPU: all rows in GPU memory if they fit, else batches copied in advance."""

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
"""Share of the GPU's free memory that the rows of a part may take; training needs the rest."""

CHUNK_BYTES: Final = 64 * 2**20
"""Bytes per copy while `GpuRows` is filled."""


class GpuRows:
    """Rows in the memory of the device, copied there once."""

    def __init__(self, rows: Rows, where: torch.device, copier: DeviceCopier | None = None) -> None:
        """Copy `rows` in chunks; `copier` defaults to `device_copier(where)`.

        Raises:
            torch.OutOfMemoryError: The rows don't fit.
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
        """A copy of some rows, on the device; see `Rows`."""
        if isinstance(index, slice):
            return self._pixels[index].clone()
        return self._pixels.index_select(0, upload(index, self._pixels.device))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """`self[index]` for each index in `order`."""
        for index in upload_indices(order, self._pixels.device):
            yield self[index]


class PrefetchedRows:
    """Rows copied to the device batch by batch, by a thread that works ahead."""

    def __init__(self, rows: Rows, where: torch.device, copier: DeviceCopier | None = None) -> None:
        """rows: on the CPU; `copier` defaults to `device_copier(where)`."""
        self._rows, self._copier = rows, copier or device.device_copier(where)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """A copy of some rows, on the device; see `Rows`."""
        return self._copier.receive(self._copier.send(self._rows[index]))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """`self[index]` for each index in `order`.

        A background thread reads and copies the next `AHEAD` batches. Errors in the thread are
        raised here; the thread ends when the generator is closed.
        """
        batches = self._rows.batches(order)

        def send(_: object) -> Transfer:
            return self._copier.send(next(batches))

        sent = map_ordered(send, order, workers=1, window=AHEAD + 1, name="pixels")
        with closing(batches), closing(sent):  # the thread ends before `batches` is closed
            # `map` holds no reference to a batch; a loop variable would keep its memory in use.
            yield from map(self._copier.receive, sent)


def upload_indices(order: Iterable[Tensor | slice], where: torch.device) -> list[Tensor | slice]:
    """The same indices on the device, with one copy for all tensors."""
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
    """The part with `GpuRows` if they fit, else with `PrefetchedRows`; unchanged on the CPU.

    Args:
        part: The photos of a part of the dataset, with rows on the CPU.
        name: Name of the part in the log.
        where: Training device.
        log: Takes log lines.
        free: Free memory of a device, in bytes.
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
