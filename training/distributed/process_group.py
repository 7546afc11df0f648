"""Several processes train as one: which part each takes, what they agree on, and who speaks.

Each goes the same way through the run on its own part of every batch. What is drawn is drawn from
the seed, so nothing of it needs to be sent. What the machine decides (a rate that was found, views
that there is room for, a folder's name) process 0 decides for all. It alone writes and speaks.
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

COURTESY: Final = 0.5
"""Seconds that process 0 has to tell a mistake that all of them find."""

_FAILED: Final = "fledge/failed"
_NEW: Final = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_NO_BUFFERS: Final[dict[str, Any]] = {
    # torch 2.15 warns of the old name, and those before it know no other.
    "forward_sync_buffers" if _NEW else "broadcast_buffers": False
}

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, as one of them sees them; `SINGLE_PROCESS` has no others and does nothing.

    rank: its number. size: how many there are. local: its number on its machine. calm: for what may
    take long, and is on the CPU. store: where the first that fails says so.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    cpu_group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    @property
    def gpu(self) -> int | None:
        """The number of its GPU among its machine's; None for the only process, which has any."""
        return self.local if self.size > 1 else None

    def part(self, index: Tensor) -> Tensor:
        """Its photos of a batch, of which `index` [n] are all.

        A BatchNorm can't learn from one photo, so a batch of fewer than two for each is not shared
        out: every process takes all of it, and their mean is the same.
        """
        return index if len(index) < 2 * self.size else index[self.rank :: self.size]

    def weight(self, count: int, batch: int) -> float:
        """By what the mean loss of its part counts, so that the mean over processes is the batch's.

        Args:
            count: Photos of its part.
            batch: Photos of the batch.
        """
        return 1.0 if batch < 2 * self.size else self.size * count / batch

    def wrap(self, module: nn.Module) -> nn.Module:
        """The same module; its gradients will be their mean over the processes.

        Wrap it anew for every epoch: sums are taken in the order in which the first step of a
        wrapped module found its gradients, and a resumed run has to find the same one.
        """
        if self.size == 1:
            return module
        # BatchNorm statistics are not sent at each step: the trainer sees to them.
        return DistributedDataParallel(module, **_NO_BUFFERS)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, the same bits in each."""
        if self.size == 1:
            return values
        found = values.detach().clone()
        dist.all_reduce(found)
        return found

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, the same bits in each."""
        return values if self.size == 1 else self.total(values) / self.size

    def overall(self, loss: Tensor, count: int) -> Tensor:
        """A scalar of the loss of a whole batch, with the gradient that this part has in it.

        Args:
            loss: The mean over the photos of this process's part.
            count: How many they are.
        """
        if self.size == 1:
            return loss
        sums = self.total(torch.stack([loss.detach() * count, loss.new_tensor(count)]).double())
        mine = loss * (self.size * count / sums[1].item())
        # Nothing is added to the first term, so all see the same number.
        return (sums[0] / sums[1]).to(loss.dtype) + (mine - mine.detach())

    def any(self, here: bool) -> bool:
        """Whether something is so in any of the processes."""
        if self.size == 1:
            return here
        count = torch.tensor(int(here))
        dist.all_reduce(count, group=self.cpu_group)
        return bool(count.item())

    def decide(self, choose: Callable[[], T]) -> T:
        """What process 0 chooses; the others do not call `choose`."""
        if self.size == 1:
            return choose()
        chosen: list[Any] = [choose() if self.is_main_process else None]
        dist.broadcast_object_list(chosen, src=0, group=self.cpu_group)
        return cast(T, chosen[0])

    def check_same(self, own: Mapping[str, str]) -> None:
        """Stop where something is not as process 0 has it; `own` is by what it is called.

        Raises:
            DataError: Names it, and the machine.
        """
        lead = self.decide(lambda: own)
        other = [what for what, value in own.items() if value != lead[what]]
        if other:
            raise DataError(
                f"{other[0]} on {socket.gethostname()} (process {self.rank}) is not what process "
                "0 has; give all processes the same"
            )

    def wait_for_everyone(self) -> None:
        """Wait for the others, however long they take."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The first process of each machine goes ahead of the others there."""
        if self.local:
            self.wait_for_everyone()
        yield
        if not self.local:
            self.wait_for_everyone()

    def broadcast_module(self, module: nn.Module) -> None:
        """Give a module on the CPU the weights and buffers that it has in process 0."""
        if self.size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0, group=self.cpu_group)

    def seed(self, seed: int) -> None:
        """Have every process draw other dropout masks; process 0 goes on with its own."""
        if self.rank:
            torch.manual_seed(seed + self.rank * 2**32)  # a recipe's seed is smaller

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all of them have, together, in process 0; their names must differ."""
        if self.size == 1:
            return dict(own)
        found: list[Any] | None = [None] * self.size if self.is_main_process else None
        dist.gather_object(dict(own), found, dst=0, group=self.cpu_group)
        return {key: value for part in found or () for key, value in part.items()}

    @contextmanager
    def copied(self, folder: Path, names: Sequence[str]) -> Iterator[Path]:
        """A folder of process 0 with some of its files; elsewhere a copy, which is for a while."""
        if self.size == 1:
            yield folder
            return
        paths = {name: folder / name for name in names}
        sizes = self.decide(lambda: {n: p.stat().st_size for n, p in paths.items() if p.is_file()})
        with tempfile.TemporaryDirectory(prefix="fledge-resume-") as aside:
            here = folder if self.is_main_process else Path(aside)
            for name, size in sizes.items():
                data = np.empty(size, np.uint8)
                if self.is_main_process:
                    data[:] = np.fromfile(here / name, np.uint8)
                dist.broadcast(torch.from_numpy(data), src=0, group=self.cpu_group)
                if not self.is_main_process:
                    (here / name).parent.mkdir(parents=True, exist_ok=True)
                    data.tofile(here / name)
            yield here

    def leave(self) -> None:
        """End what they tell one another, all at once: the rest is for the one that leads."""
        if self.size > 1:
            self.wait_for_everyone()
            dist.destroy_process_group()

    def on_main_process(self, log: Log) -> Log:
        """`say` in process 0; nothing elsewhere."""
        return log if self.is_main_process else _silent

    def first_to_fail(self) -> bool:
        """Whether no other process failed before: the first one tells why."""
        if self.store is None:
            return True
        if not self.is_main_process:
            time.sleep(COURTESY)
        own = str(self.rank)
        try:
            return bool(self.store.compare_set(_FAILED, "", own) == own.encode())
        except RuntimeError:  # process 0 had the store, and is gone
            return False


SINGLE_PROCESS: Final = ProcessGroup()


def accumulating(net: nn.Module) -> AbstractContextManager[None]:
    """Inside, gradients add up and are not sent: a later step of backward sends them."""
    if isinstance(net, DistributedDataParallel):
        return cast(AbstractContextManager[None], net.no_sync())
    return nullcontext()


def _silent(line: str) -> None:
    """Say nothing."""
