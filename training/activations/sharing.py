"""Which stages share what they have frozen, and the views that it is run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.config.schema import Recipe, Stage
from training.models.classifier import Classifier


@dataclass(frozen=True)
class SharedPrefix:
    """What a stage computes once, with the stages before and behind it that can share it.

    depth: children of the body that all of them have frozen; 0 keeps nothing. views: that the
    epochs of the one that needs most take turns with. follows: the stage before saw these views;
    last: the next one sees others. with_: names of the other stages. why: why nothing is kept
    though views were asked for.
    """

    depth: int = 0
    views: int = 0
    last: bool = True
    follows: bool = False
    with_: tuple[str, ...] = ()
    why: str = ""


def shares(classifier: Classifier, recipe: Recipe, stages: Sequence[Stage]) -> list[SharedPrefix]:
    """What each stage shares with its neighbours."""
    found: list[SharedPrefix] = []
    for stage in stages:
        why, wanted, depth = "", stage.wanted_views, classifier.freezing_for(stage).prefix
        if wanted and recipe.augment_of(stage).mixes:
            why = "mixup and cutmix blend photos"
        elif wanted and not depth and stage.frozen_batchnorm != "eval":
            why = "the frozen BatchNorms move"
        found.append(
            SharedPrefix(why=why) if why or not (wanted and depth) else SharedPrefix(depth, wanted)
        )
    start = 0
    for end in range(1, len(stages) + 1):
        if end < len(stages) and found[end].depth and _alike(recipe, stages[start], stages[end]):
            continue
        group = range(start, end)
        depth, views = (min(found[i].depth for i in group), max(found[i].views for i in group))
        for i in group:
            others = tuple(stages[k].name for k in group if k != i)
            found[i] = replace(
                found[i],
                depth=depth,
                views=views,
                last=i == end - 1,
                follows=i > start,
                with_=others,
            )
        start = end
    return found


def _alike(recipe: Recipe, one: Stage, other: Stage) -> bool:
    """Whether two stages see the same pictures in a view of the same number."""
    return (recipe.preprocess_of(one), recipe.augment_of(one)) == (
        recipe.preprocess_of(other),
        recipe.augment_of(other),
    )
