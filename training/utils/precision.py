"""Choose the device and the floating-point dtype of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from serving.errors import OptionError


@dataclass(frozen=True)
class Precision:
    """Device and dtype of a run.

    Attributes:
        dtype: dtype of the forward pass: float32 or bfloat16.
        device: The device.
    """

    dtype: torch.dtype
    device: torch.device

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which torch runs the layers in `dtype`."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )


def choose_precision(device: str, precision: str, gpu: int | None = None) -> Precision:
    """Choose the device and dtype by options and hardware.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        precision: "auto" (bfloat16 if the device has bfloat16 instructions), "fp32" or "bf16".
        gpu: Index of the GPU to use; it is made the current GPU. None: the current GPU.

    Raises:
        OptionError: `device` is "cuda" but no GPU is usable, or there is no GPU with index `gpu`.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise OptionError("--device cuda: no usable GPU here; use --device cpu or auto")
    chosen = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    if chosen.type == "cuda" and gpu is not None:
        count = torch.cuda.device_count()
        if gpu >= count:
            raise OptionError(
                f"process {gpu} of this machine has no GPU of its own: the machine has {count}; "
                f"start with --nproc-per-node {count}, or use --device cpu"
            )
        chosen = torch.device("cuda", gpu)
        torch.cuda.set_device(chosen)
    if precision == "auto":
        precision = "bf16" if _has_native_bf16(chosen) else "fp32"
    return Precision(torch.bfloat16 if precision == "bf16" else torch.float32, chosen)


def _has_native_bf16(device: torch.device) -> bool:
    """Return whether `device` has bfloat16 instructions; emulated bfloat16 is slower than float32.

    The result is False if this version of torch can't tell what the CPU supports.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
