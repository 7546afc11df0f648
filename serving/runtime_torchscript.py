"""The TorchScript twin of `OnnxRuntime`: the one file of this room that may import torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import BundleError, OptionError, WorkError
from serving.preprocess import Pixels
from serving.runtime import Floats


class TorchScriptRuntime:
    """A TorchScript graph in the same contract as the ONNX one.

    TorchScript files hold code: open one only after its sha256 matched a manifest that is trusted
    (`serving.bundle.read` does that).

    provider: "torchscript-" and the device.
    """

    def __init__(self, graph: Path, *, device: str = "cpu") -> None:
        """Load `graph`.

        Args:
            graph: A TorchScript file; uint8 [N, H, W, 3] -> (logits, features).
            device: cpu or cuda.

        Raises:
            OptionError: The asked-for device is not there, or torch is not installed.
            BundleError: The file can't be loaded.
        """
        try:
            import torch
        except ImportError as error:
            raise OptionError("TorchScript needs torch; install fledge[train]") from error
        if device not in ("cpu", "cuda"):
            raise OptionError(f"device = {device!r}: TorchScript runs on cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise OptionError("device = cuda: torch sees no GPU; use device cpu")
        self._torch = torch
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                # Deprecated in torch's newest releases and still what mobile and C++ users load.
                warnings.simplefilter("ignore", FutureWarning)
                load: Any = torch.jit.load  # untyped in some releases
                module = load(str(graph), map_location=self._device)
        except (OSError, RuntimeError, ValueError) as error:
            raise BundleError(f"{graph} can't be loaded as TorchScript") from error
        self._module = module.eval()
        self.provider = f"torchscript-{device}"

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """As `OnnxRuntime.run`."""
        torch = self._torch
        try:
            with torch.inference_mode():
                rows = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
                logits, features = self._module(rows)
                return logits.cpu().numpy(), features.cpu().numpy()
        except RuntimeError as error:
            raise WorkError(f"{self.provider} failed: {str(error).splitlines()[0]}") from error
