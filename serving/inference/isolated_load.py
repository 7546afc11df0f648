"""Load a bundle where it can be stopped: within limits of time and memory, in a child process.

A graph can compute without end, or allocate more memory than there is, while it is loaded or while
its golden images are predicted. ONNX Runtime can't be interrupted at every point, and a process
that runs out of memory is killed. Therefore a service loads a new bundle in a child process first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from serving.bundle.storage import Bundle
from serving.errors import BundleError, FledgeError, OptionError
from serving.utils.cpu import cores
from serving.utils.memory import free_memory
from serving.utils.process import be_ended_first, end_with_parent

LOAD_SECONDS: Final = 60.0
"""Time limit of loading a bundle and predicting its golden images on a CPU."""
GPU_LOAD_SECONDS: Final = 1200.0
"""The same on a GPU, where TensorRT may build an engine for each batch size."""

_BASE_MEMORY: Final = 2**31  # bytes for the images between the layers
_COPIES: Final = 8  # of the graph file, in memory
_MEMORY_SHARE: Final = 0.8  # of the free memory
_POLL_SECONDS: Final = 0.05
_ROOT: Final = Path(__file__).resolve().parents[2]
_CODE: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from serving.inference.isolated_load import main; main(sys.argv[2])"
)


class LoadStopped(Exception):
    """Loading was stopped, because its result is no longer needed."""


def run(
    task: str,
    folder: Path,
    *,
    seconds: float | None = None,
    share: int = 1,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[str]:
    """Run `open_predictor` or `verify` of `serving.inference.load` in a child process.

    Args:
        task: "open_predictor" or "verify".
        folder: The bundle.
        seconds: Time limit. None: `LOAD_SECONDS`, or `GPU_LOAD_SECONDS` for a GPU.
        share: Number of processes that load at the same time and share the memory.
        stop: Function that is called often, and returns True to stop the child process.
        options: Further arguments of the function.

    Returns:
        The result of `verify`; for `open_predictor`, the version of the bundle.

    Raises:
        BundleError, OptionError: The function's error; or the bundle took too long or too much
            memory.
        LoadStopped: `stop` returned True.
    """
    limit = seconds or load_seconds(options.get("device", "cpu"))
    request = {"task": task, "folder": str(folder), "seconds": limit, "share": share}
    request["parent"] = os.getpid()
    command = [sys.executable, "-P", "-c", _CODE, str(_ROOT), json.dumps(request | options)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C ends this process, which ends the child
    )
    try:
        output = _wait(child, folder, limit, stop)
    finally:
        child.kill()
        child.communicate()
    return _result(output, child.returncode, folder)


def load_seconds(device: str) -> float:
    """Return the default time limit of loading a bundle on a device."""
    return LOAD_SECONDS if _on_cpu(device) else GPU_LOAD_SECONDS


def _on_cpu(device: str) -> bool:
    if device == "cpu":
        return True
    from serving.inference import runtime  # imports ONNX Runtime

    return runtime.on_cpu(runtime.expected(device))


def _wait(
    child: subprocess.Popen[bytes], folder: Path, limit: float, stop: Callable[[], bool]
) -> bytes:
    end = time.monotonic() + limit
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=_POLL_SECONDS)[0]
        if stop():
            raise LoadStopped
        if time.monotonic() > end:
            raise _timeout(folder, limit)


def _result(output: bytes, status: int, folder: Path) -> list[str]:
    try:
        result = json.loads(output)
        kind, lines, details = result["error"], result["lines"], result["details"]
    except (ValueError, LookupError):
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        with suppress(ValueError):
            how = signal.Signals(-status).name
        raise BundleError(
            f"{folder} must not be served here: the process that loaded it ended with {how}; its "
            "graph is damaged or needs too much memory"
        ) from None
    if kind:
        raise (OptionError if kind == "OptionError" else BundleError)(*lines, details=details)
    return list(lines)


def _timeout(folder: Path, seconds: float) -> BundleError:
    return BundleError(
        f"{folder} must not be served here: it was not loaded within {seconds:g} s; "
        "FLEDGE_LOAD_TIMEOUT sets the limit"
    )


def main(arguments: str) -> None:
    """Run a task in this process, which is the child process of `run`, and print its result."""
    request = json.loads(arguments)
    out = os.dup(1)
    os.dup2(2, 1)  # libraries print, too
    end_with_parent()
    if os.getppid() != request.pop("parent"):
        return  # it has ended before
    error, lines, details = "", [], ""
    try:
        lines = _run_task(request)
    except FledgeError as raised:
        error, details = type(raised).__name__, raised.details
        lines = [str(line) for line in raised.args]
    except Exception as raised:  # MemoryError, and others of libraries
        error, details = "BundleError", f"{type(raised).__name__}: {raised}"[:1000]
        lines = [f"{request['folder']} can't be loaded"]
    with os.fdopen(out, "w") as file:
        json.dump({"error": error, "lines": lines, "details": details}, file)
        file.flush()
        os._exit(0)  # without the time that libraries take to end


def _run_task(request: Mapping[str, Any]) -> list[str]:
    from serving.inference import load

    options = dict(request)
    task, folder = options.pop("task"), Path(options.pop("folder"))
    seconds, share = options.pop("seconds"), options.pop("share")
    if _on_cpu(options.get("device", "cpu")):
        _limit_cpu_seconds(seconds)
        be_ended_first()
        options["before_load"] = lambda bundle: limit_memory(memory_needed(bundle), share)
    if task == "verify":
        return load.verify(folder, **options)
    return [load.open_predictor(folder, **options).manifest.version]


def memory_needed(bundle: Bundle) -> int:
    """Return the number of bytes within which a graph of the bundle must be loaded on a CPU."""
    sizes = [bundle.manifest.files[name]["bytes"] for name in bundle.manifest.graphs]
    return _BASE_MEMORY + _COPIES * max(sizes)


def limit_memory(needed: int, share: int = 1) -> Callable[[], None]:
    """Limit the memory that this process may allocate from now on; only on Linux.

    Args:
        needed: Number of bytes; fewer if less memory is free.
        share: Number of processes that share the free memory.

    Returns:
        A function that removes the limit.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    import resource

    status = Path("/proc/self/status").read_text()
    allocated = next(line.split()[1] for line in status.splitlines() if line.startswith("VmData"))
    more = min(needed, int(_MEMORY_SHARE * free_memory() / share))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = 1024 * int(allocated) + more
    limit = min([limit, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _limit_cpu_seconds(seconds: float) -> None:
    """Limit the CPU time of this process, in case the parent process is gone."""
    import resource

    most = int(seconds * cores()) + 5
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def limits(
    folder: Path, device: str, seconds: float | None = None
) -> Iterator[Callable[[Bundle], None]]:
    """Load a bundle in this process, which ends with an error message if it takes too long.

    Yields the argument `before_load` of `open_predictor`, which limits the memory of the block.

    Args:
        folder: The bundle.
        device: cpu, cuda, tensorrt or auto.
        seconds: Time limit; None: as for `run`.
    """
    done = threading.Event()
    seconds = seconds or load_seconds(device)
    remove: list[Callable[[], None]] = []

    def watch() -> None:
        if not done.wait(seconds):
            error = _timeout(folder, seconds)
            os.write(2, f"fledge: {error}\n".encode(errors="backslashreplace"))
            os._exit(error.exit_status)

    def limit(bundle: Bundle) -> None:
        if _on_cpu(device):
            remove.append(limit_memory(memory_needed(bundle)))

    threading.Thread(target=watch, name="fledge-load-limit", daemon=True).start()
    try:
        yield limit
    finally:
        done.set()
        for function in remove:
            function()
