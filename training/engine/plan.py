"""Preparation of a run: determine the stages, create the network, check the stages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from serving.errors import DataError, OptionError
from training.config.forms import did_you_mean
from training.config.schema import ALL, Recipe, Spread, Stage
from training.config.toml_lines import Path
from training.data.dataset import Dataset
from training.models import backbones, freezing, heads
from training.models.classifier import Classifier, create_classifier
from training.optim.optimizer import check_rates, layer_groups
from training.run import checkpoint
from training.utils.console import Log, format_mistakes


def stages_of(recipe: Recipe, pretrained: bool) -> list[Stage]:
    """Return the recipe's stages with the options that training uses.

    `unfreeze = "gradual"` is replaced by a number of layer groups: one more than in the stage
    before. Without pretrained weights, all stages are changed to train all layers.

    Args:
        recipe: The recipe.
        pretrained: Whether the body has pretrained weights.

    Raises:
        OptionError: The stage before a "gradual" stage unfreezes layers by name, not by number.
    """
    stages: list[Stage] = []
    for stage in recipe.stage:
        if stage.unfreeze == "gradual":
            before = stages[-1].unfreeze if stages else 0
            if not isinstance(before, int):
                raise OptionError(
                    f"stage.{stage.name}.unfreeze = 'gradual': it is one layer group more than in "
                    f"the stage before, whose unfreeze must be a number of groups: set "
                    f"stage.{stages[-1].name}.unfreeze = 1 or so"
                )
            stage = stage.model_copy(update={"unfreeze": before + 1})
        stages.append(stage)
    return stages if pretrained else [_from_scratch(stage) for stage in stages]


def _from_scratch(stage: Stage) -> Stage:
    """Return a copy of the stage that trains all layers at one learning rate.

    The copy is used without pretrained weights, because random layers must not be frozen.
    """
    lr = stage.lr
    head = lr[-1] if isinstance(lr, tuple) else lr.high if isinstance(lr, Spread) else lr
    changes = {
        "unfreeze": ALL, "lr": head, "lr_divide": 1.0, "groups": 0, "batchnorm": "train",
        "frozen_batchnorm": "eval",
    }  # fmt: skip
    return stage.model_copy(update=changes)


def check(classifier: Classifier, recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Check the options of all stages before training; the classifier is not changed.

    Raises:
        OptionError: The architecture does not support the image size of a stage, a pattern in
            `unfreeze` matches no layer, or `lr` is a list whose length is not the number of layer
            groups that train. The message has a line for each mistake.
    """
    found = [sentence for _, sentence in _stage_mistakes(classifier, recipe, stages)]
    if found:
        raise OptionError(*(found if len(found) == 1 else format_mistakes(recipe.name, found)))


