"""Runtime for TorchScript graphs. It imports torch when a graph is loaded.

No other module of `serving` imports torch.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import BundleError, OptionError, WorkError
from serving.imaging.preprocess import Pixels
from serving.inference.runtime import Floats


class TorchScriptRuntime:
    """A TorchScript graph with the inputs and outputs of `Runtime.run`.

    A TorchScript file contains code. Load only a file whose sha256 matches a trusted manifest;
    `serving.bundle.storage.read` checks this.

    Attributes:
        provider: "torchscript-cpu" or "torchscript-cuda".
    """

    def __init__(
        self, graph: Path, *, device: str = "cpu", threads: int = 0, data: bytes | None = None
    ) -> None:
        """Load `graph`.

        Args:
            graph: Path of a TorchScript file: uint8 [N, H, W, 3] -> (logits, features).
            device: cpu, cuda or auto. auto: CUDA if torch finds a GPU, else the CPU.
            threads: CPU threads of one `run`, set for the whole process; 0: torch's default.
            data: Content of the file, if it is in memory already; the path is then used in messages
                only. None: the file is read.

        Raises:
            OptionError: The device is not available, or torch is not installed.
            BundleError: The file can't be loaded.
        """
        try:
            import torch
        except ImportError as error:
            raise OptionError("TorchScript needs torch; pip install torch") from error
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda"):
            raise OptionError(f"device = {device!r}: TorchScript runs on cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise OptionError("device = cuda: torch sees no GPU; use device cpu")
        if threads:
            torch.set_num_threads(threads)
        if device == "cuda":
            # TF32 would move fp32 probabilities beyond the bundle's tolerance.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self._torch = torch
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                # The newest torch releases deprecate TorchScript, but mobile and C++ users load it.
                warnings.simplefilter("ignore", FutureWarning)
                load: Any = torch.jit.load  # untyped in some releases
                content = graph.read_bytes() if data is None else data
                module = load(io.BytesIO(content), map_location=self._device)
        except (OSError, RuntimeError, ValueError) as error:
            raise BundleError(f"{graph} can't be loaded as TorchScript") from error
        self._module = module.eval()
        self.provider = f"torchscript-{device}"

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        torch = self._torch
        try:
            with torch.inference_mode():
                rows = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
                logits, features = self._module(rows)
                return logits.cpu().numpy(), features.cpu().numpy()
        except RuntimeError as error:
            raise WorkError(f"{self.provider} failed: {str(error).splitlines()[0]}") from error
