"""Checkpoints: weights as safetensors, everything else as JSON beside them. No pickle."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from serving.errors import DataError, OptionError, WorkError
from serving.imaging.preprocess import Preprocess
from serving.utils.files import write_aside
from training.models import classifier as model

SCHEMA: Final = 1
BEST: Final = "best.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What one must know to use the weights.

    arch, arch_args, head: arguments of `model.build`.
    classes: names in the order of the logits.
    data: {"source", "root", "fingerprint", "train", "valid"}; where the photos were, and counts.
    metrics: {"accuracy", "loss", "stage", "epoch"} on the validation part, plain view, float32;
        accuracy is a fraction of 1, loss is cross-entropy in nats. Where the recipe asks for
        test-time augmentation also {"accuracy_tta", "loss_tta", "views"}.
    """

    name: str
    arch: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def save(path: Path, classifier: model.Classifier, info: CheckpointInfo) -> None:
    """Write `path` (.safetensors) and its .json, each aside and then renamed."""
    state = {key: value.detach().contiguous() for key, value in classifier.state_dict().items()}
    with write_aside(path) as aside:
        try:
            save_file(state, aside)
        except SafetensorError as error:
            raise WorkError(f"{path} can't be written: {error}") from error
    write_info(path.with_suffix(".json"), info)


def write_info(path: Path, info: CheckpointInfo) -> None:
    """Write the .json of a checkpoint, aside and then renamed."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(asdict(info), indent=2, allow_nan=False) + "\n")


def find(run: Path) -> Path:
    """The weights file of a run's folder, or the one named itself."""
    return run if run.suffix == ".safetensors" else run / BEST


def folder_of(run: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; checkpoints of stages lie one deeper."""
    folder = find(run).parent
    return folder.parent if folder.name == "stages" else folder


def load(run: Path) -> tuple[model.Classifier, CheckpointInfo]:
    """Load a checkpoint: eval mode, float32, on the CPU.

    Args:
        run: A run's folder, or a .safetensors file with its .json beside it.

    Raises:
        DataError: Nothing there, damaged, of another version, or weights that do not fit.
    """
    path = find(run)
    info = read_info(path.with_suffix(".json"))
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; make one with `fledge train`") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    classifier = model.build(info.arch, len(info.classes), arch_args=info.arch_args, head=info.head)
    try:
        classifier.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(f"{path} does not fit {info.arch} as its .json says: {reason}") from error
    return classifier.eval(), info


def read_info(path: Path) -> CheckpointInfo:
    """Read the .json of a checkpoint; errors as `load`."""
    try:
        values = json.loads(path.read_text())
        if values.get("schema") != SCHEMA:
            raise DataError(f"{path}: schema {values.get('schema')!r} is not {SCHEMA}; train again")
        values["classes"] = tuple(values["classes"])
        values["preprocess"] = Preprocess.from_dict(values["preprocess"])
        return CheckpointInfo(**values)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; make one with `fledge train`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OptionError) as error:
        raise DataError(f"{path} is no checkpoint description: {error}") from error
