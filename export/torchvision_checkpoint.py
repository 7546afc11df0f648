"""Load a torchvision checkpoint trained outside Fledge, and keep its own classifier layer."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torchvision
from torch import Tensor, nn
from torchvision.models import SqueezeNet

from export.parity import Sample
from serving.errors import DataError, OptionError
from serving.imaging.preprocess import Preprocess
from serving.tables.reader import read_text
from serving.utils.label_names import (
    LabelMatcher,
    is_utf8,
    nearest_labels,
    normalize_label,
    show_label,
)
from serving.utils.mistakes import Mistakes
from training.config.sections import DataConfig
from training.data.dataset import load_dataset
from training.models import backbones, weights
from training.run import checkpoint

HELD_OUT: Final = 2 / 3
"""Share of the photos for the parity gate and accuracies; the others calibrate int8."""

_AUXILIARY: Final = re.compile(r"(^|\.)(aux|AuxLogits)")


class WholeNetwork(nn.Module):
    """A torchvision network, split into `features` and `head`.

    The head is the last Linear layer. SqueezeNet has no Linear layer: its head is its classifier,
    which begins with a convolution and takes feature maps. For SqueezeNet, `pool` converts feature
    maps [N, D, h, w] to vectors [N, D]; for other networks it is the identity.
    """

    def __init__(self, network: nn.Module) -> None:
        """Split a network; the network is modified."""
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        if isinstance(network, SqueezeNet):
            self.network: nn.Module = network.features
            self.head: nn.Module = nn.Sequential(network.classifier, nn.Flatten())
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            return
        *_, last = (name for name, part in network.named_modules() if isinstance(part, nn.Linear))
        self.head = network.get_submodule(last)
        network.set_submodule(last, nn.Identity())
        self.network = network

    def features(self, images: Tensor) -> Tensor:
        """Compute the head's input, [N, D] or [N, D, h, w], from normalised images [N, 3, H, W]."""
        features: Tensor = self.network(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [N, classes] from normalised images [N, 3, H, W]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def read_args(texts: Sequence[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` texts to keyword arguments of torchvision's model builder.

    A value is parsed as TOML; if it is not valid TOML, it is used as a string.

    Raises:
        OptionError: A text does not have the form KEY=VALUE.
    """
    args = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key.isidentifier() and equals):
            raise OptionError(f"--arch-args {text}: use KEY=VALUE, such as transform_input=true")
        try:
            args[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            args[key] = value
    return args


def load(
    path: Path,
    arch: str,
    labels: Sequence[str],
    *,
    arch_args: Mapping[str, Any] | None = None,
    size: int | None = None,
    crop: float | None = None,
) -> tuple[WholeNetwork, checkpoint.CheckpointInfo]:
    """Load a checkpoint as a network in eval mode, float32, on the CPU.

    Code in the file is not executed.

    Args:
        path: File with a state dict, saved by `torch.save` or as safetensors. Checkpoints of
            torchvision's reference scripts and of Lightning are accepted, too; their state dict is
            under the key `model` or `state_dict`; FILE::NAME names another key.
        arch: torchvision's name of the network.
        labels: Class names in the order of the logits.
        arch_args: Keyword arguments of torchvision's model builder.
        size: Side of the input in training, in pixels; None: the network's default size.
        crop: Share of the photo's short side that the centre crop keeps; None: 0.875.

    Raises:
        DataError: The file has no state dict, or its state dict is that of another network or has
            another number of classes.
        OptionError: The network or an argument is unknown, or the size does not fit the network.
    """
    family = backbones.family_of(arch)
    args = dict(arch_args or {})
    default = Preprocess(size=family.image_size(args), decode="scaled")
    try:
        preprocess = replace(
            default,
            size=default.size if size is None else size,
            crop=default.crop if crop is None else crop,
        )
    except OptionError as error:
        raise OptionError(re.sub(r"preprocess\.(\w+) =", r"--\1", str(error))) from error
    for key, usual in family.fixed.items():
        if not isinstance(args.get(key, usual), type(usual)):
            raise OptionError(f"--arch-args {key}={args[key]}: use true or false")
    own = {key: value for key, value in args.items() if key not in family.fixed}
    try:
        backbones.check_size(arch, own, preprocess.size, "--size")
    except OptionError as error:
        raise OptionError(str(error).replace("arch_args", "--arch-args", 1)) from error
    named = f"--checkpoint {str(path)!r}"
    try:
        state = weights.read_state_dict(arch, str(path), preprocess.size, named=named)
    except DataError as error:
        message = str(error).replace("; use imagenet, none, auto or a path", "")
        raise DataError(message) from error
    options = dict(family.fixed)
    if "aux_logits" in options:
        options["aux_logits"] = any(_AUXILIARY.search(key) for key in state)
        options["init_weights"] = False  # slow, and all weights are replaced
    try:
        network = torchvision.models.get_model(
            arch, weights=None, num_classes=len(labels), **options | args
        )
    except Exception as error:  # builders raise exceptions of many classes
        reason = str(error).partition("\n")[0]
        raise OptionError(f"--arch-args {args} does not fit {arch}: {reason}") from error
    state = weights.match_names(state, network.state_dict(), family)
    _check_state(network, state, path, arch, len(labels))
    weights.check_values(state, network.state_dict(), named)
    # Not strict, because old files lack `num_batches_tracked`; `_check_state` checked other keys.
    network.load_state_dict(state, strict=False)
    info = checkpoint.CheckpointInfo(
        name=path.stem,
        arch=arch,
        classes=tuple(labels),
        preprocess=preprocess,
        arch_args=args,
        versions=checkpoint.versions(),
    )
    return WholeNetwork(network).eval(), info


def read_labels(path: Path) -> list[str]:
    """Read class names from a file with one name per line, in the order of the logits.

    Raises:
        DataError: The file can't be read, is empty, or contains an empty line or a duplicate name.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise DataError(f"--labels {path}: {error.strerror or error}") from error
    labels = [normalize_label(line) for line in lines]
    while labels and not labels[-1]:
        labels.pop()
    wrong, numbers = Mistakes(f"--labels {path}"), dict[str, int]()
    for number, label in enumerate(labels, 1):
        first = numbers.setdefault(label, number)
        if not label:
            wrong.add(f"line {number} holds nothing")
        elif first < number:
            wrong.add(f"line {number} holds {show_label(label)} a second time, after line {first}")
        elif not is_utf8(label):
            wrong.add(f"line {number} is not UTF-8 text")
    wrong.check("write each class name once, one per line")
    if not labels:
        raise DataError(
            f"--labels {path} is empty; write one class name per line, in the order of the logits"
        )
    return labels


def photos(
    folder: Path,
    labels: Sequence[str],
    named: str = "--labels has it",
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[Sample], list[Sample]]:
    """List the photos in a folder with one folder per class, and split them into two lists.

    Args:
        folder: The folder, or an archive.
        labels: Class names in the order of the logits. ImageNet's may be synsets or names.
        named: Where the names of the folders come from, for error messages.
        log: Function that is called with lines about what was read and passed over.

    Returns:
        A third of the photos for int8 calibration, and the other two thirds as held-out photos.

    Raises:
        DataError: `load_dataset` can't read the folder, or the name of a class folder is not in
            `labels`.
    """
    config = DataConfig(valid=HELD_OUT, similar="keep", synsets="keep")
    match, places = LabelMatcher(labels).match, {label: i for i, label in enumerate(labels)}
    dataset = load_dataset(str(folder), config=config)
    if not any(map(match, dataset.classes)):
        names = config.model_copy(update={"synsets": "names"})
        dataset = load_dataset(str(folder), config=names)
    for line in dataset.reading.lines():
        log(line)
    found = [match(name) for name in dataset.classes]
    unknown = [name for name, label in zip(dataset.classes, found, strict=True) if label is None]
    if unknown:
        near = " or ".join(map(show_label, nearest_labels(unknown[0], labels)))
        raise DataError(
            f"--photos {folder}: {show_label(unknown[0])} is no label ({len(unknown)} of "
            f"{len(dataset.classes)} folders are none); name each folder as {named}"
            f"{f', such as {near}' if near else ''}"
        )
    indices = [places[label] for label in found if label is not None]
    parts = dataset.train, dataset.valid
    calibrate, held_out = ([(s.path, indices[s.label]) for s in part] for part in parts)
    return calibrate, held_out


def _check_state(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str, classes: int
) -> None:
    own = network.state_dict()
    last = next(reversed([key for key in own if own[key].ndim >= 2]), "")
    if last in state and state[last].shape[0] != classes:
        raise DataError(
            f"--checkpoint {path} has {state[last].shape[0]} classes and --labels {classes}; write "
            "the name of each class, in the order of the logits"
        )
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    extra = [k for k in state if k not in own]
    if missing or wrong or extra:
        mismatch = weights.describe_mismatch(missing, wrong, extra)
        hint = weights.origin(state, arch)
        raise DataError(f"--checkpoint {path} is not for {arch}: {mismatch}{hint}")
