"""Write and read checkpoints.

A checkpoint is a .safetensors file with the weights, and a .json file of the same name with a
description of the network.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import torchvision
from pydantic import FailFast, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from serving.errors import DataError, OptionError
from serving.imaging.preprocess import Preprocess
from serving.utils import json_reader
from serving.utils.files import atomic_write, utf8_path
from serving.utils.json_reader import JsonError
from serving.utils.regular_files import read_limited
from training.models.classifier import Classifier, check_shapes, create_classifier
from training.run import tensor_file
from training.utils import tensor_header

SCHEMA: Final = 1
BEST: Final = "best.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """Content of a checkpoint's .json file.

    Attributes:
        name: Name of the recipe.
        arch: Name of the architecture.
        classes: Class names in the order of the logits.
        preprocess: Preprocessing of the images that the network was trained with.
        arch_args: Options of the architecture.
        head: Options of the head.
        seed: Seed of the recipe.
        data: Facts about the dataset, with these keys:

            - "source": Value of `--data`.
            - "root": Folder of the photos.
            - "fingerprint": Hash of the dataset.
            - "train", "valid": Number of photos in the training and in the validation split.
        metrics: Results on the validation split, with these keys, some of which may be missing:

            - "accuracy": Accuracy as a fraction of 1, without test-time augmentation (TTA).
            - "balanced_accuracy": Mean of the accuracies of the classes, without TTA.
            - "loss": Cross-entropy in nats, without TTA.
            - "stage", "epoch": Stage and epoch after which the weights were saved.
            - "accuracy_tta", "loss_tta": Accuracy and loss with TTA, if the recipe has TTA.
            - "views": Number of TTA views, if the recipe has TTA.
        versions: Versions of Python, torch and torchvision.
        schema: Version of the format of this file.
    """

    name: str
    arch: str
    classes: Annotated[tuple[str, ...], FailFast()]
    preprocess: Preprocess
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def versions() -> dict[str, str]:
    """Return the installed versions of Python, torch and torchvision."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def save(path: Path, classifier: Classifier, info: CheckpointInfo) -> None:
    """Write a checkpoint. Each of the two files is written atomically.

    Args:
        path: The .safetensors file. The .json file gets the same name.
        classifier: The network.
        info: Content of the .json file.

    Raises:
        WorkError: The .safetensors file can't be written.
    """
    state = {key: value.detach().contiguous() for key, value in classifier.state_dict().items()}
    tensor_file.write(path, state)
    write_info(path.with_suffix(".json"), info)


def write_info(path: Path, info: CheckpointInfo) -> None:
    """Write the .json file of a checkpoint atomically."""
    values = asdict(info) | {"preprocess": info.preprocess.to_dict()}
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def weights_path(run: Path) -> Path:
    """Return the path of a run's best checkpoint; `run` itself if it is a .safetensors file."""
    return run if run.suffix == ".safetensors" else run / BEST


def run_folder_of(run: Path) -> Path:
    """Return the run folder of a checkpoint.

    Args:
        run: A run folder, or a .safetensors file in it or in its subfolder `stages`.
    """
    folder = weights_path(run).parent
    return folder.parent if folder.name == "stages" else folder


def load(run: Path) -> tuple[Classifier, CheckpointInfo]:
    """Load a checkpoint.

    Args:
        run: A run folder (its best checkpoint is loaded), or the .safetensors file of a checkpoint.

    Returns:
        The network on the CPU, in float32 and eval mode, and the description of the checkpoint.

    Raises:
        DataError: A file is missing or damaged, the .json file has another format version, or the
            weights do not fit the architecture.
    """
    path = weights_path(run)
    info = read_info(path.with_suffix(".json"))
    try:
        shapes = tensor_header.read_header(path).shapes
        _check_shapes(path, shapes, info)
        with utf8_path(path) as name:
            state = load_file(name)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; make one with `fledge train`") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    classifier = create_classifier(
        info.arch, len(info.classes), arch_args=info.arch_args, head=info.head
    )
    classifier.load_state_dict(state)
    return classifier.eval(), info


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], info: CheckpointInfo) -> None:
    """Check that tensors of these shapes fit the description, before the network is built.

    Raises:
        DataError: They do not fit, or there is no such network.
    """
    try:
        check_shapes(shapes, info.arch, len(info.classes), arch_args=info.arch_args, head=info.head)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(f"{path} does not fit {info.arch} of its .json file: {reason}") from error
    except (OptionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path.with_suffix('.json')} can't be used: {reason:.300}") from error


def read_info(path: Path) -> CheckpointInfo:
    """Read the .json file of a checkpoint.

    Raises:
        DataError: The file is missing or damaged, or has another format version.
    """
    try:
        values = json_reader.parse(read_limited(path, _MAX_INFO), paths=True)
        if not isinstance(values, dict):
            raise JsonError("it is not a JSON object")
        data = values.get("data")
        if isinstance(data, dict):  # its paths may have bytes that are not UTF-8, and nothing else
            data = {key: value for key, value in data.items() if key not in ("source", "root")}
        json_reader.check_text({**values, "data": data})
        if values.get("schema") != SCHEMA:
            found = f"{values.get('schema')!r:.80}"
            raise DataError(f"{path}: schema {found} is not {SCHEMA}; train again")
        values["preprocess"] = Preprocess.from_dict(values["preprocess"])
        return json_reader.validate(values, _INFO)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; make one with `fledge train`") from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a checkpoint description: {reason:.300}") from error


# What reading a description raises, if a value is missing or has another type.
_DAMAGED: Final = (OSError, ValueError, LookupError, TypeError, AttributeError, OptionError)
_INFO: Final = TypeAdapter(CheckpointInfo)
_MAX_INFO: Final = 2**22  # bytes of a description; 20,000 classes take 1 MB