def mistakes(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Yield the path and the description of each mistake of a recipe that concerns its network.

    No photos and no weights are read: the network is built on the meta device.
    """
    words = ("imagenet", "none", "auto")
    reads = os.environ.get("RANK", "0") == "0"  # under torchrun, the others need no file
    if reads and recipe.weights not in words and not _is_there(recipe.weights):
        hint, known = did_you_mean(recipe.weights, words), ", ".join(words)
        yield (
            ("weights",),
            f"weights = {recipe.weights!r}: no such file, and not one of {known}{hint}",
        )
    try:
        family = backbones.family_of(recipe.arch)
    except OptionError as error:
        yield ("arch",), str(error)
        return
    try:
        backbone = backbones.build_on_meta(recipe.arch, recipe.arch_args)
    except OptionError as error:
        yield ("arch_args",), f"{error}; without such options: 'arch_args={{}}'"
        return
    head = recipe.head
    try:
        pool = heads.build_pool(head, recipe.arch, family.pooled)
    except OptionError as error:
        yield ("head", "kind"), str(error)
        head = head.model_copy(update={"kind": "linear", "dropout": 0.0})
        pool = heads.build_pool(head, recipe.arch, family.pooled)
    layers = heads.build(head, backbone.width, classes=2).to("meta")
    classifier = Classifier(backbone.body, backbone.groups, pool, layers)
    try:
        stages = stages_of(recipe, recipe.weights != "none")
    except OptionError as error:
        yield ("stage",), str(error)
        return
    yield from _stage_mistakes(classifier, recipe, stages)


def _is_there(weights: str) -> bool:
    """Whether the file of weights exists; see `read_state_dict` for `~` and FILE::NAME."""
    path = os.path.expanduser(weights)
    return os.path.exists(path) or os.path.exists(path.partition("::")[0])


def _stage_mistakes(
    classifier: Classifier, recipe: Recipe, stages: Sequence[Stage]
) -> Iterator[tuple[Path, str]]:
    for number, stage in enumerate(stages):
        own: Path = ("stage", number)
        size_path: Path = (*own, "image_size") if stage.image_size else ("preprocess", "size")
        option = f"stage.{stage.name}.image_size" if stage.image_size else "preprocess.size"
        size = recipe.preprocess_of(stage).size
        try:
            backbones.check_size(recipe.arch, recipe.arch_args, size, option)
        except OptionError as error:
            if stage.image_size or not any(other.image_size == 0 for other in stages[:number]):
                yield size_path, str(error)
        try:
            decided = classifier.freezing_for(stage)
        except OptionError as error:
            yield (*own, "unfreeze"), f"stage.{stage.name}.unfreeze: {error}"
            continue
        try:
            layers = layer_groups(classifier.trainable_groups(decided), stage)
        except OptionError as error:
            yield (*own, "groups"), str(error)
            continue
        try:
            check_rates(layers, stage, 1.0 if stage.lr == "find" else stage.lr)
        except OptionError as error:
            yield (*own, "lr"), str(error)


def fallbacks(classifier: Classifier, stages: Sequence[Stage]) -> Iterator[str]:
    """Yield a log line for each stage that trains other layers than its patterns name."""
    for stage in stages:
        if freezing.uses_fallback(classifier.body, stage.unfreeze):
            assert not isinstance(stage.unfreeze, int | float | str)
            yield (
                f"stage {stage.name}: the network has no layers {stage.unfreeze[0]!r}, "
                f"so unfreeze = {stage.unfreeze[-1]}"
            )


def build_classifier(recipe: Recipe, classes: int, log: Log) -> tuple[Classifier, bool]:
    """Create the recipe's network. Torch's global random state is set from the recipe's seed.

    With `weights = "auto"`, the network starts from random weights if the ImageNet weights are not
    available.

    Returns:
        The network, and whether its body has pretrained weights.
    """

    def with_weights(weights: str) -> Classifier:
        torch.manual_seed(recipe.seed)
        return create_classifier(
            recipe.arch, classes, arch_args=recipe.arch_args, head=recipe.head, weights=weights
        )

    if recipe.weights != "auto":
        return with_weights(recipe.weights), recipe.weights != "none"
    try:
        return with_weights("imagenet"), True
    except DataError as error:
        log(f"warning: weights = 'auto': {error}; training from scratch")
        return with_weights("none"), False


def info(recipe: Recipe, dataset: Dataset) -> checkpoint.CheckpointInfo:
    """Return the description of a run's checkpoints, without metrics."""
    return checkpoint.CheckpointInfo(
        name=recipe.name,
        arch=recipe.arch,
        classes=dataset.classes,
        preprocess=recipe.preprocess,
        arch_args=recipe.arch_args,
        head=recipe.head.model_dump(mode="json"),
        seed=recipe.seed,
        data={
            "source": dataset.source,
            "root": str(dataset.root),
            "fingerprint": dataset.fingerprint,
            "train": len(dataset.train),
            "valid": len(dataset.valid),
        },
        versions=checkpoint.versions(),
    )
