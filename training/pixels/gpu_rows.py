"""Rows of pixels where a GPU reaches them: all on it where they fit, else copied a little ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from training.pixels.part import PixelSet
from training.pixels.rows import AHEAD, Rows
from training.utils import device, disk_cache
from training.utils.console import Log
from training.utils.device import DeviceCopier, Sent, upload

SHARE: Final = 0.5
"""Of the GPU's free memory, that a part's rows may take: the rest is for training."""

CHUNK: Final = 64 * 2**20
"""Bytes that are copied at a time while rows move to the GPU."""


class GpuRows:
    """Rows that lie on the device, copied there once."""

    def __init__(self, rows: Rows, where: torch.device, lane: DeviceCopier | None = None) -> None:
        """Copy them, in pieces; `lane` as `device.device_copier` unless given.

        Raises:
            torch.OutOfMemoryError: They don't fit.
        """
        first, count = rows[:1], len(rows)
        self._pixels = torch.empty(count, *first.shape[1:], dtype=first.dtype, device=where)
        step = max(CHUNK // max(first.nbytes, 1), 1)
        parts = [slice(start, start + step) for start in range(0, count, step)]
        with closing(PrefetchedRows(rows, where, lane).batches(parts)) as pieces:
            for part, piece in zip(parts, pieces, strict=True):
                self._pixels[part].copy_(piece)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """As `Rows`, on the device."""
        if isinstance(index, slice):
            return self._pixels[index].clone()
        return self._pixels.index_select(0, upload(index, self._pixels.device))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """As `Rows`, on the device."""
        for index in moved(order, self._pixels.device):
            yield self[index]


class PrefetchedRows:
    """Rows that a thread takes and sends to the device while the batches before are at work."""

    def __init__(self, rows: Rows, where: torch.device, lane: DeviceCopier | None = None) -> None:
        """rows: on the CPU; `lane` as `device.device_copier` unless given."""
        self._rows, self._lane = rows, lane or device.device_copier(where)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """As `Rows`, on the device."""
        return self._lane.receive(self._lane.send(self._rows[index]))

    def batches(self, order: Sequence[Tensor | slice]) -> Generator[Tensor, None, None]:
        """As `Rows`, on the device, two batches ahead of the one that is asked for.

        What goes wrong in the thread is raised here. The thread ends with the generator.
        """
        batches = self._rows.batches(order)
        waiting: deque[Future[Sent]] = deque()

        def one() -> Sent:
            return self._lane.send(next(batches))

        # The thread ends before what it reads is closed.
        with closing(batches), ThreadPoolExecutor(1, "pixels") as pool:
            try:
                for _ in order:
                    waiting.append(pool.submit(one))
                    if len(waiting) > AHEAD:
                        yield self._lane.receive(waiting.popleft().result())
                while waiting:
                    yield self._lane.receive(waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()


def moved(order: Iterable[Tensor | slice], where: torch.device) -> list[Tensor | slice]:
    """The same indices on the device, moved there all at once."""
    order = list(order)
    tensors = [index for index in order if isinstance(index, Tensor)]
    if where.type == "cpu" or not tensors:
        return order
    near = iter(upload(torch.cat(tensors), where).split([len(index) for index in tensors]))
    return [index if isinstance(index, slice) else next(near) for index in order]


def placed(
    part: PixelSet,
    name: str,
    where: torch.device,
    log: Log,
    free: Callable[[torch.device], int] = device.free,
) -> PixelSet:
    """The part with its rows where the device reaches them best; on the CPU they stay.

    Args:
        part: Rows on the CPU.
        name: Of the part, for a person.
        where: The device that will train.
        say: Takes a line for a person.
        free: Bytes of its memory that could be taken.
    """
    if where.type == "cpu" or not len(part):
        return part
    size, room = len(part) * part.pixels[:1].nbytes, int(SHARE * free(where))
    if size <= room:
        try:
            near = replace(part, pixels=GpuRows(part.pixels, where))
        except torch.OutOfMemoryError:
            room = 0
        else:
            log(f"pixels: {len(part):,} {name} photos lie on the GPU: {disk_cache.gigabytes(size)}")
            return near
    log(
        f"pixels: {len(part):,} {name} photos are copied to the GPU batch by batch: their "
        f"{disk_cache.gigabytes(size)} are more than {SHARE:.0%} of what it has free"
    )
    return replace(part, pixels=PrefetchedRows(part.pixels, where))
