"""Runs a graph: uint8 pixels in, logits and features out. ONNX Runtime on CPU, CUDA, TensorRT.

Every exported graph keeps one contract (see `OnnxRuntime.run`), so nothing above this file knows
which device or engine answers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from serving.errors import BundleError, OptionError, WorkError
from serving.imaging.preprocess import Pixels
from serving.utils.files import user_cache_folder

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read while onnxruntime is imported
import onnxruntime as ort

Floats = npt.NDArray[np.float32]

PROVIDERS: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_ERRORS_ONLY: Final = 3
_log = logging.getLogger("bentoml.fledge")


class Runtime(Protocol):
    """What the predictor needs of an engine. `run` may be called from several threads at once."""

    provider: str
    """What really runs: an ONNX Runtime provider's name, or such as "torchscript-cpu"."""

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """Pixels uint8 [N, H, W, 3], RGB -> logits [N, classes] and features [N, width]."""
        ...


class OnnxRuntime:
    """An ONNX graph on the asked-for device, or not at all.

    provider: the name of the execution provider that took the graph.
    """

    def __init__(
        self, graph: Path, *, device: str = "auto", threads: int = 1, data: bytes | None = None
    ) -> None:
        """Load `graph`.

        Args:
            graph: An ONNX file in the graph contract.
            data: Its bytes, where they were read already; the file is then only named.
            device: cpu, cuda, tensorrt; auto takes CUDA where it works, else the CPU, and logs it.
            threads: Cores that one `run` uses on a CPU.

        Raises:
            OptionError: The asked-for device is not there.
            BundleError: The file is no graph, or not one in the contract.
        """
        if device not in ("auto", *PROVIDERS):
            raise OptionError(f"device = {device!r}: use auto, {', '.join(PROVIDERS)}")
        self._session = _open(graph, data or str(graph), device, threads)
        self.provider: str = self._session.get_providers()[0]
        _check_contract(graph, self._session)

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """Run the graph over a batch. Safe to call from several threads at once.

        Args:
            pixels: uint8 [N, H, W, 3], RGB, N at least 1.

        Returns:
            logits float32 [N, classes], features float32 [N, width].

        Raises:
            WorkError: The engine failed: out of memory, a lost device.
        """
        feed = {"pixels": np.ascontiguousarray(pixels)}
        try:
            logits, features = self._session.run(["logits", "features"], feed)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise WorkError(f"{self.provider} failed: {_first_line(error)}") from error
        return logits, features


def on_cpu(provider: str) -> bool:
    """Whether a runtime with this `provider` computes on the CPU."""
    return provider in (PROVIDERS["cpu"], "torchscript-cpu")


def expected(device: str) -> str:
    """The provider that `OnnxRuntime` will most likely have, told without loading anything."""
    if device == "auto":
        device = "cpu" if _why_not("cuda") else "cuda"
    return PROVIDERS.get(device, device)


def require(device: str) -> None:
    """Find out, without loading anything, that a device which was asked for by name can't be had.

    Raises:
        OptionError: It can't. That it can is known when a graph runs on it.
    """
    reason = _why_not(device) if device in ("cuda", "tensorrt") else None
    if reason is not None:
        raise _missing(device, reason)


def _missing(device: str, reason: str) -> OptionError:
    return OptionError(
        f"device = {device}: {reason}; install onnxruntime-gpu[cuda,cudnn] and an NVIDIA driver "
        f"that fits, or use device cpu"
    )


def _open(graph: Path, data: bytes | str, device: str, threads: int) -> ort.InferenceSession:
    """Only what was asked for is tried: a CPU service never touches a GPU."""
    if device == "cpu":
        return _session(graph, data, "cpu", threads)
    wanted = "cuda" if device == "auto" else device
    reason = _why_not(wanted)
    if reason is None:
        session = _session(graph, data, wanted, threads)
        # The list of available providers promises much and a failed load raises nothing;
        # only the session itself knows what it runs on.
        if session.get_providers()[0] == PROVIDERS[wanted]:
            return session
        reason = f"ONNX Runtime could not load {PROVIDERS[wanted]}"
    if device == "auto":
        _log.info("device auto: serving on the CPU (%s)", reason)
        return _session(graph, data, "cpu", threads)
    raise _missing(device, reason)


def _session(graph: Path, data: bytes | str, device: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Threads that spin between runs take their cores from the threads that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [PROVIDERS["cpu"]]
    if device != "cpu":
        # TF32 would move fp32 answers beyond the parity that the bundle states. The search for the
        # fastest convolution is made once a shape; `buckets` has them all come while loading.
        cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
        providers.insert(0, (PROVIDERS["cuda"], cuda))
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    if device == "tensorrt":
        providers.insert(0, (PROVIDERS["tensorrt"], _tensorrt_options()))
    try:
        return ort.InferenceSession(data, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise BundleError(f"{graph} can't be loaded: {_first_line(error)}") from error


def _tensorrt_options() -> dict[str, str]:
    """Engines take minutes to build: they are kept for the next start, where that is safe."""
    try:
        home = user_cache_folder() / "tensorrt"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.stat()
        # Engines are code. In a folder that others may write they are anybody's.
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise OSError(f"{home} is not this user's alone")
    except (OSError, RuntimeError) as error:
        _log.info("TensorRT engines are built anew at each start: %s", error)
        return {}
    on = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
    return {**on, "trt_engine_cache_path": str(home)}


def _why_not(device: str) -> str | None:
    """Why a GPU device can't work here, told without making ONNX Runtime try and complain."""
    if PROVIDERS[device] not in ort.get_available_providers():
        return f"this onnxruntime is built without {PROVIDERS[device]}"
    if sys.platform == "win32":
        return None  # the driver's library has another name there; let the session tell
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count:
        return "the NVIDIA driver sees no GPU"
    return None


def _check_contract(graph: Path, session: ort.InferenceSession) -> None:
    takes = [(item.name, item.type) for item in session.get_inputs()]
    gives = {item.name: item.type for item in session.get_outputs()}
    floats = {"logits": "tensor(float)", "features": "tensor(float)"}
    if takes != [("pixels", "tensor(uint8)")] or not floats.items() <= gives.items():
        raise BundleError(
            f"{graph} is not in the graph contract: it takes {takes} and gives {gives}; "
            "export the model again"
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
