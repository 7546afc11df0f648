"""Read pretrained weights, rename them to the names of a network, and load them into a body."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import torchvision
from torch import Tensor, nn

from serving.errors import DataError
from serving.terminal import quote_path
from serving.utils.process import tell_cache_folder
from training.models import weight_files
from training.models.families import Family
from training.utils.console import log_to_stderr


def read_state_dict(arch: str, weights: str, size: int, *, named: str = "") -> Mapping[str, Tensor]:
    """Read the state dict of a torchvision network, with the names that the file has.

    Args:
        arch: Name of the architecture whose ImageNet weights are downloaded.
        weights: "imagenet" (downloaded by torchvision at first use), or the path of a file, or
            FILE::NAME for one of several state dicts in a file.
        size: Image size in pixels. If torchvision has several ImageNet weights, those for this
            size are used.
        named: What error messages call the weights; "" for the option of a recipe.

    Raises:
        DataError: The weights can't be downloaded or read, or the file is not a state dict.
    """
    if weights == "imagenet":
        every = torchvision.models.get_model_weights(arch)
        fitting = [one for one in every if one.meta["min_size"] == (size, size)]
        tell_cache_folder()
        entry = every.DEFAULT if every.DEFAULT in fitting or not fitting else fitting[0]
        try:
            return entry.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
        except Exception as error:  # no network, or a damaged file in the cache
            raise DataError(
                f"weights = 'imagenet': {entry.url} can't be downloaded ({error}); "
                "give a file (weights = 'PATH.pth') or weights = 'none'"
            ) from error
    named = named or f"weights = {weights!r}"
    # pathlib raises an error for unknown users and for names that are too long; os.path does not.
    path, entry = os.path.expanduser(weights), ""
    if not os.path.exists(path):
        path, _, entry = path.partition("::") if "::" in path else (path, "", "")
    if os.path.isdir(path):
        inside = [f"{quote_path(one)}" for one in _weight_files(Path(path))]
        hint = f"; name a file in it, such as {inside[0]}" if inside else ""
        raise DataError(f"{named}: a folder, not a file of weights{hint}")
    if not os.path.isfile(path):
        raise DataError(f"{named}: no such file; use imagenet, none, auto or a path")
    try:
        state, note = weight_files.read(Path(path), entry)
    except weight_files.NotWeights as error:
        raise DataError(f"{named} {error}") from error
    if note:
        log_to_stderr(f"{named}: {note}")
    return state


def _weight_files(folder: Path) -> list[Path]:
    """Return the files in a folder that may be weights, those of the best epoch first."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES]
    return sorted(found, key=lambda path: "best" not in path.name)


_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def match_names(
    state: Mapping[str, Tensor], known: Collection[str], family: Family
) -> dict[str, Tensor]:
    """Rename the tensors of a state dict to the names that a network has.

    What wrappers have put before the names, such as `module.` (DDP), `_orig_mod.` (torch.compile)
    or `model.` (Lightning), is removed: whatever prefix gives the most names of the network.
    Tensors without this prefix, such as those of a loss function, are left out.

    Args:
        state: The tensors by their names in the file.
        known: The names of the network's tensors.
        family: Family of the network, for names of older torchvision versions.
    """
    renamed = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    renamed = dict(rename_keys(renamed, family))
    prefixes = Counter(
        key[:start]
        for key in renamed
        for start in (0, *(found.end() for found in re.finditer(r"\.", key)))
        if key[start:] in known
    )
    prefix = min(prefixes, key=lambda one: (-prefixes[one], len(one)), default="")
    return {
        key.removeprefix(prefix): value for key, value in renamed.items() if key.startswith(prefix)
    }


