"""Read pretrained weights without running code from the file, and load them into a body."""

from __future__ import annotations

import argparse
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from serving.errors import DataError
from training.models.families import Family
from training.utils import tensor_header


def read_state_dict(arch: str, weights: str, size: int) -> Mapping[str, Tensor]:
    """Read the state dict of a torchvision network.

    Args:
        arch: Name of the architecture whose ImageNet weights are downloaded.
        weights: "imagenet" (downloaded by torchvision at first use), or the path of a file.
        size: Image size in pixels. If torchvision has several ImageNet weights, those for this
            size are used.

    Raises:
        DataError: The weights can't be downloaded or read, or the file is not a state dict.
    """
    if weights == "imagenet":
        every = torchvision.models.get_model_weights(arch)
        fitting = [one for one in every if one.meta["min_size"] == (size, size)]
        entry = every.DEFAULT if every.DEFAULT in fitting or not fitting else fitting[0]
        try:
            return entry.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
        except Exception as error:  # no network, or a damaged file in the cache
            raise DataError(
                f"weights = 'imagenet': {entry.url} can't be downloaded ({error}); "
                "give a file (weights = 'PATH.pth') or weights = 'none'"
            ) from error
    # pathlib raises an error for unknown users and for names that are too long; os.path does not.
    path = Path(os.path.expanduser(weights))
    if os.path.isdir(path):
        raise DataError(f"weights = {weights!r}: a folder, not a file of weights")
    if not os.path.isfile(path):
        raise DataError(f"weights = {weights!r}: no such file; use imagenet, none, auto or a path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensor_header.read_header(path)  # raises an error if it is too long or damaged
            return load_file(path)
        # Checkpoints of torchvision's reference scripts also contain the training options.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch warns, then raises an error
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types of errors
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it contains code, which is not run; save `model.state_dict()` instead"
        else:
            reason = "the file is damaged, truncated, or of another kind"
        raise DataError(f"weights = {weights!r} is not a state dict: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise DataError(f"weights = {weights!r} is not a state dict: it must map names to tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}  # prefix of DDP


def rename_keys(state: Mapping[str, Tensor], family: Family) -> Mapping[str, Tensor]:
    """Rename the keys of a state dict of an older torchvision version to the current keys."""
    for old, new in family.old_names:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def load_into_body(
    body: nn.Sequential,
    network: nn.Module,
    state: Mapping[str, Tensor],
    family: Family,
    arch: str,
    weights: str,
) -> None:
    """Copy a state dict into a body. The weights of classifiers are ignored.

    Args:
        body: Layers of `network` without the classifier; shares its tensors with `network`.
        network: The torchvision network that the body was extracted from.
        state: State dict of a network of the same architecture.
        family: Family of the architecture.
        arch: Name of the architecture, for the error message.
        weights: Name or path of the weights, for the error message.

    Raises:
        DataError: The state dict belongs to another architecture.
    """
    state = rename_keys(state, family)
    # Body and network share tensors: the identity of a tensor maps its name in one to the other.
    names = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
    own = {names[id(v)]: (k, v) for k, v in body.state_dict(keep_vars=True).items()}
    # Old files have no num_batches_tracked, which is unused if the momentum is fixed.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k, (_, v) in own.items() if k in state and v.shape != state[k].shape]
    # A deeper network of the same family has all keys of a shallower one, and further ones.
    tops = {k.partition(".")[0] for k in own}
    known = network.state_dict()
    extra = [k for k in state if k.partition(".")[0] in tops and k not in known]
    if missing or wrong or extra:
        raise DataError(
            f"weights = {weights!r} is not for {arch}: {describe_mismatch(missing, wrong, extra)}"
            f"{_other_size(state, wrong)}"
        )
    body.load_state_dict({key: state.get(name, v) for name, (key, v) in own.items()})


def describe_mismatch(missing: list[str], wrong: list[str], extra: list[str]) -> str:
    """Return a text that says why a state dict does not fit. At least one list must not be empty.

    Args:
        missing: Keys that the state dict lacks.
        wrong: Keys whose tensors have another shape.
        extra: Keys that the network does not have.
    """
    why = "lacks" if missing else "has another shape for" if wrong else "also has"
    return (
        f"it {why} {(missing or wrong or extra)[0]} ({len(missing)} missing, {len(wrong)} of "
        f"another shape, {len(extra)} unexpected)"
    )


def _other_size(state: Mapping[str, Tensor], wrong: list[str]) -> str:
    """Return a hint that contains the image size for which the weights of a ViT were trained.

    The result is "" if the weights differ from the network in more than the image size.
    """
    if wrong != ["encoder.pos_embedding"] or state[wrong[0]].ndim != 3:
        return ""
    if "conv_proj.weight" not in state:
        return ""
    patches = math.isqrt(state[wrong[0]].shape[1] - 1)
    return f"; it is for arch_args.image_size = {patches * state['conv_proj.weight'].shape[-1]}"
