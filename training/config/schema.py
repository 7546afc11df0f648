"""What a recipe may say: its stages, and all its tables together.

How a file becomes a `Recipe`, and how mistakes are told, is in `training.config.load`.
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
"""More layer groups than any network has."""

AUTO: Final = 0
"""A batch size that is still to be found: "auto" until `training.engine.auto_batch_size.settle`."""

Rate = Annotated[float, Field(gt=0)]


class Spread(Section):
    """A range of learning rates, geometric from the deepest group that trains to the head."""

    low: Rate
    high: Rate

    @model_validator(mode="after")
    def _rises(self) -> Spread:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} must not be above high = {self.high}")
        return self


def _unfreeze(value: Any) -> Any:
    return ALL if value == "all" else value


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
"""Photos a step; `AUTO` is written as "auto"."""


def _augment(value: dict[str, Any]) -> dict[str, Any]:
    AugmentConfig.model_validate(value)  # pydantic tells its mistakes as this table's
    return value


def cycle_lengths(cycles: int, cycle_len: float, cycle_mult: float) -> list[float]:
    """The length of every cycle, in epochs: cycle_len, cycle_len * cycle_mult, and on."""
    return [cycle_len * cycle_mult**i for i in range(cycles)]


class Stage(Section):
    """One stage of a fine-tune; docs/recipe.md says what each option does.

    unfreeze: how many of the body's last layer groups train beside the head; 0 is the head alone,
        "all" the whole network, "gradual" one group more than the stage before; or patterns of
        parameter names of the body, such as "denseblock4.*".
    lr: the head's learning rate; "find" runs lr_find first; a list has one for each group that
        trains, the head's last; { low, high } spreads them geometrically.
    lr_divide: every group's rate is that of the group behind it divided by this, where `lr` is one
        number or "find".
    groups: how many groups, the head being one, what trains is merged into; 0 keeps the
        architecture's own layer groups.
    floor, gamma, step_every, warm_up, scale, scale_per, momentum_low: see `optim.schedules`.
    batchnorm: of unfrozen BatchNorms: "fixed" keeps their statistics and trains scale and shift.
    frozen_batchnorm: of frozen ones: "eval" fixes all of it, "stats" lets the statistics move,
        "train" trains scale and shift, too.
    views: augmented views of each photo that a frozen prefix is run on; "auto" is one for each
        epoch, as far as there is room to keep them; 0 keeps none.
    image_size: of this stage; 0 is preprocess.size. patience: epochs without a lower validation
        loss before the stage ends and its best epoch is restored; 0 never ends early.
    augment: options of [augment] that are different in this stage.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    unfreeze: Annotated[
        Annotated[int, Field(ge=0)] | Literal["gradual"] | tuple[str, ...],
        BeforeValidator(_unfreeze),
    ] = 0
    lr: Literal["find"] | Rate | Annotated[tuple[Rate, ...], Field(min_length=1)] | Spread = "find"
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
    views: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
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
        """How many views of each photo its epochs take turns with, if there is room for them."""
        return self.epochs if self.views == "auto" else min(self.views, self.epochs)

    @property
    def epochs(self) -> int:
        """Whole epochs of all cycles."""
        return max(1, round(sum(cycle_lengths(self.cycles, self.cycle_len, self.cycle_mult))))


def _preprocess(value: Any) -> Any:
    if isinstance(value, Mapping):
        try:
            return Preprocess.from_dict(value)
        except (OptionError, TypeError) as error:
            raise ValueError(str(error)) from None
    return value


class Recipe(Section):
    """A whole recipe; see `recipes/quick.toml` for one with comments.

    weights: "imagenet", "none", "auto" (imagenet if it can be had, else none, said aloud), a path.
    batch_size: photos a step; "auto" is the largest that fits, found before the run.
    precision: of the forward and backward pass; auto is bf16 on GPUs and CPUs that have it, fp32
        elsewhere.
    compile: whether what trains is compiled; "cuda_graphs" replays its kernels as one instead.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    arch: str
    arch_args: dict[str, Any] = Field(default_factory=dict)
    weights: str = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
    batch_size: BatchSize = 32
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: StrictBool | Literal["cuda_graphs"] = False
    head: HeadConfig = HeadConfig()
    preprocess: Annotated[Preprocess, BeforeValidator(_preprocess)] = Preprocess()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_find: LrFindConfig = LrFindConfig()
    tta: TtaConfig = TtaConfig()
    stage: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _normalised_as_trained(cls, values: Any) -> Any:
        """Nets ported from TensorFlow come with weights for pixels in -1 to 1."""
        if not isinstance(values, Mapping) or values.get("arch") not in HALF_NORMALISED:
            return values
        given = values.get("preprocess", {})
        if not isinstance(given, Mapping):
            return values
        half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        return {**values, "preprocess": {**half, **given}}

    def preprocess_of(self, stage: Stage) -> Preprocess:
        """The preprocessing at a stage's image size."""
        return replace(self.preprocess, size=stage.image_size or self.preprocess.size)

    def augment_of(self, stage: Stage) -> AugmentConfig:
        """The augmentation of a stage: the recipe's, with the stage's own options over it."""
        if "preset" in stage.augment:
            return AugmentConfig.model_validate(stage.augment)
        return AugmentConfig.model_validate({**self.augment.model_dump(), **stage.augment})


HALF_NORMALISED: Final = ("efficientnet_v2_l", "googlenet", "inception_v3")
