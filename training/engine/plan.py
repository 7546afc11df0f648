"""Preparation of a run: determine the stages, create the network, check the stages."""

from __future__ import annotations

import torch

from serving.errors import DataError, OptionError
from training.config.schema import ALL, Recipe, Spread, Stage
from training.data.dataset import Dataset
from training.models import backbones
from training.models.classifier import Classifier, create_classifier
from training.optim.optimizer import check_rates, layer_groups
from training.run import checkpoint
from training.utils.console import Log


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
                    f"stage.{stage.name}.unfreeze = 'gradual': the stage before must count groups"
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


def check(classifier: Classifier, recipe: Recipe, stages: list[Stage]) -> None:
    """Check the options of all stages before training; the classifier is not changed.

    Raises:
        OptionError: The architecture does not support the image size of a stage, a pattern in
            `unfreeze` matches no layer, or `lr` is a list whose length is not the number of layer
            groups that train.
    """
    for stage in stages:
        option = f"stage.{stage.name}.image_size" if stage.image_size else "preprocess.size"
        size = recipe.preprocess_of(stage).size
        backbones.check_size(recipe.arch, recipe.arch_args, size, option)
        trainable = classifier.trainable_groups(classifier.freezing_for(stage))
        layers = layer_groups(trainable, stage)
        check_rates(layers, stage, 1.0 if stage.lr == "find" else stage.lr)


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
