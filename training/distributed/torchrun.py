"""Processes started by torchrun: join the process group, report errors once, exit.

torchrun sets the rank and the address of the rendezvous in each process's environment, and ends all
processes when one fails.
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
"""Timeout of collectives within an epoch, where all processes have the same work."""

CONTROL_TIMEOUT: Final = timedelta(hours=12)
"""Timeout of control messages, which wait while another process decodes photos or saves."""


@contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """The process group of torchrun's processes; `SINGLE_PROCESS` without torchrun.

    An error that occurs in several processes is raised in the first of them; the others exit
    without a message.

    Raises:
        WorkError: The connection to another process is lost.
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
        if is_connection_error(error):
            raise WorkError(
                "another process of the run exited, or can't be reached; if there is no reason "
                "above, see torchrun's report below"
            ) from error
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def require_single_process(verb: str) -> None:
    """Exit if torchrun started several processes; only process 0 prints the error.

    Raises:
        OptionError: Several processes were started; the message names the subcommand.
    """
    if not _has_several_processes():
        return
    if os.environ["RANK"] != "0":
        raise SystemExit(OptionError.exit_status)
    raise OptionError(f"fledge {verb} runs in one process: start it without torchrun")


def sync_batchnorms(classifier: Classifier) -> None:
    """Replace the BatchNorms after the frozen layers by `SyncBatchNorm`, which needs GPUs.

    Weights, statistics and their names stay the same. The frozen layers keep plain BatchNorms,
    because only those can be fused into the preceding layers.
    """
    body = classifier.body
    for name in list(body._modules)[classifier.freezing.prefix :]:
        body._modules[name] = nn.SyncBatchNorm.convert_sync_batchnorm(body._modules[name])
    classifier.head = nn.SyncBatchNorm.convert_sync_batchnorm(classifier.head)


def is_connection_error(error: BaseException) -> bool:
    """Whether the error means that another process can't be reached any more."""
    backend = isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    return backend or isinstance(error, dist.DistError)


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
