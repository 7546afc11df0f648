"""The recipe (training options from a TOML file): stages, top-level options and their defaults.

`training.config.load` reads recipe files, and `training.config.diagnostics` writes the messages for
errors in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StrictBool,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from serving.errors import OptionError
from serving.imaging.preprocess import Preprocess
from training.config.forms import accepts
from training.config.formula import compile_formula
from training.config.sections import (
    AugmentConfig,
    DataConfig,
    HeadConfig,
    LrFindConfig,
    OptimizerConfig,
    Section,
    TtaConfig,
)

ALL: Final = 99
"""Value of `unfreeze = "all"`: more layer groups than any network has."""

AUTO: Final = 0
"""Value of `batch_size = "auto"`, until `training.engine.auto_batch_size` finds the size."""

Rate = Annotated[float, Field(gt=0)]


class Spread(Section):
    """A range of learning rates: `low` for the deepest trained layer group, `high` for the head.

    The learning rates of the layer groups in between are spaced geometrically.
    """

    low: Rate
    high: Rate

    @model_validator(mode="after")
    def _rises(self) -> Spread:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} must not be above high = {self.high}")
        return self


def _unfreeze(value: Any) -> Any:
    return ALL if value == "all" else value


Share = Annotated[float, Field(gt=0, lt=1)]


def _patterns(value: tuple[str | int | float, ...]) -> tuple[str | int | float, ...]:
    if any(not isinstance(item, str) for item in (*value[:1], *value[:-1])):
        raise ValueError("patterns, and after them at most one number")
    return value


def _lr(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    # For a table pydantic then reports the errors of `low` and `high`, not one about forms of lr.
    return Spread.model_validate(value) if isinstance(value, Mapping) else check(value)


def _tables(value: Any) -> Any:
    tables = isinstance(value, list | tuple) and value
    if not tables or not all(isinstance(stage, Mapping | Stage) for stage in value):
        raise ValueError("write a table [[stage]] for each, at least one")
    return value


def _batch(value: Any, check: ValidatorFunctionWrapHandler) -> int:
    if value == "auto":
        return AUTO
    if isinstance(value, str):
        raise ValueError("use a number, at least 2, or 'auto'")
    size: int = check(value)
    return size


BatchSize = Annotated[
    Annotated[int, Field(ge=2, le=65_536)],
    WrapValidator(_batch),
    PlainSerializer(lambda size: size or "auto", return_type=int | str),
]
"""Photos per step; `AUTO` is written as "auto"."""


def _augment(value: dict[str, Any]) -> dict[str, Any]:
    AugmentConfig.model_validate(value)  # pydantic adds its errors to those of the recipe
    return value


def cycle_lengths(cycles: int, cycle_len: float, cycle_mult: float) -> list[float]:
    """Return the length of every cycle in epochs.

    Each cycle is `cycle_mult` times as long as the previous one.
    """
    return [cycle_len * cycle_mult**i for i in range(cycles)]


class Stage(Section):
    """One stage of a fine-tuning run; docs/recipe.md describes each option.

    Attributes:
        name: Name in overrides, logs and files.
        unfreeze: Number of the body's last layer groups that train in addition to the head. 0
            trains only the head, "all" the whole network, "gradual" one group more than the
            previous stage. A number between 0 and 1 is a share of the body's layers, counted from
            the end. A list has patterns for names of the body's parameters, such as
            "denseblock4.*"; a number at its end is for networks that have no such parameters.
        lr: Learning rate of the head. "find" finds it by the range test before the stage. A list
            has one rate for each trained group, with the head's rate last. { low, high } spaces the
            rates of the groups geometrically.
        lr_divide: Ratio of the rates of adjacent groups, if `lr` is one number or "find".
        groups: Number of parameter groups, including the head, into which the trained layers are
            merged. 0 keeps the architecture's layer groups.
        schedule: Learning-rate schedule. It uses the options cycles, cycle_len, cycle_mult,
            warm_up, floor, gamma, step_every, scale, scale_per and momentum_low; see
            `training.optim.schedules`.
        batchnorm: Mode of unfrozen BatchNorms. "fixed" keeps their statistics and trains scale and
            shift; "train" also updates the statistics.
        frozen_batchnorm: Mode of frozen BatchNorms. "eval" changes nothing, "stats" updates the
            statistics, "train" also trains scale and shift.
        views: Number of augmented views of each photo for which the outputs of the frozen layers
            are cached. "auto" is one view per epoch, or as many as fit the cache; 0 caches none.
        image_size: Side of the images in this stage, in pixels; 0 uses preprocess.size.
        patience: Number of epochs without a lower validation loss after which the stage ends and
            its best epoch is restored. 0 never ends the stage early.
        augment: Options of [augment] that differ in this stage.
    """

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9_-]*$"),
        accepts("use small letters, digits, '_' and '-', such as 'head'"),
    ]
    unfreeze: Annotated[
        Annotated[int, Field(ge=0)]
        | Share
        | Literal["gradual"]
        | Annotated[
            tuple[str | Annotated[int, Field(ge=0)] | Share, ...], AfterValidator(_patterns)
        ],
        BeforeValidator(_unfreeze),
        accepts(
            "use a number of layer groups, a share of the layers such as 0.2, 'all', 'gradual', "
            "or a list of patterns such as ['layer4.*']",
            *("all", "gradual"),
        ),
    ] = 0
    lr: Annotated[
        Literal["find"] | Rate | Annotated[tuple[Rate, ...], Field(min_length=1)] | Spread,
        accepts(
            "use 'find', a number above 0, a list with one for each group, "
            "or { low = 1e-5, high = 1e-3 }",
            "find",
        ),
        WrapValidator(_lr),
    ] = "find"
    lr_divide: float = Field(3.0, ge=1)
    groups: int = Field(0, ge=0, le=ALL)
    schedule: Literal[
        "sgdr", "cosine", "one_cycle", "triangular", "triangular2", "exp_range", "cyclical",
        "step", "plateau", "constant",
    ] = "sgdr"  # fmt: skip
    cycles: int = Field(1, ge=1, le=100)
    cycle_len: int = Field(1, ge=1, le=10_000)
    cycle_mult: float = Field(1.0, ge=1, le=10)
    warm_up: float = Field(0.0, ge=0)
    floor: float = Field(0.0, ge=0, lt=1)
    gamma: float = Field(0.1, gt=0, le=1)
    step_every: int = Field(1, ge=1)
    scale: str = ""
    scale_per: Literal["cycle", "step"] = "cycle"
    momentum_low: float = Field(0.85, ge=0, lt=1)
    batchnorm: Literal["fixed", "train"] = "fixed"
    frozen_batchnorm: Literal["eval", "stats", "train"] = "eval"
    views: Annotated[
        Annotated[int, Field(ge=0)] | Literal["auto"],
        accepts("use a number, 0 or more, or 'auto'", "auto"),
    ] = "auto"
    image_size: int = Field(0, ge=0, le=4096)
    patience: int = Field(0, ge=0)
    augment: Annotated[dict[str, Any], AfterValidator(_augment)] = Field(default_factory=dict)

    @field_validator("scale")
    @classmethod
    def _formula(cls, value: str) -> str:
        if value:
            compile_formula(value)
        return value

    @model_validator(mode="after")
    def _schedule_has_what_it_needs(self) -> Stage:
        if self.schedule == "cyclical":
            if not self.scale:
                raise ValueError("schedule = 'cyclical' needs scale, such as scale = '0.5 ** x'")
            for x in range(1, self.cycles + 1) if self.scale_per == "cycle" else range(self.epochs):
                compile_formula(self.scale)(x)
        elif self.scale:
            raise ValueError(f"scale has no effect with schedule = {self.schedule!r}")
        if self.warm_up > self.epochs:
            raise ValueError(f"warm_up = {self.warm_up} is longer than {self.epochs} epochs")
        if 0 < self.image_size < 8:
            raise ValueError(f"image_size = {self.image_size}: use 8 or more, or 0")
        if self.schedule == "exp_range" and self.gamma < 0.9:
            raise ValueError("schedule = 'exp_range' takes gamma every step: use 0.999 or so")
        return self

    @property
    def wanted_views(self) -> int:
        """Number of augmented views per photo to cache, if the cache is large enough."""
        return self.epochs if self.views == "auto" else min(self.views, self.epochs)

    @property
    def epochs(self) -> int:
        """Number of epochs: the sum of all cycle lengths, rounded, at least 1."""
        return max(1, round(sum(cycle_lengths(self.cycles, self.cycle_len, self.cycle_mult))))


# The fields that recipes had before `decode`. A recipe that a run recorded has all of them.
_RECORDED: Final = frozenset({"size", "crop", "interpolation", "mean", "std", "background"})


def _preprocess(value: Any) -> Any:
    if isinstance(value, Mapping):
        decode = "full" if value.keys() >= _RECORDED else "scaled"
        try:
            return Preprocess.from_dict({"decode": decode, **value})
        except (OptionError, TypeError) as error:
            raise ValueError(str(error)) from None
    return value


class Recipe(Section):
    """All options of a training run; `recipes/quick.toml` is an example with comments.

    Attributes:
        name: Name of the run's folder and of the model.
        arch: torchvision's name of the network.
        arch_args: Keyword arguments of torchvision's model builder.
        weights: Initial weights: "imagenet", "none", a path, or "auto" (imagenet if available, else
            none, with a log line).
        seed: Seed of all random numbers.
        batch_size: Photos per step. "auto" finds the largest size that fits in memory before the
            run.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        precision: Dtype of the forward and backward pass. "auto" is bf16 on GPUs and CPUs that
            support it, and fp32 on others.
        compile: Whether the trained layers are compiled; "cuda_graphs" captures them in a CUDA
            graph instead.
    """

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        accepts("use letters, digits, '.', '_' and '-'"),
    ]
    arch: str
    arch_args: dict[str, Any] = Field(default_factory=dict)
    weights: str = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
    batch_size: BatchSize = 32
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Annotated[
        StrictBool | Literal["cuda_graphs"],
        accepts("use true, false or 'cuda_graphs'", "cuda_graphs"),
    ] = False
    head: HeadConfig = HeadConfig()
    preprocess: Annotated[Preprocess, BeforeValidator(_preprocess)] = Preprocess(decode="scaled")
    data: DataConfig = DataConfig()
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_find: LrFindConfig = LrFindConfig()
    tta: TtaConfig = TtaConfig()
    stage: Annotated[tuple[Stage, ...], BeforeValidator(_tables)]

    @model_validator(mode="before")
    @classmethod
    def _normalised_as_trained(cls, values: Any) -> Any:
        """Set the default mean and std to 0.5 for architectures in `HALF_NORMALISED`.

        The pretrained weights of these architectures expect inputs from -1 to 1.
        """
        if not isinstance(values, Mapping) or values.get("arch") not in HALF_NORMALISED:
            return values
        given = values.get("preprocess", {})
        if not isinstance(given, Mapping):
            return values
        half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        return {**values, "preprocess": {**half, **given}}

    def preprocess_of(self, stage: Stage) -> Preprocess:
        """Return the preprocessing with the image size of a stage."""
        return replace(self.preprocess, size=stage.image_size or self.preprocess.size)

    def augment_of(self, stage: Stage) -> AugmentConfig:
        """Return a stage's augmentation: the recipe's options, overridden by the stage's options.

        If the stage sets a preset, the recipe's augmentation is not used.
        """
        if "preset" in stage.augment:
            return AugmentConfig.model_validate(stage.augment)
        return AugmentConfig.model_validate({**self.augment.model_dump(), **stage.augment})


HALF_NORMALISED: Final = ("efficientnet_v2_l", "googlenet", "inception_v3")
"""Architectures whose weights expect mean 0.5 and standard deviation 0.5."""
