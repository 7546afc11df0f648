"""How processes that torchrun started come together as one run, and how they end.

torchrun tells each of them by its environment who it is, and ends all of them when one has failed.
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

STEP: Final = timedelta(minutes=10)
"""How long a process waits for the others within an epoch, where all have the same work."""

PATIENCE: Final = timedelta(hours=12)
"""How long it waits between epochs, while another one decodes photos or saves."""


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started together; `SINGLE_PROCESS` where it started none.

    An error that all of them meet is told by one: it is raised there, and the others end silently.

    Raises:
        WorkError: Another process is gone, and told nothing.
    """
    if not _started_together():
        yield SINGLE_PROCESS
        return
    process_group = _join()
    try:
        yield process_group
    except (Exception, KeyboardInterrupt) as error:
        if not process_group.first_to_fail():
            status = error.exit_status if isinstance(error, FledgeError) else 1
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else status) from None
        if lost(error):
            raise WorkError(
                "another process of the run ended, or can't be reached; if nothing above says "
                "why, torchrun does below"
            ) from error
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse(verb: str) -> None:
    """Stop a verb that torchrun started more than once.

    Raises:
        OptionError: Names the verb.
    """
    if not _started_together():
        return
    if os.environ["RANK"] != "0":
        raise SystemExit(OptionError.exit_status)
    raise OptionError(f"fledge {verb} is for one process: start it without torchrun")


def sync_batchnorms(classifier: Classifier) -> None:
    """Have BatchNorms behind the frozen prefix see the photos of all processes, as GPUs can.

    Weights, statistics and their names stay the same. The prefix is left alone, since only plain
    BatchNorms can be folded into the layers before them.
    """
    body = classifier.body
    for name in list(body._modules)[classifier.freezing.prefix :]:
        body._modules[name] = nn.SyncBatchNorm.convert_sync_batchnorm(body._modules[name])
    classifier.head = nn.SyncBatchNorm.convert_sync_batchnorm(classifier.head)


def lost(error: BaseException) -> bool:
    """Whether it says that another process can't be reached any more."""
    told = isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    return told or isinstance(error, dist.DistError)


def _started_together() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _join() -> ProcessGroup:
    if not dist.is_available():
        raise OptionError("this torch has no torch.distributed: start fledge without torchrun")
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=STEP))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
    cpu_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    return ProcessGroup(rank, size, int(os.environ.get("LOCAL_RANK", "0")), cpu_group, store)
