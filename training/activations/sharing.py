"""Which consecutive stages share the cached outputs of their frozen layers (the prefix)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.config.schema import Recipe, Stage
from training.models.classifier import Classifier


@dataclass(frozen=True)
class SharedPrefix:
    """The frozen layers whose outputs a stage caches, shared with neighbouring stages.

    Stages that share are consecutive and have the same preprocessing and augmentation.

    Attributes:
        depth: Number of children of the body that are frozen in all of these stages; 0: no cache.
        views: Number of cached views (random augmentations) of each photo: the largest number that
            one of these stages needs.
        is_first, is_last: Whether the stage is the first, or the last, of these stages.
        shared_with: Names of the other stages.
        reason: Why nothing is cached although the recipe sets `views`; "" otherwise.
    """

    depth: int = 0
    views: int = 0
    is_first: bool = True
    is_last: bool = True
    shared_with: tuple[str, ...] = ()
    reason: str = ""


def plan_sharing(
    classifier: Classifier, recipe: Recipe, stages: Sequence[Stage]
) -> list[SharedPrefix]:
    """The shared prefix of each stage."""
    prefixes = [_own_prefix(classifier, recipe, stage) for stage in stages]
    start = 0
    for end in range(1, len(stages) + 1):
        can_share = end < len(stages) and prefixes[end].depth
        if can_share and _same_pictures(recipe, stages[start], stages[end]):
            continue
        group = range(start, end)
        depth = min(prefixes[i].depth for i in group)
        views = max(prefixes[i].views for i in group)
        for i in group:
            prefixes[i] = replace(
                prefixes[i],
                depth=depth,
                views=views,
                is_first=i == start,
                is_last=i == end - 1,
                shared_with=tuple(stages[k].name for k in group if k != i),
            )
        start = end
    return prefixes


def _own_prefix(classifier: Classifier, recipe: Recipe, stage: Stage) -> SharedPrefix:
    """The prefix whose outputs a stage would cache if it shared them with no other stage."""
    views, depth = stage.wanted_views, classifier.freezing_for(stage).prefix
    if views and recipe.augment_of(stage).mixes:
        return SharedPrefix(reason="mixup and cutmix blend photos")
    if views and not depth and stage.frozen_batchnorm != "eval":
        return SharedPrefix(reason="the statistics of frozen BatchNorms change")
    return SharedPrefix(depth, views) if views and depth else SharedPrefix()


def _same_pictures(recipe: Recipe, one: Stage, other: Stage) -> bool:
    """Whether a view with the same number has the same pictures in both stages."""
    return (recipe.preprocess_of(one), recipe.augment_of(one)) == (
        recipe.preprocess_of(other),
        recipe.augment_of(other),
    )
