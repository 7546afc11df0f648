"""Child processes that start in milliseconds, forked from a server that has imported torch.

`two_processes` runs a function in two processes that torch.distributed connects. Their environment
is the one that torchrun sets, and the store of their rendezvous lives in the test's process, as
with torchrun it lives in torchrun's. tests/training/distributed/test_real_torchrun.py starts
torchrun itself.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

TIMEOUT = 300  # seconds

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["fledge", "training.engine.finetune", "matplotlib.backends.backend_agg", __name__]
)


@dataclass(frozen=True)
class Ended:
    """A process that has ended; the status is negative after a signal, as in `subprocess`."""

    status: int
    stdout: str
    stderr: str


def start(folder: Path, function: Callable[..., int | None], *args: Any, **env: str) -> BaseProcess:
    """Start a process that runs a function, and exits with its result.

    Args:
        folder: Folder for the files `stdout` and `stderr`.
        function: Function that can be imported by its name.
        args: Arguments of the function.
        env: Further environment variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _SERVER.Process(target=_run, args=(folder, {**os.environ, **env}, function, args))
    process.start()
    return process


def _run(
    folder: Path, env: dict[str, str], function: Callable[..., int | None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.exit(function(*args))


def end(process: BaseProcess, folder: Path, timeout: float = TIMEOUT) -> Ended:
    """Wait for a process that `start` returned; one that exceeds the timeout is killed."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def two_processes(
    folder: Path, function: Callable[..., int | None], *args: Any
) -> tuple[Ended, Ended]:
    """Run a function in the two processes of a job; returns both after their end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    folders = [folder / str(rank) for rank in (0, 1)]
    started = [
        start(path, function, *args, RANK=path.name, LOCAL_RANK=path.name, **common)
        for path in folders
    ]
    deadline = time.monotonic() + TIMEOUT
    first, second = (
        end(process, path, max(0.0, deadline - time.monotonic()))
        for process, path in zip(started, folders, strict=True)
    )
    return first, second
