"""Weights files: read without trusting them, and loaded into a body."""

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


def read(arch: str, weights: str, size: int) -> Mapping[str, Tensor]:
    """The state dict of a whole network.

    Args:
        arch: For "imagenet".
        weights: "imagenet", by torchvision's own cached download; or a path.
        size: Side of the images, where there are imagenet weights for several.

    Raises:
        DataError: It can't be had, or is none.
    """
    if weights == "imagenet":
        every = torchvision.models.get_model_weights(arch)
        fitting = [one for one in every if one.meta["min_size"] == (size, size)]
        entry = every.DEFAULT if every.DEFAULT in fitting or not fitting else fitting[0]
        try:
            return entry.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
        except Exception as error:  # no network, or a damaged file in the cache
            raise DataError(
                f"weights = 'imagenet': {entry.url} can't be fetched ({error}); "
                "give a file (weights = 'PATH.pth') or weights = 'none'"
            ) from error
    # os.path, since pathlib raises over users that are not there and names that are too long.
    path = Path(os.path.expanduser(weights))
    if os.path.isdir(path):
        raise DataError(f"weights = {weights!r}: a folder, not a file of weights")
    if not os.path.isfile(path):
        raise DataError(f"weights = {weights!r}: no such file; use imagenet, none, auto or a path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # torchvision's references put the options of the training beside the weights.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about what it refuses a moment later
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a file not its own torch.load raises a zoo of types
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds code, which is not run; save `model.state_dict()` instead"
        else:
            reason = "the file is damaged, cut short, or of another kind"
        raise DataError(f"weights = {weights!r} is no state dict: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise DataError(f"weights = {weights!r} is no state dict: it must map names to tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}  # of DDP


def renamed(state: Mapping[str, Tensor], family: Family) -> Mapping[str, Tensor]:
    """The same with the names of today, where the file is older than the code."""
    for old, new in family.old_names:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def load(
    body: nn.Sequential,
    network: nn.Module,
    state: Mapping[str, Tensor],
    family: Family,
    arch: str,
    weights: str,
) -> None:
    """Copy a whole network's state dict into a body that was taken out of `network`.

    Classifiers in it, main and auxiliary, are of no interest.

    Raises:
        DataError: It belongs to another architecture.
    """
    state = renamed(state, family)
    # The body shares its tensors with the network, which tells how they are called there.
    names = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
    own = {names[id(v)]: (k, v) for k, v in body.state_dict(keep_vars=True).items()}
    # Old files have no num_batches_tracked; it matters to nobody with a fixed momentum.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k, (_, v) in own.items() if k in state and v.shape != state[k].shape]
    # A deeper network of the same family has all keys of a shallower one, and more.
    tops = {k.partition(".")[0] for k in own}
    known = network.state_dict()
    extra = [k for k in state if k.partition(".")[0] in tops and k not in known]
    if missing or wrong or extra:
        raise DataError(
            f"weights = {weights!r} is not for {arch}: {misfit(missing, wrong, extra)}"
            f"{_other_size(state, wrong)}"
        )
    body.load_state_dict({key: state.get(name, v) for name, (key, v) in own.items()})


def misfit(missing: list[str], wrong: list[str], extra: list[str]) -> str:
    """Why a state dict does not fit: names that it lacks, that differ in shape, that are too many.

    At least one of the three lists has a name.
    """
    why = "lacks" if missing else "has another shape for" if wrong else "also holds"
    return (
        f"it {why} {(missing or wrong or extra)[0]} ({len(missing)} missing, {len(wrong)} of "
        f"another shape, {len(extra)} too many)"
    )


def _other_size(state: Mapping[str, Tensor], wrong: list[str]) -> str:
    """The size of images that a ViT's weights are for, where that alone is wrong."""
    if wrong != ["encoder.pos_embedding"] or state[wrong[0]].ndim != 3:
        return ""
    if "conv_proj.weight" not in state:
        return ""
    patches = math.isqrt(state[wrong[0]].shape[1] - 1)
    return f"; it is for arch_args.image_size = {patches * state['conv_proj.weight'].shape[-1]}"
