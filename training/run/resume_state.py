"""Where a run stands after each epoch: all that a resumed run needs to end as if never killed.

One safetensors file, renamed into place: weights, optimiser, moving average and random state, with
the rest as JSON in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, optim

from serving.errors import DataError, WorkError
from serving.utils.files import write_aside
from training.run.history import Epoch

STATE: Final = "state.safetensors"
SCHEMA: Final = "1"
RANDOM: Final = "random"
"""The group of `random_state`."""


@dataclass
class Position:
    """How far a run is.

    stage: index of the stage in progress; epoch: how many of its epochs are done. first_view: where
    its views begin; views: how many it takes turns with, once known. lr: its rate, once known.
    best: accuracy and minus the loss of the best epoch. history: every epoch so far. processes: by
    how many it was trained.
    """

    stage: int = 0
    epoch: int = 0
    first_view: int = 0
    views: int | None = None
    lr: float | None = None
    best: tuple[float, float] = (-1.0, 0.0)
    history: list[Epoch] = field(default_factory=list)
    processes: int = 1

    def losses(self, stage: str) -> list[float]:
        """Validation losses of a stage's epochs so far."""
        return [row.valid_loss for row in self.history if row.stage == stage]


Tensors = Mapping[str, Mapping[str, Tensor]]


def save(folder: Path, position: Position, tensors: Tensors) -> None:
    """Write the state; `tensors` are named groups of tensors, such as "model" and `RANDOM`.

    Raises:
        WorkError: The disk is full, or the like; the state before stays.
    """
    flat = {
        f"{group}/{key}": value.detach().contiguous()
        for group, values in tensors.items()
        for key, value in values.items()
    }
    with write_aside(folder / STATE) as aside:
        try:
            save_file(
                flat, aside, metadata={"schema": SCHEMA, "position": json.dumps(asdict(position))}
            )
        except SafetensorError as error:
            raise WorkError(f"{folder / STATE} can't be written: {error}") from error


def random_state(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """What decides the next random numbers of a process, by names that tell its rank."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return {_of(rank, kind): value for kind, value in found.items()}


def _of(rank: int, kind: str) -> str:
    return f"{kind}.{rank}" if rank else kind


def load(
    folder: Path, device: torch.device, rank: int = 0
) -> tuple[Position, dict[str, dict[str, Tensor]]] | None:
    """Read the state and set the random state of a process; None where no epoch was finished.

    A process that has none in it, since fewer saved it, goes on with its own.

    Raises:
        DataError: Damaged, or of another version.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("schema") != SCHEMA:
                raise DataError(f"{path} is of another version of Fledge; start the run anew")
            values = json.loads(header["position"])
            tensors: dict[str, dict[str, Tensor]] = {}
            for name in file.keys():  # noqa: SIM118
                group, _, key = name.partition("/")
                tensors.setdefault(group, {})[key] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} can't be read: {error}; start the run anew") from error
    values["best"] = tuple(values["best"])
    values["history"] = [Epoch(**row) for row in values["history"]]
    random = tensors.pop(RANDOM)
    cpu, cuda = _of(rank, "cpu"), _of(rank, "cuda")
    if cpu in random:
        torch.set_rng_state(random[cpu])
    if device.type == "cuda" and cuda in random:
        torch.cuda.set_rng_state(random[cuda], device)
    return Position(**values), tensors


def of_optimizer(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by "parameter number.name"; rates are the schedule's to set."""
    return {
        f"{number}.{name}": value
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def into_optimizer(optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """What `of_optimizer` gave, back into an optimiser built in the same way."""
    values = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        like = parameters[int(number)]
        # In the parameter's own layout, so that it is the same arithmetic as before.
        kept = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        entries.setdefault(int(number), {})[name] = kept
    optimizer.load_state_dict({**values, "state": entries})
