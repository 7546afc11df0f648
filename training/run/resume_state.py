"""Write and read the state from which a killed or interrupted run is resumed.

The state is one safetensors file, written atomically after each epoch. It contains weights,
optimizer state, moving average of the weights and random state as tensors, and the progress of the
run (`Position`) as JSON in the header. The results of a resumed run are bit-identical to those of
an uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor, optim

from serving.errors import DataError
from serving.utils import json_reader
from serving.utils.files import utf8_path
from training.run import tensor_file
from training.run.history import Epoch
from training.utils import tensor_header

STATE_FILE: Final = "state.safetensors"
SCHEMA: Final = "1"

Tensors = Mapping[str, Tensor]


@dataclass
class Position:
    """Progress of a run.

    Attributes:
        stage: Index of the current stage, from 0.
        epoch: Number of finished epochs of the current stage.
        first_view: Number of the first augmented view of each photo that the current stage uses.
            Every view number stands for one random augmentation.
        views: Number of augmented views of each photo that the epochs of the current stage use in
            turn; 0: every epoch uses a new view; None: not decided yet.
        lr: Learning rate that the range test selected for the current stage; None: not selected
            yet, or the recipe sets the rate.
        best: Validation accuracy and negative validation loss of the best epoch of the run.
        history: Records of all finished epochs.
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
        """Return the validation losses of the finished epochs of a stage."""
        return [row.valid_loss for row in self.history if row.stage == stage]


@dataclass
class ResumeTensors:
    """Tensors of a resume state. Each field maps names to tensors; {} if there are none.

    Attributes:
        model: State dict of the classifier.
        ema: Moving average of the weights, as `Ema.state` returns it.
        optimizer: State of the optimizer, as `optimizer_state` returns it.
        kept: Weights after the epoch of the current stage with the lowest validation loss, for
            early stopping.
        kept_ema: Moving average of the weights after the same epoch.
        random: States of the random number generators of all processes.
    """

    model: Tensors = field(default_factory=dict)
    ema: Tensors = field(default_factory=dict)
    optimizer: Tensors = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)
    kept_ema: Tensors = field(default_factory=dict)
    random: Tensors = field(default_factory=dict)


def save(folder: Path, position: Position, tensors: ResumeTensors) -> None:
    """Write the resume state into `folder`, replacing the previous state.

    Raises:
        WorkError: The file can't be written, for example because the disk is full. The previous
            state is kept.
    """
    flat = {
        f"{group.name}/{key}": value.detach().contiguous()
        for group in fields(tensors)
        for key, value in getattr(tensors, group.name).items()
    }
    header = {"schema": SCHEMA, "position": json.dumps(asdict(position))}
    tensor_file.write(folder / STATE_FILE, flat, header)


def random_state(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """Return the states of the random number generators of this process.

    Args:
        device: Device of the training; for a GPU, the state of its generator is included.
        rank: Number of this process, from 0. The names in the result contain it, except for
            process 0.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {_random_name(rank, kind): value for kind, value in states.items()}


def restore_random_state(states: Mapping[str, Tensor], device: torch.device, rank: int = 0) -> None:
    """Set the random number generators of this process to the states that `random_state` returned.

    If `states` has no entry for this rank, the generators are not changed.
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
    """Read the resume state, and set the random number generators of this process from it.

    If the state has no random state for this rank, the generators are not changed.

    Args:
        folder: Folder that contains the state file.
        device: Device of the training.
        rank: Number of this process, from 0.

    Returns:
        The progress and the tensors of the run; None if there is no state file.

    Raises:
        DataError: The file is damaged, or was written by another version of Fledge.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        header = tensor_header.read_header(path).metadata
        if header.get("schema") != SCHEMA:
            raise DataError(f"{path} was written by another version of Fledge; start the run again")
        position = _position(json_reader.parse(header["position"]))
        with utf8_path(path) as name, safe_open(name, framework="pt") as file:
            groups: dict[str, dict[str, Tensor]] = {}
            for tensor in file.keys():  # noqa: SIM118
                group, _, key = tensor.partition("/")
                groups.setdefault(group, {})[key] = file.get_tensor(tensor)
        tensors = ResumeTensors(**groups)
        restore_random_state(tensors.random, device, rank)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        # RuntimeError: torch does not know the random state.
        reason = " ".join(str(error).split())
        raise DataError(f"{path} can't be read: {reason:.200}; start the run again") from error
    return position, tensors


def _position(values: object) -> Position:
    position = json_reader.validate(values, _POSITION)
    if min(position.stage, position.epoch, position.first_view, position.processes - 1) < 0:
        raise ValueError(f"{position} has a negative number")
    return position


_POSITION: Final = TypeAdapter(Position)


def optimizer_state(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state.

    A name in the result is the number of the parameter, a dot, and the name in the optimizer's
    state: "0.exp_avg". Learning rates are left out because the schedule sets them at every step.
    """
    return {
        f"{number}.{name}": value
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(optimizer: optim.Optimizer, tensors: Tensors) -> None:
    """Load the result of `optimizer_state` into an optimizer that has the same parameters.

    Raises:
        DataError: The tensors belong to other parameters.
    """
    values = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if not (number.isdecimal() and int(number) < len(parameters)):
            raise DataError(f"{STATE_FILE} has no optimizer state of this run: {key:.60}")
        parameter = parameters[int(number)]
        # In the parameter's memory layout, so that the arithmetic rounds as before.
        same_shape = value.shape == parameter.shape
        own = torch.empty_like(parameter).copy_(value) if same_shape else value
        entries.setdefault(int(number), {})[name] = own
    try:
        optimizer.load_state_dict({**values, "state": entries})
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{STATE_FILE} has no optimizer state of this run: {error}") from error
