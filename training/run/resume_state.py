"""Resume state: everything that a run needs to be resumed.

The results of a resumed run are bit-identical to those of an uninterrupted run. The state is
written after each epoch, atomically, as one safetensors file: weights, optimizer state, moving
average and random state as tensors, the `Position` as JSON in the header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, optim

from serving.errors import DataError, WorkError
from serving.utils.files import atomic_write
from training.run.history import Epoch

STATE_FILE: Final = "state.safetensors"
SCHEMA: Final = "1"

Tensors = Mapping[str, Tensor]


@dataclass
class Position:
    """The progress of a run.

    Attributes:
        stage: Index of the stage in progress.
        epoch: Number of the stage's finished epochs.
        first_view: Number of the first view (random augmentation) of each photo that the stage
            uses.
        views: Number of cached views that the stage's epochs cycle through; None: not decided yet.
        lr: Learning rate that lr_find picked for the stage; None: not picked yet.
        best: Accuracy and negative loss of the best epoch.
        history: All finished epochs.
        processes: Number of processes that train.
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
        """Validation losses of a stage's finished epochs."""
        return [row.valid_loss for row in self.history if row.stage == stage]


@dataclass
class ResumeTensors:
    """The tensors of a resume state. Each field is a group of the file, {} if the group is empty.

    Attributes:
        model: State dict of the classifier.
        ema: Result of `Ema.state`.
        optimizer: Result of `optimizer_state`.
        kept, kept_ema: Weights and averages of the stage's epoch with the lowest validation loss,
            for early stopping.
        random: Results of `random_state` in all processes.
    """

    model: Tensors = field(default_factory=dict)
    ema: Tensors = field(default_factory=dict)
    optimizer: Tensors = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)
    kept_ema: Tensors = field(default_factory=dict)
    random: Tensors = field(default_factory=dict)


def save(folder: Path, position: Position, tensors: ResumeTensors) -> None:
    """Write the state into `folder`.

    Raises:
        WorkError: The file can't be written, such as on a full disk. The previous state is kept.
    """
    flat = {
        f"{group.name}/{key}": value.detach().contiguous()
        for group in fields(tensors)
        for key, value in getattr(tensors, group.name).items()
    }
    header = {"schema": SCHEMA, "position": json.dumps(asdict(position))}
    with atomic_write(folder / STATE_FILE) as partial:
        try:
            save_file(flat, partial, metadata=header)
        except SafetensorError as error:
            raise WorkError(f"{folder / STATE_FILE} can't be written: {error}") from error


def random_state(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """State of a process's random number generators; the names contain its rank."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {_random_name(rank, kind): value for kind, value in states.items()}


def restore_random_state(states: Mapping[str, Tensor], device: torch.device, rank: int = 0) -> None:
    """Set a process's random number generators to the states that `random_state` returned.

    Without a state for this rank, the generators are not changed.
    """
    cpu, cuda = _random_name(rank, "cpu"), _random_name(rank, "cuda")
    if cpu in states:
        torch.set_rng_state(states[cpu])
    if device.type == "cuda" and cuda in states:
        torch.cuda.set_rng_state(states[cuda], device)


def _random_name(rank: int, kind: str) -> str:
    return f"{kind}.{rank}" if rank else kind


def load(
    folder: Path, device: torch.device, rank: int = 0
) -> tuple[Position, ResumeTensors] | None:
    """Read the state and restore the random state of a process; None if no epoch was finished.

    If the state was saved by fewer processes, the others keep their current random state.

    Raises:
        DataError: The file is damaged, or of another version.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("schema") != SCHEMA:
                raise DataError(
                    f"{path} was written by another version of Fledge; start the run again"
                )
            values = json.loads(header["position"])
            groups: dict[str, dict[str, Tensor]] = {}
            for name in file.keys():  # noqa: SIM118
                group, _, key = name.partition("/")
                groups.setdefault(group, {})[key] = file.get_tensor(name)
        tensors = ResumeTensors(**groups)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} can't be read: {error}; start the run again") from error
    values["best"] = tuple(values["best"])
    values["history"] = [Epoch(**row) for row in values["history"]]
    restore_random_state(tensors.random, device, rank)
    return Position(**values), tensors


def optimizer_state(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, named "PARAMETER NUMBER.NAME".

    Learning rates are not included, because the schedule sets them at every step.
    """
    return {
        f"{number}.{name}": value
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(optimizer: optim.Optimizer, tensors: Tensors) -> None:
    """Load an `optimizer_state` into an optimizer with the same parameters."""
    values = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        # In the parameter's memory layout, so that the arithmetic rounds as before.
        same_shape = value.shape == parameter.shape
        own = torch.empty_like(parameter).copy_(value) if same_shape else value
        entries.setdefault(int(number), {})[name] = own
    optimizer.load_state_dict({**values, "state": entries})
