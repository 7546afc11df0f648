"""What a run computes in, and where."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from serving.errors import OptionError


@dataclass(frozen=True)
class Precision:
    """What the forward pass computes in."""

    dtype: torch.dtype
    device: torch.device

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which layers run in `dtype`."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )


def choose_precision(device: str, precision: str, gpu: int | None = None) -> Precision:
    """Turn the device and precision asked for into what this machine has.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: "auto", "fp32" or "bf16".
        gpu: Number of the GPU to take, which becomes the current one; the current one as it is
            where not given.

    Raises:
        OptionError: CUDA was asked for and is not there; fewer GPUs than `gpu` needs.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise OptionError("--device cuda: no usable GPU here; use --device cpu or auto")
    where = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    if where.type == "cuda" and gpu is not None:
        count = torch.cuda.device_count()
        if gpu >= count:
            raise OptionError(
                f"process {gpu} of this machine finds no GPU, since it has {count}: start it with "
                f"--nproc-per-node {count}, or use --device cpu"
            )
        where = torch.device("cuda", gpu)
        torch.cuda.set_device(where)
    if precision == "auto":
        precision = "bf16" if _has_bf16(where) else "fp32"
    return Precision(torch.bfloat16 if precision == "bf16" else torch.float32, where)


def _has_bf16(where: torch.device) -> bool:
    """Whether `where` computes in bfloat16 itself: elsewhere it is emulated, and slower.

    A torch that can't tell what the processor has counts as one without.
    """
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
