"""Copies from the CPU to a GPU that do not block the CPU, and padding of batches.

A `.to(device)` from pageable memory blocks until the GPU has finished all work queued before. A
copy from page-locked ("pinned") memory is queued like a kernel.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Final, Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")

cuda_capture_lock: Final = threading.Lock()
"""Held during CUDA graph capture; other threads must not use the device."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, queued behind its other work; no copy if it is there already."""
    if tensor.device.type == device.type or device.type != "cuda":
        return tensor.to(device)
    # The pinned copy may be dropped at once: torch reuses it only after the GPU has read it.
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 tensor [n] of `values`, cached for each device; read-only."""
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def pad_on_gpu(batch: Tensor, size: int) -> Tensor:
    """The batch, padded by `pad_batch` if it is on a GPU; unchanged on a CPU.

    For each new shape cuDNN selects kernels and compiles those of depthwise convolutions, which
    takes two seconds for MobileNetV2 on an H100. Padding avoids this. Use it only for networks in
    eval mode, where rows are independent.
    """
    return batch if batch.device.type == "cpu" else pad_batch(batch, size)


def pad_batch(batch: Tensor, size: int) -> Tensor:
    """The batch, padded by zeros to `size` rows; unchanged if it has as many or more.

    Keeps the memory layout, because cuDNN's choice of kernels also depends on it.
    """
    if len(batch) >= size:
        return batch
    padded = batch.new_empty_strided((size, *batch.shape[1:]), batch.stride()).zero_()
    padded[: len(batch)] = batch
    return padded


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that can be allocated now, torch's unused reserve included."""
    in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + in_reserve


Transfer = tuple[Tensor, torch.Event | None]
"""The target tensor of a copy in progress, and the event recorded at its end."""


class DeviceCopier(Protocol):
    """Copies tensors to a device; one thread calls `send`, another one `receive`."""

    def send(self, tensor: Tensor) -> Transfer:
        """Start the copy of a CPU tensor."""
        ...

    def receive(self, transfer: Transfer) -> Tensor:
        """The copy, ordered before all work that this thread queues on the device from now on."""
        ...


class CpuCopy:
    """No-op copier for CPU tensors."""

    def send(self, tensor: Tensor) -> Transfer:
        return tensor, None

    def receive(self, transfer: Transfer) -> Tensor:
        return transfer[0]


class StreamCopier:
    """Copies from pinned memory on a CUDA stream of its own, in parallel with computation."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Transfer:
        with cuda_capture_lock, torch.cuda.stream(self._stream):
            copy = tensor.pin_memory().to(self._device, non_blocking=True)
            return copy, self._stream.record_event()

    def receive(self, transfer: Transfer) -> Tensor:
        copy, done = transfer
        stream = torch.cuda.current_stream(self._device)
        if done is not None:
            stream.wait_event(done)
        # Otherwise the allocator could reuse the memory while this stream still reads it.
        copy.record_stream(stream)
        return copy


def device_copier(device: torch.device) -> DeviceCopier:
    """The copier for a device."""
    return StreamCopier(device) if device.type == "cuda" else CpuCopy()
