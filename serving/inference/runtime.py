"""Run ONNX graphs on uint8 pixels, with ONNX Runtime on CPU, CUDA or TensorRT.

All graphs have the inputs and outputs that `Runtime.run` describes. `OnnxRuntime` runs a graph;
`PaddedBatchRuntime` pads the batches for a GPU to a few sizes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from serving.errors import BundleError, OptionError, WorkError
from serving.imaging.preprocess import Pixels
from serving.inference import onnx_check
from serving.terminal import quote_path
from serving.utils.files import make_user_cache_folder

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before the import
import onnxruntime as ort

Floats = npt.NDArray[np.float32]

PROVIDERS: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
BATCH_SIZES: Final = (1, 2, 4, 8, 16)
"""Default batch sizes of `PaddedBatchRuntime`."""
_FATAL_ONLY: Final = (
    4  # log_severity_level; errors are raised, and their text has names of the graph
)
_OUTPUTS: Final = ["logits", "features"]
_log = logging.getLogger("bentoml.fledge")


class Runtime(Protocol):
    """Interface of the classes that run a graph. `run` is thread-safe."""

    provider: str
    """Execution provider of ONNX Runtime, or "torchscript-cpu" or "torchscript-cuda"."""

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """Run the graph on a batch.

        Args:
            pixels: uint8 [N, H, W, 3], RGB, N at least 1.

        Returns:
            Logits, float32 [N, classes], and features (the input of the classifier layer), float32
            [N, D].

        Raises:
            WorkError: The backend failed, for example because memory ran out or a device was lost.
        """
        ...


class OnnxRuntime:
    """An ONNX graph in an inference session of ONNX Runtime.

    Attributes:
        provider: Execution provider that runs the graph, such as "CPUExecutionProvider".
    """

    def __init__(
        self, graph: Path, *, device: str = "auto", threads: int = 1, data: bytes | None = None
    ) -> None:
        """Load `graph`.

        Args:
            graph: Path of an ONNX file whose graph has the inputs and outputs of `Runtime.run`.
            data: Content of the file, if it is in memory already; the path is then used in messages
                only. None: the file is read.
            device: cpu, cuda, tensorrt or auto. auto: CUDA if it works, else the CPU; the reason
                for the CPU is logged.
            threads: CPU threads of one `run`.

        Raises:
            OptionError: The device is not available.
            BundleError: The file is not an ONNX graph, keeps weights in another file, or has other
                inputs or outputs.
        """
        if device not in ("auto", *PROVIDERS):
            raise OptionError(f"device = {device!r}: use auto, {', '.join(PROVIDERS)}")
        data = graph.read_bytes() if data is None else data
        onnx_check.check(graph, data)
        self._session = _open(graph, data, device, threads)
        self._run_options = ort.RunOptions()
        self.provider: str = self._session.get_providers()[0]
        _check_contract(graph, self._session)

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        inputs = {"pixels": np.ascontiguousarray(pixels)}
        try:
            logits, features = self._session.run(_OUTPUTS, inputs, self._run_options)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise WorkError(f"{self.provider} failed: {_first_line(error)}") from error
        return logits, features

    def stop(self) -> None:
        """Make the runs in progress, and all later ones, fail before their next operator."""
        self._run_options.terminate = True


class PaddedBatchRuntime:
    """Wrapper of a GPU runtime that pads every batch to one of a few batch sizes.

    The first run of a batch size is slow: CUDA searches for the fastest convolutions, which takes
    seconds, or TensorRT builds an engine, which can take minutes. Therefore all batch sizes are run
    once at the start.

    Attributes:
        provider: Execution provider of the wrapped runtime.
    """

    def __init__(self, inner: Runtime, size: int, sizes: Sequence[int] = BATCH_SIZES) -> None:
        """Run the graph once at every batch size, on zeros.

        Args:
            inner: Runtime of the graph.
            size: Side of the graph's square input, in pixels.
            sizes: Batch sizes, ascending. A batch larger than the last size is padded to a multiple
                of the last size.

        Raises:
            WorkError: The runtime failed, for example because the largest batch needs too much
                memory.
        """
        self._inner, self._sizes = inner, tuple(sizes)
        self.provider = inner.provider
        for rows in self._sizes:
            inner.run(np.zeros((rows, size, size, 3), np.uint8))

    def run(self, pixels: Pixels) -> tuple[Floats, Floats]:
        rows = len(pixels)
        largest = self._sizes[-1]
        padded = next((s for s in self._sizes if s >= rows), -(-rows // largest) * largest)
        if padded > rows:
            batch = np.zeros((padded, *pixels.shape[1:]), np.uint8)
            batch[:rows] = pixels
            pixels = batch
        logits, features = self._inner.run(pixels)
        return logits[:rows], features[:rows]

    def stop(self) -> None:
        """As `OnnxRuntime.stop`, if the wrapped runtime can be stopped."""
        stop_runs(self._inner)


def stop_runs(engine: Runtime) -> None:
    """Stop the runs of a runtime, if it can be stopped (TorchScript can't)."""
    if isinstance(engine, OnnxRuntime | PaddedBatchRuntime):
        engine.stop()


def on_cpu(provider: str) -> bool:
    """Return whether a runtime with this `provider` computes on the CPU."""
    return provider in (PROVIDERS["cpu"], "torchscript-cpu")


def expected(device: str) -> str:
    """Predict which execution provider `OnnxRuntime` will use on `device`, without loading a graph.

    The prediction is wrong if a provider that is installed fails to load.
    """
    if device == "auto":
        device = "cpu" if _why_not("cuda") else "cuda"
    return PROVIDERS.get(device, device)


def require(device: str) -> None:
    """Check without loading a graph that a device is available.

    The check looks for the execution provider, the NVIDIA driver and a GPU. Loading a graph may
    still fail afterwards.

    Raises:
        OptionError: `device` is cuda or tensorrt, and it is not available.
    """
    reason = _why_not(device) if device in ("cuda", "tensorrt") else None
    if reason is not None:
        raise _missing(device, reason)


def _missing(device: str, reason: str) -> OptionError:
    return OptionError(
        f"device = {device}: {reason}; install onnxruntime-gpu[cuda,cudnn] and a matching NVIDIA "
        f"driver, or use device cpu"
    )


def _open(graph: Path, data: bytes, device: str, threads: int) -> ort.InferenceSession:
    """Create an inference session on `device`. For device cpu, no GPU library is loaded."""
    if device == "cpu":
        return _session(graph, data, "cpu", threads)
    wanted = "cuda" if device == "auto" else device
    reason = _why_not(wanted)
    if reason is None:
        session = _session(graph, data, wanted, threads)
        # A provider that is listed as available may fail to load, without an exception; the session
        # then runs on the next provider.
        if session.get_providers()[0] == PROVIDERS[wanted]:
            return session
        reason = f"ONNX Runtime could not load {PROVIDERS[wanted]}"
    if device == "auto":
        _log.info("device auto: serving on the CPU (%s)", reason)
        return _session(graph, data, "cpu", threads)
    raise _missing(device, reason)


def _session(graph: Path, data: bytes, device: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    # Threads that spin between runs would take the cores from the threads that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # ONNX Runtime would recognise its own format, too, which `onnx_check` does not know.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    providers: list[Any] = [PROVIDERS["cpu"]]
    if device != "cpu":
        # TF32 would move fp32 probabilities beyond the bundle's tolerance. The exhaustive search
        # runs once per input shape; `PaddedBatchRuntime` runs all shapes at the start.
        cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
        providers.insert(0, (PROVIDERS["cuda"], cuda))
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    if device == "tensorrt":
        providers.insert(0, (PROVIDERS["tensorrt"], _tensorrt_options()))
    try:
        return ort.InferenceSession(data, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise BundleError(f"{graph} can't be loaded", details=_first_line(error)) from error


def _tensorrt_options() -> dict[str, str]:
    """Return the provider options that cache TensorRT engines in the user's cache folder.

    An engine takes minutes to build. Without a private cache folder, the options are empty.
    """
    try:
        folder = make_user_cache_folder() / "tensorrt"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        # Engines are executable code: other users must not be able to write them.
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise OSError(
                f"{folder} is accessible to other users; run `chmod 700 {quote_path(folder)}`"
            )
    except (OSError, RuntimeError) as error:
        _log.info("TensorRT engines are built anew at each start: %s", error)
        return {}
    return {
        "trt_engine_cache_enable": "1",
        "trt_timing_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
    }


def _why_not(device: str) -> str | None:
    """Return the reason why a GPU device is not available, or None if no reason is found.

    No inference session is created. Therefore the device may still fail if the result is None.
    """
    if PROVIDERS[device] not in ort.get_available_providers():
        return f"this onnxruntime is built without {PROVIDERS[device]}"
    if sys.platform == "win32":
        return None  # the driver's library has another name on Windows; the session will fail
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
            f"{graph} breaks the graph contract: its inputs are {takes}, its outputs {gives}; "
            "export the model again"
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
