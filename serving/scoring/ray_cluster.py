"""Connect to a Ray cluster, and run tasks in a pool of Ray actors.

This is the only module that imports ray. Ray's own messages are suppressed. Errors and lost
machines are reported in one line each.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Final

from serving.errors import OptionError, WorkError
from serving.utils.cpu import cores
from serving.utils.optional_packages import require

ADDRESS: Final = "RAY_ADDRESS"
AUTH: Final = "RAY_AUTH_MODE"
LOCAL: Final = "local"
_connections: Final[list[str]] = []
"""Address of the cluster that this module connected to; empty if there is no connection."""
_CONNECT_SECONDS: Final = 5.0
"""Timeout of the TCP connection to the head node of the cluster."""
_NODE_CHECK_SECONDS: Final = 2.0
"""Shortest time between two checks for lost machines."""


def check_installed() -> None:
    """Check that the package ray is installed.

    Raises:
        OptionError: The package ray is not installed.
    """
    require("ray", "--engine ray", "pip install 'ray[data]'")


def connect(device: str, workers: int | None) -> ActorPool:
    """Connect to a Ray cluster, or start one on this machine.

    The environment variable RAY_ADDRESS has the address of the cluster. If it is not set, a cluster
    is started.

    Args:
        device: auto, cpu, cuda or tensorrt; auto uses GPUs if the cluster has any.
        workers: Number of actors; None: one for each CPU core, or for each GPU.

    Returns:
        The size and resources of the actor pool. The actors are started by `ActorPool.map`.

    Raises:
        OptionError: RAY_ADDRESS is a URL. Only HOST:PORT is supported.
        WorkError: The cluster can't be reached or has no CPUs or no GPUs, or this process is
            already connected to a cluster.
    """
    address = os.environ.get(ADDRESS) or LOCAL
    # Ray reads these when it is imported or starts its processes.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if "://" in address:
        raise OptionError(
            f"{ADDRESS}={address}: use HOST:PORT of the cluster's head, on a machine of the cluster"
        )
    _check_reachable(address)
    ray: Any = importlib.import_module("ray")
    if ray.is_initialized():
        raise WorkError(
            "--engine ray: this process is connected to a cluster already; call ray.shutdown() "
            "first"
        )
    _connections.append(address)
    own = {"num_cpus": workers or cores(), "include_dashboard": False}
    try:
        with _silence_stderr():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if address == LOCAL else {}),
            )
        resources = ray.cluster_resources()
    except Exception as error:  # Ray raises many unrelated classes
        failure = _work_error(f"can't join the cluster {address}", error)
        raise WorkError(f"{failure}{'' if address == LOCAL else _token_hint()}") from error
    gpus = math.floor(resources.get("GPU", 0))
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    units = math.floor(resources.get("CPU", 0)) if device == "cpu" else gpus
    if not units and not (workers and device == "cpu"):
        kind = "CPUs" if device == "cpu" else "GPUs"
        raise WorkError(f"--engine ray: no {kind} in the cluster {address}; see `ray status`")
    count = workers or units
    if device == "cpu":
        return ActorPool(device, count, 1, {"num_cpus": 1})
    # Each GPU gets the same number of actors. CPU cores are not reserved for them.
    per_gpu = math.ceil(count / gpus)
    threads = _threads(ray.nodes(), per_gpu)
    return ActorPool(device, count, threads, {"num_cpus": 0, "num_gpus": 1 / per_gpu})


def disconnect() -> None:
    """Stop all actors of this job, even if they are running a task.

    A cluster that was started by `connect` is stopped too.
    """
    if _connections:
        _connections.clear()
        sys.modules["ray"].shutdown()


def put(value: Any) -> Any:
    """Copy a value to Ray's object store, and return a reference that all machines can read."""
    return importlib.import_module("ray").put(value)


def get(reference: Any) -> Any:
    """Return the value of a reference that `put` returned."""
    return importlib.import_module("ray").get(reference)


