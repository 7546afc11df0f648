"""Define the table rows of an ablation: fine-tuning techniques as changes of a recipe's options."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from serving.errors import OptionError
from training.config import load
from training.config.schema import Recipe, Spread
from training.config.sections import TtaConfig

Values = dict[str, Any]
Change = Mapping[str, Any] | Callable[[Recipe], Mapping[str, Any]]

SMALLER: Final = 4 / 7
"""Image size of the first half of progressive resizing, relative to the recipe's: 128 of 224."""
TTA_VIEWS: Final = 4


@dataclass(frozen=True)
class Trick:
    """A fine-tuning technique; one row of an ablation's table.

    Attributes:
        name: Name of the row.
        group: Name of a group of rows that `--rows` can select together.
        on: Name of the row whose recipe this row changes; "" is the base recipe. The accuracies of
            the two rows are compared.
        what: The change in a few words.
        change: The changed options, or a function that computes them from the recipe of `on`:

            - The options of a table, such as [head], replace only the same options of the recipe.
            - [augment] replaces the whole table of the recipe.
            - A table for [[stage]] changes these options in every stage.
            - A list for [[stage]] replaces all stages.
        metric: "accuracy" (without test-time augmentation) or "accuracy_tta" (with it).
    """

    name: str
    group: Literal["first", "onoff", "augment"]
    on: str
    what: str
    change: Change = field(default_factory=dict)
    metric: Literal["accuracy", "accuracy_tta"] = "accuracy"


def _frozen(recipe: Recipe) -> Mapping[str, Any]:
    """Return the changes for a linear head with one learning rate on a frozen body."""
    stages = []
    for stage, values in zip(recipe.stage, values_of(recipe)["stage"], strict=True):
        lr = stage.lr
        head = lr[-1] if isinstance(lr, tuple) else lr.high if isinstance(lr, Spread) else lr
        frozen = {
            "unfreeze": 0, "groups": 0, "lr_divide": 1.0, "frozen_batchnorm": "stats",
        }  # fmt: skip
        stages.append({**values, **frozen, "lr": head})
    return {"head": {"kind": "linear", "dropout": 0.0}, "stage": stages}


def _restarts(recipe: Recipe) -> Mapping[str, Any]:
    """Return the changes that restart the learning-rate schedule after every epoch.

    The number of epochs of each stage stays the same.
    """
    stages = zip(recipe.stage, values_of(recipe)["stage"], strict=True)
    cycles = {"schedule": "sgdr", "cycle_len": 1, "cycle_mult": 1.0}
    return {"stage": [{**values, **cycles, "cycles": stage.epochs} for stage, values in stages]}


def _small_first(recipe: Recipe) -> Mapping[str, Any]:
    """Split every stage of two or more epochs in two halves, the first half with smaller images."""
    halves: list[Values] = []
    for stage, values in zip(recipe.stage, values_of(recipe)["stage"], strict=True):
        size = recipe.preprocess_of(stage).size
        small = max(32, round(size * SMALLER / 32) * 32)
        half = stage.epochs // 2
        if half and small < size:
            first = {"name": f"{stage.name}-small", "image_size": small, "cycle_len": half}
            halves.append({**values, **first, "cycles": 1})
        halves.append({**values, "cycle_len": stage.epochs - half, "cycles": 1})
    if len(halves) == len(recipe.stage):
        raise OptionError("progressive resizing needs a stage of two epochs and 64 px or more")
    return {"stage": halves}


def _augment(**options: Any) -> Mapping[str, Any]:
    """Return the change that sets the augmentation of all stages: preset "none" and `options`."""
    return {"augment": {"preset": "none", **options}, "stage": {"augment": {}}}


