"""Plan which consecutive training stages share cached outputs of frozen layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.config.schema import Recipe, Stage
from training.models.classifier import Classifier


@dataclass(frozen=True)
class SharedPrefix:
    """Frozen layers at the start of the network that a group of stages has in common.

    The outputs of these layers are cached once for all stages of the group. The stages of a group
    are consecutive and have the same preprocessing and augmentation.

    Attributes:
        depth: Number of children of the body that are frozen in all stages of the group; 0: nothing
            is cached.
        views: Number of cached augmented views of each photo: the largest number that a stage of
            the group needs.
        is_first, is_last: Whether this stage is the first, or the last, stage of the group.
        shared_with: Names of the other stages of the group.
        reason: Why nothing is cached although the recipe sets `views`; "" in all other cases.
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
    """Determine for each stage the frozen layers that it shares with neighbouring stages."""
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
    """Return the frozen layers that a stage caches if no other stage shares them."""
    views, depth = stage.wanted_views, classifier.freezing_for(stage).prefix
    if views and recipe.augment_of(stage).mixes:
        return SharedPrefix(reason="mixup and cutmix blend photos")
    if views and not depth and stage.frozen_batchnorm != "eval":
        return SharedPrefix(reason="the statistics of frozen BatchNorms change")
    return SharedPrefix(depth, views) if views and depth else SharedPrefix()


def _same_pictures(recipe: Recipe, one: Stage, other: Stage) -> bool:
    """Whether both stages have the same preprocessing and augmentation."""
    return (recipe.preprocess_of(one), recipe.augment_of(one)) == (
        recipe.preprocess_of(other),
        recipe.augment_of(other),
    )
