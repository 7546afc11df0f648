"""A Ray cluster: joined or started, and actors on it that tasks go through. No other file has ray.

Ray says much on the way; what matters of it is said here in a line.
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
_joined: Final[list[str]] = []
"""The cluster that this process has joined here, and so may leave."""
_PATIENCE: Final = 5.0
"""Seconds to wait for a cluster's door."""
_LOOK: Final = 2.0
"""Seconds between looks at who is still there."""


def check() -> None:
    """Refuse to begin where ray is missing.

    Raises:
        OptionError: It is.
    """
    require("ray", "--engine ray", "pip install 'fledge[ray]'")


def join(device: str, workers: int | None) -> ActorPool:
    """Join the cluster of RAY_ADDRESS, or start one that is this machine.

    Args:
        device: cpu, cuda or tensorrt; auto takes GPUs where there are any.
        workers: Actors; None takes one for each core, or for each GPU.

    Raises:
        OptionError: An address of another kind.
        WorkError: No cluster there, or nothing in it to work on.
    """
    address = os.environ.get(ADDRESS) or LOCAL
    # Read while ray is imported or its processes start.
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
        raise WorkError("--engine ray: this process is in a cluster already; leave that first")
    _joined.append(address)
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
    except Exception as error:  # of many kinds, and none of them is ours
        lost = _lost(f"can't join the cluster {address}", error)
        raise WorkError(f"{lost}{'' if address == LOCAL else _token()}") from error
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
    # Actors that share GPUs must fit on them evenly. Their cores are not reserved.
    each = math.ceil(count / gpus)
    return ActorPool(
        device, count, _threads(ray.nodes(), each), {"num_cpus": 0, "num_gpus": 1 / each}
    )


def leave() -> None:
    """End what was started for this job, actors in the middle of a task included."""
    if _joined:
        _joined.clear()
        sys.modules["ray"].shutdown()


def share(value: Any) -> Any:
    """Give a value to all machines; it is had by `shared` of what this returns."""
    return importlib.import_module("ray").put(value)


def shared(reference: Any) -> Any:
    """As `share`."""
    return importlib.import_module("ray").get(reference)


@dataclass(frozen=True)
class ActorPool:
    """Actors to be.

    device: cpu, cuda or tensorrt. workers: how many; threads: that each should use.
    resources: of each, as Ray names them.
    """

    device: str
    workers: int
    threads: int
    resources: dict[str, float]

    def map(
        self,
        kind: type,
        job: Any,
        tasks: list[dict[str, Any]],
        say: Callable[[str], None],
    ) -> Generator[dict[str, Any], None, None]:
        """Results of `kind(job)(task)` in the order in which they come.

        Raises:
            WorkError: An actor or the cluster failed in a way that trying again does not mend.
        """
        data: Any = importlib.import_module("ray.data")
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        workers = min(self.workers, len(tasks))
        watch = _Watch(say)
        try:
            with redirect_stdout(_SilentStream(sys.stdout)):
                source = data.from_items(tasks, override_num_blocks=len(tasks))
                done = source.map(
                    kind,
                    fn_constructor_args=(job,),
                    compute=data.ActorPoolStrategy(size=workers),
                    **self.resources,
                )
                tasks.clear()  # Ray has them now
                for row in done.iter_rows():
                    watch()
                    yield row
        except Exception as error:  # of many kinds, and none of them is ours
            raise _lost("the actors failed", error) from error


class _Watch:
    """Tells when a machine is gone."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._next = say, 0.0
        self._there = self._alive()

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK
        there = self._alive()
        for node in self._there.keys() - there.keys():
            self._say(f"lost {self._there[node]}: what it had not finished goes to others")
        self._there = there

    def _alive(self) -> dict[str, str]:
        nodes = importlib.import_module("ray").nodes()
        return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}


class _SilentStream(io.TextIOBase):
    """Standard output without Ray's reports of processes that ended and are tried again."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        """Pass on what is not Ray's."""
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return int(self._stream.write(text))

    def flush(self) -> None:
        """As the stream's."""
        self._stream.flush()


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Nothing on the process's standard error, where Ray tells that it was told to be quiet."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_reachable(address: str) -> None:
    """Ray waits long for a door that does not open."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise WorkError(
            f"--engine ray: can't reach the cluster {address}: {error}; see {ADDRESS}"
        ) from error


def _token() -> str:
    """What to look at where Ray says no more than that it could not connect."""
    if os.environ.get(AUTH, "").lower() == "token":
        return f"; {AUTH}=token: is the token that of the head? `ray get-auth-token` tells both"
    return f"; a cluster with a token, as Ray makes them, needs {AUTH}=token, and its token here"


def _threads(nodes: list[dict[str, Any]], each: int) -> int:
    """Cores for each of the actors that share a GPU, on the machine with the fewest."""
    shares = [
        node["Resources"].get("CPU", 1) / (node["Resources"]["GPU"] * each)
        for node in nodes
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
    ]
    return max(1, math.floor(min(shares, default=1)))


def _lost(what: str, error: Exception) -> WorkError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[-1] if lines else type(error).__name__
    return WorkError(f"--engine ray: {what}: {why}")
