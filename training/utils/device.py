"""Helpers for GPUs: copy tensors to a GPU without blocking the CPU, pad batches, read free memory.

`tensor.to(device)` from pageable memory blocks until the GPU has finished all work that is already
in its queue. A copy from page-locked ("pinned") memory is only added to the queue, like a kernel.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Final, Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")

cuda_capture_lock: Final = threading.Lock()
"""Lock held during the capture of a CUDA graph, when other threads must not use the GPU."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without blocking the CPU.

    The copy is added to the queue of the GPU. A tensor that is on the device already is returned as
    it is.
    """
    if tensor.device.type == device.type or device.type != "cuda":
        return tensor.to(device)
    # The pinned copy may be dropped at once: torch reuses it only after the GPU has read it.
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a float32 tensor [n] with the given values on the device.

    The tensor is cached and shared between callers, and so must not be changed.
    """
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def pad_on_gpu(batch: Tensor, size: int) -> Tensor:
    """Pad a batch on a GPU with zeros to `size` photos; return a batch on a CPU unchanged.

    Padding avoids new batch shapes. For each new shape cuDNN selects kernels, and must compile the
    kernels for depthwise convolutions. This takes two seconds for MobileNetV2 on an H100. Pad only
    inputs of networks in eval mode, where the photos of a batch do not influence each other's
    outputs.
    """
    return batch if batch.device.type == "cpu" else pad_batch(batch, size)


def pad_batch(batch: Tensor, size: int) -> Tensor:
    """Pad a batch with zeros to `size` photos; return it unchanged if it has `size` or more.

    The padded batch has the same memory layout (such as channels-last), because the layout also
    influences which kernels cuDNN selects.
    """
    if len(batch) >= size:
        return batch
    padded = batch.new_empty_strided((size, *batch.shape[1:]), batch.stride()).zero_()
    padded[: len(batch)] = batch
    return padded


def free_memory(device: torch.device) -> int:
    """Return the number of bytes of GPU memory that can be allocated now.

    Memory that torch has reserved but does not use is included.
    """
    in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + in_reserve


Transfer = tuple[Tensor, torch.Event | None]
"""The target tensor of a copy in progress, and the CUDA event that marks the end of the copy (None
on a CPU)."""


class DeviceCopier(Protocol):
    """Copier of CPU tensors to a device; one thread may call `send` and another one `receive`."""

    def send(self, tensor: Tensor) -> Transfer:
        """Start the copy of a CPU tensor to the device."""
        ...

    def receive(self, transfer: Transfer) -> Tensor:
        """Return the copy on the device.

        Work that this thread queues on the device from now on is executed after the copy has ended.
        """
        ...


class CpuCopy:
    """Copier for the device "cpu": it returns the tensors without a copy."""

    def send(self, tensor: Tensor) -> Transfer:
        return tensor, None

    def receive(self, transfer: Transfer) -> Tensor:
        return transfer[0]


class StreamCopier:
    """Copier to a GPU that uses a CUDA stream of its own, in parallel with computation."""

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
    """Return a copier for the given device."""
    return StreamCopier(device) if device.type == "cuda" else CpuCopy()