def check_values(state: Mapping[str, Tensor], own: Mapping[str, Tensor], named: str) -> None:
    """Check that all tensors are finite, and numbers of the same kind as the network's own.

    Args:
        state: The tensors that are loaded.
        own: The network's own tensors of these names.
        named: What error messages call the weights.

    Raises:
        DataError: One has NaN or infinite values, or is of another kind, as of a quantised network.
    """
    wrong = []
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point() or value.is_quantized:
            kind = str(value.dtype).removeprefix("torch.")
            raise DataError(
                f"{named} can't be used: {name} has values of type {kind}; "
                "give weights in floating point, from before they were quantised"
            )
        if value.is_floating_point() and not value.float().isfinite().all():
            wrong.append(name)
    if wrong:
        value = state[wrong[0]].float()
        nan, infinite = int(value.isnan().sum()), int(value.isinf().sum())
        what = " and ".join(
            f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count
        )
        more = f", and {len(wrong) - 1} more tensors have some" if wrong[1:] else ""
        raise DataError(
            f"{named} can't be used: {wrong[0]} has {what} of {value.numel()} values{more}; the "
            "training that wrote it has diverged: give an earlier checkpoint"
        )


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
    # Body and network share tensors: the identity of a tensor maps its name in one to the other.
    names = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
    own = {names[id(v)]: (k, v) for k, v in body.state_dict(keep_vars=True).items()}
    known = network.state_dict()
    if all(f"body.{k}" in state for k, _ in own.values()):  # a checkpoint of Fledge
        state = {name: state[f"body.{k}"] for name, (k, _) in own.items()}
    state = match_names(state, known, family)
    # Old files have no num_batches_tracked, which is unused if the momentum is fixed.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k, (_, v) in own.items() if k in state and v.shape != state[k].shape]
    # A deeper network of the same family has all keys of a shallower one, and further ones.
    tops = {k.partition(".")[0] for k in own}
    extra = [k for k in state if k.partition(".")[0] in tops and k not in known]
    named = f"weights = {weights!r}"
    if missing or wrong or extra:
        hint = _other_size(state, wrong) or origin(state, arch)
        mismatch = describe_mismatch(missing, wrong, extra)
        raise DataError(f"{named} is not for {arch}: {mismatch}{hint}")
    check_values({name: state[name] for name in own if name in state}, known, named)
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


_LIBRARIES: Final = (
    (r"conv_stem\.|\bblocks\.\d+\.|patch_embed\.proj\.|\bstages\.\d+\.blocks\.", "timm"),
    (r"embeddings\.patch_embeddings\.|\bencoder\.layer\.\d+\.attention\.", "Hugging Face's"),
    (r"\bmodel\.\d+\.(conv|cv1|m)\.", "ultralytics"),
)
"""Names in state dicts of other libraries."""

_BUFFERS: Final = (
    *("running_mean", "running_var", "num_batches_tracked"),
    *("relative_position_index", "relative_coords_table"),
)


def origin(state: Mapping[str, Tensor], arch: str) -> str:
    """Return a hint that says which network a state dict is of; "" if that can't be told.

    torchvision's networks are told apart by the number of their parameters. Nothing is built.

    Args:
        state: The state dict.
        arch: The architecture that it does not fit.
    """
    for pattern, library in _LIBRARIES:
        if any(re.search(pattern, key) for key in state):
            return f"; its names are {library}, not torchvision's"
    parameters = {key: value for key, value in state.items() if not key.endswith(_BUFFERS)}
    matrices = [value for value in parameters.values() if value.ndim >= 2]
    if not matrices:
        return ""
    classes = matrices[-1].shape[0]
    row = matrices[-1].numel() // max(classes, 1) + 1  # weights of a class, and its bias
    count = sum(value.numel() for value in parameters.values()) - classes * row
    fitting = [
        name
        for name in torchvision.models.list_models(module=torchvision.models)
        if any(
            entry.meta["num_params"] == count + len(entry.meta.get("categories") or ()) * row
            for entry in torchvision.models.get_model_weights(name)
        )
    ]
    return f"; it has the size of {' or '.join(fitting)}" if fitting and arch not in fitting else ""


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
