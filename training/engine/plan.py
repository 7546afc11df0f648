"""What a run will do, found out before it begins: its stages, its network, its sizes."""

from __future__ import annotations

import torch

from serving.errors import DataError, OptionError
from training.config.schema import ALL, Recipe, Spread, Stage
from training.data.dataset import Dataset
from training.models import backbones
from training.models import classifier as model
from training.optim import optimizer as optim
from training.run import checkpoint
from training.utils.console import Log


def stages_of(recipe: Recipe, pretrained: bool) -> list[Stage]:
    """The stages as they are run: "gradual" counted out, and random weights never frozen."""
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
    """The stage for random weights: a frozen random body would teach the head nothing."""
    lr = stage.lr
    head = lr[-1] if isinstance(lr, tuple) else lr.high if isinstance(lr, Spread) else lr
    changes = {
        "unfreeze": ALL, "lr": head, "lr_divide": 1.0, "groups": 0, "batchnorm": "train",
        "frozen_batchnorm": "eval",
    }  # fmt: skip
    return stage.model_copy(update=changes)


def over_fitting(losses: list[float], patience: int) -> bool:
    """Whether the validation loss has not been lower for `patience` epochs; 0 is never."""
    if not patience or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= patience


def check(classifier: model.Classifier, recipe: Recipe, stages: list[Stage]) -> None:
    """Find before any work what would stop a stage later.

    Raises:
        OptionError: A size that does not fit, a pattern that matches nothing, a list of rates that
            is too long or too short.
    """
    for stage in stages:
        option = f"stage.{stage.name}.image_size" if stage.image_size else "preprocess.size"
        size = recipe.preprocess_of(stage).size
        backbones.check_size(recipe.arch, recipe.arch_args, size, option)
        trainable = classifier.trainable_groups(classifier.freezing_for(stage))
        layers = optim.layer_groups(trainable, stage)
        optim.check_rates(layers, stage, 1.0 if stage.lr == "find" else stage.lr)


def build_classifier(recipe: Recipe, classes: int, log: Log) -> tuple[model.Classifier, bool]:
    """The recipe's network, and whether its body comes with trained weights.

    Sets the random state by the recipe's seed.
    """

    def build(weights: str) -> model.Classifier:
        torch.manual_seed(recipe.seed)
        return model.build(
            recipe.arch, classes, arch_args=recipe.arch_args, head=recipe.head, weights=weights
        )

    if recipe.weights != "auto":
        return build(recipe.weights), recipe.weights != "none"
    try:
        return build("imagenet"), True
    except DataError as error:
        log(f"warning: weights = 'auto': {error}; training from scratch")
        return build("none"), False


def info(recipe: Recipe, dataset: Dataset) -> checkpoint.CheckpointInfo:
    """What the checkpoints of a run say of themselves, but for their metrics."""
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
