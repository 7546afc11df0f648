"""What is told where a container has too little shared memory; nothing but NCCL needs it."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from serving.errors import WorkError
from training.distributed import torchrun
from training.distributed.process_group import ProcessGroup

ROOT = Path(__file__).parents[3]
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, unhandled system "
    "error, NCCL version 2.26.2\nncclSystemError: System call (e.g. socket, malloc) or external "
    "library call failed or device error.\nLast error:\nError while creating shared memory segment "
    "/dev/shm/nccl-NJv5Xg (size 9637888), error: No space left on device (28)"
)


def test_too_little_shared_memory_is_told_with_the_option_of_the_container(monkeypatch):
    monkeypatch.setattr(torchrun, "_has_several_processes", lambda: True)
    monkeypatch.setattr(torchrun, "_rendezvous", ProcessGroup)
    with (
        pytest.raises(WorkError, match="start the container with --shm-size=1g"),
        torchrun.init_process_group(),
    ):
        raise dist.DistBackendError(NCCL)


def test_nothing_else_uses_shared_memory():
    """No workers of a DataLoader, whose batches go through /dev/shm, and no shared memory of ours.

    `tests/surroundings` runs every command with the 64 MB of a container.
    """
    users = re.compile(r"DataLoader\(|SharedMemory\(|import multiprocessing|torch\.multiprocessing")
    modules = [
        path for room in ("serving", "training", "export") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(modules) > 100
    assert [path for path in modules if users.search(path.read_text(encoding="utf-8"))] == []