@dataclass(frozen=True)
class ActorPool:
    """Size and resources of a pool of Ray actors. The actors are started by `map`.

    Attributes:
        device: cpu, cuda or tensorrt.
        workers: Number of actors.
        threads: Number of threads of each actor.
        resources: Resources of each actor, as keyword arguments of Ray (`num_cpus`, `num_gpus`).
    """

    device: str
    workers: int
    threads: int
    resources: dict[str, float]

    def map(
        self,
        worker: type,
        config: Any,
        tasks: list[dict[str, Any]],
        log: Callable[[str], None],
    ) -> Generator[dict[str, Any], None, None]:
        """Run tasks on the actors, and yield the results in the order of completion.

        Args:
            worker: Class of the actors. Each actor calls `worker(config)` once, and the resulting
                object with each task.
            config: Argument of `worker`.
            tasks: The tasks. The list is cleared.
            log: Function that is called with each line for the user.

        Raises:
            WorkError: An actor or the cluster failed, and Ray's retries failed too.
        """
        data: Any = importlib.import_module("ray.data")
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        workers = min(self.workers, len(tasks))
        check_nodes = _LostNodes(log)
        try:
            with redirect_stdout(_SilentStream(sys.stdout)):
                source = data.from_items(tasks, override_num_blocks=len(tasks))
                results = source.map(
                    worker,
                    fn_constructor_args=(config,),
                    compute=data.ActorPoolStrategy(size=workers),
                    **self.resources,
                )
                tasks.clear()  # frees the memory, as Ray has a copy
                for result in results.iter_rows():
                    check_nodes()
                    yield result
        except Exception as error:  # Ray raises many unrelated classes
            raise _work_error("the actors failed", error) from error


class _LostNodes:
    """Callable that logs each machine that has left the cluster.

    The cluster is checked at most every `_NODE_CHECK_SECONDS` (2 s).
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._next = log, 0.0
        self._nodes = self._alive()

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _NODE_CHECK_SECONDS
        nodes = self._alive()
        for node in self._nodes.keys() - nodes.keys():
            self._log(f"lost {self._nodes[node]}: its unfinished tasks are done by other machines")
        self._nodes = nodes

    def _alive(self) -> dict[str, str]:
        """Return the address of each machine in the cluster, by node id."""
        nodes = importlib.import_module("ray").nodes()
        return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}


class _SilentStream(io.TextIOBase):
    """Wrapper of standard output that discards text written by Ray's threads.

    For example, these threads report when Ray retries a task.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return int(self._stream.write(text))

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Redirect file descriptor 2 (standard error) to /dev/null within the block.

    Ray's start writes messages to it, whatever log level is set.
    """
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _check_reachable(address: str) -> None:
    """Check that a TCP connection to the cluster is possible.

    Ray itself would retry for a long time before it reports an error.

    Raises:
        WorkError: No connection is possible.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise WorkError(
            f"--engine ray: can't reach the cluster {address}: {error}; see {ADDRESS}"
        ) from error


def _token_hint() -> str:
    """Return a hint about the cluster's authentication token.

    It is appended to connection errors, because Ray's message does not mention the token.
    """
    if os.environ.get(AUTH, "").lower() == "token":
        return (
            f"; {AUTH}=token: compare the token with that of the head, "
            "`ray get-auth-token` prints both"
        )
    return f"; a cluster with a token (Ray's default) needs {AUTH}=token and the token here"


def _threads(nodes: list[dict[str, Any]], per_gpu: int) -> int:
    """Return the number of CPU cores for each actor, with `per_gpu` actors on each GPU.

    If this number differs between the machines with GPUs, the smallest is returned.
    """
    shares = [
        node["Resources"].get("CPU", 1) / (node["Resources"]["GPU"] * per_gpu)
        for node in nodes
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
    ]
    return max(1, math.floor(min(shares, default=1)))


def _work_error(what: str, error: Exception) -> WorkError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else type(error).__name__
    return WorkError(f"--engine ray: {what}: {reason}")
