"""Communication between the processes of a run in data-parallel training.

Every process executes the same code on its own shard of every batch. Random draws are not sent,
because every process computes the same draws from the recipe's seed. Process 0 decides and
broadcasts the values that depend on the machine, such as the run folder or the learning rate that a
range test selected. Only process 0, the main process, writes files and log lines.
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
"""Number of seconds that all processes but process 0 wait before they report an error. If the error
occurs in all processes, process 0 is therefore the one that reports it."""

_FAILED: Final = "fledge/failed"
_NEW: Final = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_NO_BUFFERS: Final[dict[str, Any]] = {
    # torch 2.15 warns of the old name; earlier versions do not have the new name.
    "forward_sync_buffers" if _NEW else "broadcast_buffers": False
}

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, and the rank of the current process among them.

    `SINGLE_PROCESS` is the group for training without torchrun.

    Attributes:
        rank: Number of this process among all processes, from 0.
        size: Number of processes.
        local_rank: Number of this process among the processes of its machine, from 0.
        cpu_group: gloo group with a long timeout, for messages other than gradients and losses.
            None in a single process.
        store: Key-value store of the rendezvous. The first process that fails stores its rank
            there. None in a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cpu_group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0, the only process that writes files and log lines."""
        return self.rank == 0

    @property
    def gpu(self) -> int | None:
        """Index of the GPU that this process uses.

        In a single process the index is None, which stands for torch's current GPU.
        """
        return self.local_rank if self.size > 1 else None

    def shard(self, index: Tensor) -> Tensor:
        """Return this process's shard of a batch.

        A batch with fewer than two photos per process is not split, because BatchNorm needs at
        least two photos. Every process then gets the whole batch.

        Args:
            index: Indices of the batch's photos, int64 [n].
        """
        return index if len(index) < 2 * self.size else index[self.rank :: self.size]

    def loss_weight(self, count: int, batch: int) -> float:
        """Return the factor by which to multiply the mean loss over this process's shard.

        The mean of the multiplied losses over the processes is the mean loss over the whole batch.

        Args:
            count: Number of photos in this process's shard.
            batch: Number of photos in the whole batch.
        """
        return 1.0 if batch < 2 * self.size else self.size * count / batch

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap the module in `DistributedDataParallel` (DDP).

        If there is only one process, the module is returned unchanged.

        Wrap the module anew at the start of every epoch. DDP chooses the order in which it sums
        gradients during its first steps, and rounding depends on this order. A run that is resumed
        after an epoch starts with a new DDP wrapper; the uninterrupted run must do the same to
        reach bit-identical weights.
        """
        if self.size == 1:
            return module
        # No broadcast of BatchNorm statistics at each step: the training loop averages them after
        # each epoch.
        return DistributedDataParallel(module, **_NO_BUFFERS)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of the tensor over all processes, bit-identical in all processes."""
        if self.size == 1:
            return values
        found = values.detach().clone()
        dist.all_reduce(found)
        return found

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of the tensor over all processes, bit-identical in all processes."""
        return values if self.size == 1 else self.total(values) / self.size

    def global_loss(self, loss: Tensor, count: int) -> Tensor:
        """Return the mean loss over the whole batch, for a backward pass in this process.

        The value is the same in all processes. The backward pass computes a gradient from the
        photos of this process's shard only; the mean of these gradients over the processes is the
        gradient of the mean loss.

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
        """Return whether `flag` is true in any of the processes."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count, group=self.cpu_group)
        return bool(count.item())

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """Call `make` in process 0 only, and return its result in all processes."""
        if self.size == 1:
            return make()
        objects: list[Any] = [make() if self.is_main_process else None]
        dist.broadcast_object_list(objects, src=0, group=self.cpu_group)
        return cast(T, objects[0])

    def check_same(self, own: Mapping[str, str]) -> None:
        """Check that this process has the same values as process 0.

        Args:
            own: The values of this process. Each key describes its value in the error message.

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
        """Wait until all processes have called this method.

        The timeout is the long one of `cpu_group`. In a single process, nothing is done.
        """
        if self.size > 1:
            dist.barrier(group=self.cpu_group)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Return a context manager whose block is run first by one process of each machine.

        The other processes wait until these processes have left the block, then run it too.
        """
        if self.local_rank:
            self.wait_for_everyone()
        yield
        if not self.local_rank:
            self.wait_for_everyone()

    def broadcast_module(self, module: nn.Module) -> None:
        """Copy the weights and buffers of process 0's module to the modules of all processes.

        The module must be on the CPU.
        """
        if self.size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0, group=self.cpu_group)

    def seed(self, seed: int) -> None:
        """Seed torch with a different number in each process, for different dropout masks.

        In process 0 the random state is not changed.
        """
        if self.rank:
            torch.manual_seed(seed + self.rank * 2**32)  # a recipe's seed is below 2**32

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collect the named tensors of all processes in process 0.

        Args:
            own: The tensors of this process. No two processes may use the same name.

        Returns:
            In process 0 the tensors of all processes; {} in the other processes.
        """
        if self.size == 1:
            return dict(own)
        found: list[Any] | None = [None] * self.size if self.is_main_process else None
        dist.gather_object(dict(own), found, dst=0, group=self.cpu_group)
        return {key: value for part in found or () for key, value in part.items()}

    @contextmanager
    def broadcast_files(self, folder: Path, names: Sequence[str]) -> Iterator[Path]:
        """Return a context manager that copies files from process 0 to the other processes.

        Inside the context, the yielded folder contains the files. In process 0 it is `folder`
        itself; in the other processes it is a temporary folder.

        Args:
            folder: Folder of the files in process 0.
            names: Names of the files. Files that do not exist in process 0 are skipped.
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
        """Wait for all processes, then end the communication between the processes."""
        if self.size > 1:
            self.wait_for_everyone()
            dist.destroy_process_group()

    def on_main_process(self, log: Log) -> Log:
        """Return `log` in process 0, and a function that discards its argument in the others."""
        return log if self.is_main_process else _discard

    def should_report_error(self) -> bool:
        """Return whether this process is the first that failed and so must report its error.

        Call this method once, after an error.
        """
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
    """Return a context in which backward passes do not synchronise gradients between processes.

    The gradients are accumulated; the first backward pass after the context synchronises their sum.
    """
    if isinstance(module, DistributedDataParallel):
        return cast(AbstractContextManager[None], module.no_sync())
    return nullcontext()


def _discard(line: str) -> None:
    pass
