"""Functions for processes started by torchrun: join the process group, report errors only once.

torchrun sets environment variables with the rank of the process and the address of the rendezvous.
If one process fails, torchrun ends all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final, cast

import torch
import torch.distributed as dist
from torch import nn

from serving.errors import FledgeError, OptionError, WorkError
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.models.classifier import Classifier

STEP_TIMEOUT: Final = timedelta(minutes=10)
"""Timeout of collective operations within an epoch, where all processes have equal work."""

CONTROL_TIMEOUT: Final = timedelta(hours=12)
"""Timeout of all other messages. It is long because a process can wait for another process that
decodes photos or saves a checkpoint."""


@contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """Join the group of the processes that torchrun started, and return a context manager.

    The context manager yields the group; without torchrun, or with a single process, it yields
    `SINGLE_PROCESS`. If the block fails in several processes, only the first of these processes
    raises its error; the others exit without a message.

    Raises:
        WorkError: The connection to another process was lost inside the block, or there was too
            little shared memory.
        OptionError: This build of torch has no `torch.distributed`.
    """
    if not _has_several_processes():
        yield SINGLE_PROCESS
        return
    process_group = _rendezvous()
    try:
        yield process_group
    except (Exception, KeyboardInterrupt) as error:
        if not process_group.should_report_error():
            status = error.exit_status if isinstance(error, FledgeError) else 1
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else status) from None
        if is_shared_memory_error(error):
            raise WorkError(
                "NCCL has too little shared memory, which containers limit to 64 MB: start the "
                "container with --shm-size=1g"
            ) from error
        if is_connection_error(error):
            raise WorkError(
                "another process of the run exited, or can't be reached; if there is no reason "
                "above, see torchrun's report below"
            ) from error
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def require_single_process(verb: str) -> None:
    """Check that torchrun did not start several processes.

    Args:
        verb: Name of the subcommand, for the error message.

    Raises:
        OptionError: Several processes were started; raised in process 0.
        SystemExit: Several processes were started; raised in the other processes.
    """
    if not _has_several_processes():
        return
    if os.environ["RANK"] != "0":
        raise SystemExit(OptionError.exit_status)
    raise OptionError(f"fledge {verb} runs in one process: start it without torchrun")


def sync_batchnorms(classifier: Classifier) -> None:
    """Replace the BatchNorms after the frozen layers by `SyncBatchNorm`, which needs a GPU.

    Names and values of weights and statistics stay the same. The frozen layers keep their
    BatchNorms, because a SyncBatchNorm can't be fused with the layer before it.
    """
    body = classifier.body
    for name in list(body._modules)[classifier.freezing.prefix :]:
        body._modules[name] = nn.SyncBatchNorm.convert_sync_batchnorm(body._modules[name])
    classifier.head = nn.SyncBatchNorm.convert_sync_batchnorm(classifier.head)


def is_connection_error(error: BaseException) -> bool:
    """Return whether the error means that the connection to another process was lost."""
    backend = isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    return backend or isinstance(error, dist.DistError)


def is_shared_memory_error(error: BaseException) -> bool:
    """Return whether NCCL has found no room in /dev/shm, by which GPUs of a machine exchange data.

    Nothing else uses shared memory.
    """
    return isinstance(error, RuntimeError) and "/dev/shm" in str(error)


def _has_several_processes() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _rendezvous() -> ProcessGroup:
    if not dist.is_available():
        raise OptionError("this torch has no torch.distributed: start fledge without torchrun")
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=STEP_TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    cpu_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    return ProcessGroup(rank, size, int(os.environ.get("LOCAL_RANK", "0")), cpu_group, store)