ROWS: Final = (
    Trick(
        "features", "first", "",
        "feature extractor: a linear head on a frozen body whose BatchNorm statistics are updated",
        _frozen,
    ),
    Trick(
        "bn_eval", "first", "features",
        "its BatchNorm in eval mode: ImageNet's statistics are kept",
        {"stage": {"frozen_batchnorm": "eval"}},
    ),
    Trick(
        "bn_alone", "first", "features",
        "only BatchNorm's scale and shift train besides the head",
        {"stage": {"frozen_batchnorm": "train"}},
    ),
    Trick(
        "bn_moves", "first", "bn_alone",
        "the whole network trains, the body at a hundredth of the head's rate, BatchNorm too",
        {
            "stage": {
                "unfreeze": "all", "groups": 2, "lr_divide": 100.0,
                "batchnorm": "train", "frozen_batchnorm": "eval",
            },
        },
    ),
    Trick(
        "bn_fixed", "first", "bn_moves",
        "the same with BatchNorm's statistics fixed",
        {"stage": {"batchnorm": "fixed"}},
    ),
    Trick(
        "concat_pool", "first", "bn_fixed",
        "average and max pooling concatenated, and BatchNorm",
        {"head": {"kind": "concat_pool", "hidden": [], "dropout": 0.0}},
    ),
    Trick(
        "deep_head", "first", "concat_pool",
        "a hidden layer of 512, dropout 0.5",
        {"head": {"hidden": [512], "dropout": 0.5}},
    ),
    Trick(
        "augmentation", "onoff", "bn_fixed",
        "the preset photo",
        {"augment": {"preset": "photo"}, "stage": {"augment": {}}},
    ),
    Trick("sgdr", "onoff", "bn_fixed", "cosine with a restart every epoch", _restarts),
    Trick("resizing", "onoff", "bn_fixed", "the first half of the epochs on small photos",
        _small_first),
    Trick(
        "decay", "onoff", "bn_fixed",
        "decoupled weight decay of 0.01",
        {"optimizer": {"weight_decay": 0.01, "decay": "decoupled"}},
    ),
    Trick("tta", "onoff", "bn_fixed", f"test-time augmentation, {TTA_VIEWS} views of each photo",
        metric="accuracy_tta"),
    Trick(
        "none", "augment", "",
        "no augmentation",
        {**_augment(), "label_smoothing": 0.0},
    ),
    Trick("flip", "augment", "none", "mirrored", _augment(flip="horizontal")),
    Trick("crop", "augment", "none", "random resized crop of 35 % and more",
        _augment(crop="random", scale=[0.35, 1.0], ratio=1.2)),
    Trick("rotate", "augment", "none", "up to 10 degrees", _augment(max_rotate=10.0)),
    Trick("zoom", "augment", "none", "closer by up to 1.2", _augment(max_zoom=1.2)),
    Trick("shift", "augment", "none", "by up to a tenth of the side", _augment(max_shift=0.1)),
    Trick("warp", "augment", "none", "perspective of up to a fifth", _augment(max_warp=0.2)),
    Trick("lighting", "augment", "none", "brightness and contrast by up to a fifth",
        _augment(max_lighting=0.2)),
    Trick("saturation", "augment", "none", "by up to a fifth", _augment(max_saturation=0.2)),
    Trick("hue", "augment", "none", "by up to a twentieth of the colour circle",
        _augment(max_hue=0.05)),
    Trick("erase", "augment", "none", "a rectangle in a quarter of the photos",
        _augment(erase=0.25)),
    Trick("rand_augment", "augment", "none", "2 operations of magnitude 9",
        _augment(policy="rand_augment")),
    Trick("trivial_augment", "augment", "none", "one operation of any magnitude",
        _augment(policy="trivial_augment")),
    Trick("mixup", "augment", "none", "alpha 0.4", _augment(mixup=0.4)),
    Trick("cutmix", "augment", "none", "alpha 1", _augment(cutmix=1.0)),
    Trick("smoothing", "augment", "none", "label smoothing of 0.1", {"label_smoothing": 0.1}),
)  # fmt: skip

BY_NAME: Final = {row.name: row for row in ROWS}
GROUPS: Final = ("first", "onoff", "augment")


def choose(words: Iterable[str], option: str = "--rows") -> tuple[Trick, ...]:
    """Select table rows by name or group, and return them in table order.

    The rows with which selected rows are compared are returned, too.

    Raises:
        OptionError: A name is unknown; the message suggests the nearest name.
    """
    chosen: set[str] = set()
    for word in words:
        found = {row.name for row in ROWS if word in (row.name, row.group, "all")}
        if not found:
            near = difflib.get_close_matches(word, [*BY_NAME, *GROUPS, "all"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join([*GROUPS, *BY_NAME])}"
            raise OptionError(f"{option}: no row {word!r}; {hint}")
        chosen |= found
    chosen |= {BY_NAME[name].on for name in chosen}
    return tuple(row for row in ROWS if row.name in chosen)


def recipe_of(row: Trick, base: Recipe) -> Recipe:
    """Return the recipe of a table row.

    A row may build on another row, named in `row.on`. That row's changes are applied to `base`
    first, then the changes of `row` itself. Test-time augmentation is off in the result.

    Raises:
        OptionError: The changes are not valid for `base`.
    """
    below = recipe_of(BY_NAME[row.on], base) if row.on else base
    change = row.change(below) if callable(row.change) else row.change
    values = merged(values_of(below), change)
    values["tta"]["count"] = 0  # ablation.py evaluates with TTA after the measured time
    return load.parse(values, f"row {row.name}")


def views_of(base: Recipe) -> TtaConfig:
    """Return the options of test-time augmentation (TTA) for the table row `tta`.

    If TTA is on in the recipe `base`, the options of `base` are used. Otherwise the predictions for
    4 views (crops or flips) of a photo are averaged.
    """
    return base.tta if base.tta.count else TtaConfig(count=TTA_VIEWS)


def values_of(recipe: Recipe) -> Values:
    """Return the values of a recipe as in its TOML file, with all defaults filled in."""
    values = recipe.model_dump(mode="json", exclude={"preprocess"})
    return {**values, "preprocess": asdict(recipe.preprocess)}


def merged(values: Values, change: Mapping[str, Any]) -> Values:
    """Return a recipe's values with a change applied (see `Trick.change`)."""
    result = dict(values)
    for key, new in change.items():
        if key == "stage" and isinstance(new, Mapping):
            result[key] = [{**stage, **new} for stage in values[key]]
        elif isinstance(new, Mapping) and key != "augment":
            result[key] = {**values[key], **new}
        else:
            result[key] = new
    return result
