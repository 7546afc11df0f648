"""Tensors on their way to the device, without the program waiting for it.

A plain `.to(device)` from ordinary memory holds the program until the GPU has done all that was
asked of it before. From page-locked ("pinned") memory a copy is an order like any other.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Final, Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")

cuda_capture_lock: Final = threading.Lock()
"""Held while a CUDA graph is recorded, which what another thread asks of the GPU would end."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, behind what the device has yet to do; itself if it is there."""
    if tensor.device.type == device.type or device.type != "cuda":
        return tensor.to(device)
    # The pinned copy may be let go at once: torch uses it again when the GPU has read it.
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A few numbers, float32 [n], made once for each device; not to be written to."""
    with torch.inference_mode(False):  # or training could not use what validation made
        return torch.tensor(values, dtype=torch.float32, device=device)


def filled(batch: Tensor, size: int) -> Tensor:
    """On a GPU the batch with zeros behind it, `size` in all; elsewhere, or larger, as it is.

    cuDNN looks for kernels at every new shape, and makes those of depthwise convolutions: two
    seconds for MobileNetV2 (H100). For networks in eval mode, in which no photo sees the others.
    """
    return batch if batch.device.type == "cpu" else fill_up(batch, size)


def fill_up(batch: Tensor, size: int) -> Tensor:
    """The batch with zeros behind it, in its own layout, by which cuDNN chooses, too."""
    if len(batch) >= size:
        return batch
    whole = batch.new_empty_strided((size, *batch.shape[1:]), batch.stride()).zero_()
    whole[: len(batch)] = batch
    return whole


def free(device: torch.device) -> int:
    """Bytes of a GPU's memory that could be taken now, those that torch keeps in reserve too."""
    in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + in_reserve


Sent = tuple[Tensor, torch.Event | None]
"""A tensor that is on its way, and what tells that it is there."""


class DeviceCopier(Protocol):
    """A way to the device: one thread sends, another one receives."""

    def send(self, tensor: Tensor) -> Sent:
        """Begin to copy a tensor from the CPU."""
        ...

    def receive(self, sent: Sent) -> Tensor:
        """The copy, for whatever this thread asks of the device from now on."""
        ...


class CpuCopy:
    """No way to go: the CPU's own tensors."""

    def send(self, tensor: Tensor) -> Sent:
        """As `DeviceCopier`."""
        return tensor, None

    def receive(self, sent: Sent) -> Tensor:
        """As `DeviceCopier`."""
        return sent[0]


class SideStream:
    """Copies from pinned memory, on a stream of their own beside the computing."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Sent:
        """As `DeviceCopier`."""
        with cuda_capture_lock, torch.cuda.stream(self._stream):
            near = tensor.pin_memory().to(self._device, non_blocking=True)
            return near, self._stream.record_event()

    def receive(self, sent: Sent) -> Tensor:
        """As `DeviceCopier`."""
        near, there = sent
        stream = torch.cuda.current_stream(self._device)
        if there is not None:
            stream.wait_event(there)
        # Or its memory would be given away while this stream still reads it.
        near.record_stream(stream)
        return near


def device_copier(device: torch.device) -> DeviceCopier:
    """The way to a device."""
    return SideStream(device) if device.type == "cuda" else CpuCopy()
