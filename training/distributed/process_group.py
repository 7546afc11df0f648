"""Data-parallel training: the processes of one run, and what they send each other.

Every process executes the same code on its own shard of every batch. Random draws come from the
recipe's seed, so they need not be sent. Values that depend on the machine (a learning rate that
lr_find picked, the number of cached views, the run's folder) are decided by process 0 and
broadcast. Only process 0, the main process, writes files and log lines.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from serving.errors import DataError
from training.utils.console import Log

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

REPORT_DELAY: Final = 0.5
"""Seconds that all processes but process 0 wait before they report an error, so that process 0
reports errors that occur in all processes."""

_FAILED: Final = "fledge/failed"
_NEW: Final = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_NO_BUFFERS: Final[dict[str, Any]] = {
    # torch 2.15 warns of the old name; earlier versions do not have the new name.
    "forward_sync_buffers" if _NEW else "broadcast_buffers": False
}

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """One process's view of the processes of a run; `SINGLE_PROCESS` is a group of one.

    Attributes:
        rank: This process's number, from 0.
        size: Number of processes.
        local_rank: This process's number on its machine, from 0.
        cpu_group: gloo group with a long timeout, for control messages.
        store: Key-value store of the rendezvous; the first process that fails registers there.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cpu_group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run's files and log lines."""
        return self.rank == 0

    @property
    def gpu(self) -> int | None:
        """Index of this process's GPU on its machine; in a single process None: the current GPU."""
        return self.local_rank if self.size > 1 else None

    def shard(self, index: Tensor) -> Tensor:
        """This process's shard of a batch of photos `index`, int64 [n].

        BatchNorm needs at least two photos. A batch with fewer than two per process is not split:
        every process gets the whole batch, and the mean over the processes is the same.
        """
        return index if len(index) < 2 * self.size else index[self.rank :: self.size]

    def loss_weight(self, count: int, batch: int) -> float:
        """Weight of this rank's mean loss, such that the mean over ranks is the batch's mean.

        Args:
            count: Number of photos in this process's shard.
            batch: Number of photos in the whole batch.
        """
        return 1.0 if batch < 2 * self.size else self.size * count / batch

    def wrap(self, module: nn.Module) -> nn.Module:
        """`DistributedDataParallel` around the module; the module itself in a single process.

        Wrap the module anew for every epoch, because DDP sums gradients in buckets, in the order in
        which its first step produced them, and a resumed run must use the same order.
        """
        if self.size == 1:
            return module
        # No broadcast of BatchNorm statistics at each step: the training loop averages them after
        # each epoch.
        return DistributedDataParallel(module, **_NO_BUFFERS)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, bit-identical in all of them."""
        if self.size == 1:
            return values
        found = values.detach().clone()
        dist.all_reduce(found)
        return found

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, bit-identical in all of them."""
        return values if self.size == 1 else self.total(values) / self.size

    def global_loss(self, loss: Tensor, count: int) -> Tensor:
        """The mean loss over the batch of all processes, with the gradient of this shard's share.

        Args:
            loss: Mean loss over the photos of this process's shard; a scalar.
            count: Number of photos in this process's shard.
        """
        if self.size == 1:
            return loss
        sums = self.total(torch.stack([loss.detach() * count, loss.new_tensor(count)]).double())
        own = loss * (self.size * count / sums[1].item())
        # The second term is exactly 0 and only adds its gradient, so that the loss is the same in
        # all processes.
        return (sums[0] / sums[1]).to(loss.dtype) + (own - own.detach())

    def any_true(self, flag: bool) -> bool:
        """Whether `flag` is true in any of the processes."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count, group=self.cpu_group)
        return bool(count.item())

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """The result of `make()` in process 0; the other processes do not call `make`."""
        if self.size == 1:
            return make()
        objects: list[Any] = [make() if self.is_main_process else None]
        dist.broadcast_object_list(objects, src=0, group=self.cpu_group)
        return cast(T, objects[0])

    def check_same(self, own: Mapping[str, str]) -> None:
        """Check that values are the same as in process 0; `own` is description -> value.

        Raises:
            DataError: A value differs; the message names the value and the machine.
        """
        expected = self.broadcast_object(lambda: own)
        different = [what for what, value in own.items() if value != expected[what]]
        if different:
            raise DataError(
                f"{different[0]} on {socket.gethostname()} (process {self.rank}) is not what "
                "process 0 has; give all processes the same"
            )

    def wait_for_everyone(self) -> None:
        """A barrier, with the long timeout of `cpu_group`."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The first process of each machine runs the block before the others of that machine."""
        if self.local_rank:
            self.wait_for_everyone()
        yield
        if not self.local_rank:
            self.wait_for_everyone()

    def broadcast_module(self, module: nn.Module) -> None:
        """Overwrite the weights and buffers of a module on the CPU by those of process 0."""
        if self.size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0, group=self.cpu_group)

    def seed(self, seed: int) -> None:
        """Seed torch differently in each process (dropout masks); unchanged in process 0."""
        if self.rank:
            torch.manual_seed(seed + self.rank * 2**32)  # a recipe's seed is below 2**32

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes, in process 0; the names must differ between processes."""
        if self.size == 1:
            return dict(own)
        found: list[Any] | None = [None] * self.size if self.is_main_process else None
        dist.gather_object(dict(own), found, dst=0, group=self.cpu_group)
        return {key: value for part in found or () for key, value in part.items()}

    @contextmanager
    def broadcast_files(self, folder: Path, names: Sequence[str]) -> Iterator[Path]:
        """Copy files of process 0's `folder` to the other processes; yields where they can be read.

        Process 0 reads its own folder; the other processes get a temporary folder. Files that do
        not exist in process 0 are skipped.
        """
        if self.size == 1:
            yield folder
            return
        paths = {name: folder / name for name in names}
        sizes = self.broadcast_object(
            lambda: {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
        )
        with tempfile.TemporaryDirectory(prefix="fledge-resume-") as temporary:
            here = folder if self.is_main_process else Path(temporary)
            for name, size in sizes.items():
                data = np.empty(size, np.uint8)
                if self.is_main_process:
                    data[:] = np.fromfile(here / name, np.uint8)
                dist.broadcast(torch.from_numpy(data), src=0, group=self.cpu_group)
                if not self.is_main_process:
                    (here / name).parent.mkdir(parents=True, exist_ok=True)
                    data.tofile(here / name)
            yield here

    def destroy(self) -> None:
        """Wait for all processes, then end communication between them."""
        if self.size > 1:
            self.wait_for_everyone()
            dist.destroy_process_group()

    def on_main_process(self, log: Log) -> Log:
        """`log` in process 0; a function that discards the line in other processes."""
        return log if self.is_main_process else _discard

    def should_report_error(self) -> bool:
        """Whether this is the first process that failed, which reports the error."""
        if self.store is None:
            return True
        if not self.is_main_process:
            time.sleep(REPORT_DELAY)
        own = str(self.rank)
        try:
            return bool(self.store.compare_set(_FAILED, "", own) == own.encode())
        except RuntimeError:  # process 0, which has the store, has exited
            return False


SINGLE_PROCESS: Final = ProcessGroup()


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which gradients accumulate locally; a later backward pass sends their sum."""
    if isinstance(module, DistributedDataParallel):
        return cast(AbstractContextManager[None], module.no_sync())
    return nullcontext()


def _discard(line: str) -> None:
    pass
