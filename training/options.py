"""What a recipe may say: its tables, their options, defaults and legal values.

How a file becomes a `Recipe`, and how mistakes are told, is in `training.config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from serving.errors import OptionError
from serving.preprocess import Preprocess
from training.formula import compile_formula
from training.schedule import cycle_lengths


class Section(BaseModel):
    """A table of the recipe: unknown names are mistakes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Where labels come from and how photos are split, where folders and `--split` don't say it.

    pattern: regular expression searched in file names; its first group is the label.
    csv: a table below the data folder with a line a photo; columns: of the photo's id and its
        label; images: folder of the photos below the data folder; suffix: added to the id.
    valid: share of each class that is held out.
    folds: cut each class into so many parts instead; fold: the one to validate on, from 0, also in
        a `--split` file.
    """

    pattern: str = ""
    csv: str = ""
    columns: tuple[str, str] = ("id", "label")
    images: str = ""
    suffix: str = ""
    valid: float = Field(0.2, gt=0, lt=1)
    folds: int = Field(0, ge=0, le=1000)
    fold: int = Field(0, ge=0)

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        if value and not groups:
            raise ValueError("put the label in parentheses, as in '([a-zA-Z_]+)_[0-9]+'")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.pattern and self.csv:
            raise ValueError("pattern and csv both give labels; keep one")
        if self.folds == 1 or (self.folds and self.fold >= self.folds):
            raise ValueError(f"fold = {self.fold} of folds = {self.folds}: count folds from 0")
        return self


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "none": {"crop": "center", "flip": "none", "scale": (1.0, 1.0), "ratio": 1.0},
    "basic": {"flip": "none", "max_rotate": 10.0, "max_lighting": 0.05},
    "side_on": {"flip": "horizontal", "max_rotate": 10.0, "max_lighting": 0.05},
    "top_down": {"flip": "dihedral", "max_rotate": 10.0, "max_lighting": 0.05},
    "photo": {
        "flip": "horizontal",
        "scale": (0.35, 1.0),
        "ratio": 1.2,
        "max_rotate": 10.0,
        "max_zoom": 1.1,
        "max_lighting": 0.2,
        "max_saturation": 0.2,
    },
}
"""Options that a preset sets beside the neutral defaults; the recipe's own win over both.

basic, side_on and top_down are the transforms_basic, _side_on and _top_down of fast.ai 0.7.
"""


def _share(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("use [smallest, largest], both shares in (0, 1]")
    return value


class AugmentConfig(Section):
    """Random changes to training photos; what is not given comes from the preset.

    crop: "random" cuts anywhere in the photo, "center" where validation does.
    scale: smallest and largest area of the random crop, as a share of the photo's largest square.
    ratio: widest stretch of the crop's sides; 1 is none.
    flip: "horizontal" mirrors half of the views; "dihedral" takes one of the 8 symmetries of the
        square. max_rotate: degrees either way. max_zoom: closer by up to this factor.
    max_shift: as a share of the crop's side. max_warp: perspective, as a share of the side.
    max_lighting: largest change of brightness and contrast. max_saturation: of saturation.
    policy: "rand_augment" or "trivial_augment"; policy_ops, policy_magnitude: of rand_augment.
    erase: probability that a rectangle is erased. mixup, cutmix: their Beta's alpha; 0 is off.
    """

    preset: Literal["none", "basic", "side_on", "top_down", "photo"] = "photo"
    crop: Literal["random", "center"] = "random"
    flip: Literal["none", "horizontal", "dihedral"] = "none"
    scale: Annotated[tuple[float, float], AfterValidator(_share)] = (1.0, 1.0)
    ratio: float = Field(1.0, ge=1, le=2)
    max_rotate: float = Field(0.0, ge=0, le=180)
    max_zoom: float = Field(1.0, ge=1, le=10)
    max_shift: float = Field(0.0, ge=0, le=0.5)
    max_warp: float = Field(0.0, ge=0, le=0.5)
    max_lighting: float = Field(0.0, ge=0, lt=1)
    max_saturation: float = Field(0.0, ge=0, le=1)
    policy: Literal["none", "rand_augment", "trivial_augment"] = "none"
    policy_ops: int = Field(2, ge=1, le=16)
    policy_magnitude: int = Field(9, ge=0, le=30)
    erase: float = Field(0.0, ge=0, le=1)
    mixup: float = Field(0.0, ge=0, le=10)
    cutmix: float = Field(0.0, ge=0, le=10)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        preset = values.get("preset", "photo")
        return {**PRESETS.get(preset if isinstance(preset, str) else "", {}), **values}

    @property
    def mixes(self) -> bool:
        """Whether photos are mixed with each other, so that nothing of one photo can be cached."""
        return self.mixup > 0 or self.cutmix > 0


def _widths(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class HeadConfig(Section):
    """What stands on the body.

    kind: "concat_pool" is average and max pooling side by side, then BatchNorm, dropout, Linear,
        ReLU for each hidden layer, and BatchNorm, dropout, Linear (fast.ai, "Practical Deep
        Learning for Coders", 2018); "deep" is average pooling, then Linear, BatchNorm, ReLU,
        dropout for each hidden layer, and a Linear; "linear" is average pooling, dropout and one
        Linear.
    hidden: width of each hidden layer of concat_pool and deep.
    dropout: in [0, 1): before the last Linear, half of it before the others; or a list with one
        for every Linear.
    """

    kind: Literal["concat_pool", "deep", "linear"] = "concat_pool"
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_widths)] = (512,)
    dropout: (
        Annotated[float, Field(ge=0, lt=1)] | tuple[Annotated[float, Field(ge=0, lt=1)], ...]
    ) = 0.5

    @model_validator(mode="after")
    def _one_for_each(self) -> HeadConfig:
        layers = 1 if self.kind == "linear" else len(self.hidden) + 1
        if isinstance(self.dropout, tuple) and len(self.dropout) != layers:
            raise ValueError(f"dropout has {len(self.dropout)} values for {layers} Linear layers")
        return self


class OptimizerConfig(Section):
    """How weights move.

    momentum: of sgd; first beta of adam and adamw. nesterov: of sgd.
    decay: "l2" adds weight_decay to the gradient, "decoupled" shrinks the weights by lr times it;
        "auto" is decoupled for adamw, l2 for the others. decay_norms: norms and biases, too.
    l1: added to the gradient as its sign. clip_norm: largest norm of all gradients; 0 is none.
    accumulate: batches a step. ema: decay of the moving average of weights that is validated and
        saved instead of the weights themselves; 0 is off.
    """

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(1e-4, ge=0)
    decay: Literal["auto", "l2", "decoupled"] = "auto"
    decay_norms: bool = False
    l1: float = Field(0.0, ge=0)
    clip_norm: float = Field(0.0, ge=0)
    accumulate: int = Field(1, ge=1, le=4096)
    ema: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _adamw_is_decoupled(self) -> OptimizerConfig:
        if self.kind == "adamw" and self.decay == "l2":
            raise ValueError("adamw with decay = 'l2' is adam; use kind = 'adam'")
        return self


class LrFindConfig(Section):
    """The range test of stages with `lr = "find"`.

    pick: which suggestion is taken; never past minimum / 10 unless "minimum" is asked for.
    direction: "up" from low to high, or "down" from high to low.
    """

    pick: Literal["valley", "steepest", "minimum/10", "minimum"] = "valley"
    direction: Literal["up", "down"] = "up"
    low: float = Field(1e-5, gt=0)
    high: float = Field(10.0, gt=0)
    steps: int = Field(80, ge=10, le=10_000)

    @model_validator(mode="after")
    def _ordered(self) -> LrFindConfig:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class TtaConfig(Section):
    """Test-time augmentation of the evaluation that ends a run.

    kind: "views" are the service's fixed views, "flip", "five_crop" and "multi_scale" fixed ones of
        one sort, "draws" random draws of the training augmentation beside the plain view.
    count: of views, or of draws; the other kinds have a number of their own. 0 is off.
    average: of probabilities or of their logarithms.
    plain_weight: weight of the plain view, the others share the rest; 0 weighs all alike.
    """

    kind: Literal["views", "flip", "five_crop", "multi_scale", "draws"] = "views"
    count: int = Field(4, ge=0, le=1000)
    average: Literal["mean", "log_mean"] = "mean"
    plain_weight: float = Field(0.0, ge=0, le=1)


ALL: Final = 99
"""More layer groups than any network has."""

Rate = Annotated[float, Field(gt=0)]


class Spread(Section):
    """A range of learning rates, geometric from the deepest group that trains to the head."""

    low: Rate
    high: Rate


def _unfreeze(value: Any) -> Any:
    return ALL if value == "all" else value


def _augment(value: dict[str, Any]) -> dict[str, Any]:
    AugmentConfig.model_validate(value)  # pydantic tells its mistakes as this table's
    return value


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
    floor, gamma, step_every, warm_up, scale, scale_per, momentum_low: see `training.schedule`.
    batchnorm: of unfrozen BatchNorms: "fixed" keeps their statistics and trains scale and shift.
    frozen_batchnorm: of frozen ones: "eval" fixes all of it, "stats" lets the statistics move,
        "train" trains scale and shift, too.
    views: augmented views of each photo that a frozen prefix is run on; 0 caches nothing.
    image_size: of this stage; 0 is preprocess.size. patience: epochs without a lower validation
        loss before the stage ends and its best epoch is restored; 0 never ends early.
    augment: options of [augment] that are different in this stage.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    unfreeze: Annotated[
        Annotated[int, Field(ge=0)] | Literal["gradual"] | tuple[str, ...],
        BeforeValidator(_unfreeze),
    ] = 0
    lr: (
        Literal["find"] | Rate | Annotated[tuple[Rate, ...], Field(min_length=1)] | Spread
    ) = "find"
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
    views: int = Field(4, ge=0)
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
            tried = range(1, self.cycles + 1) if self.scale_per == "cycle" else (0, 1, 100, 10_000)
            for x in tried:
                compile_formula(self.scale)(x)
        if self.schedule == "exp_range" and self.gamma < 0.9:
            raise ValueError("schedule = 'exp_range' takes gamma every step: use 0.999 or so")
        return self

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
    precision: of the forward and backward pass; auto is bf16 on GPUs that have
        it, fp32 elsewhere.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    arch: str
    arch_args: dict[str, Any] = Field(default_factory=dict)
    weights: str = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
    batch_size: int = Field(32, ge=2, le=65_536)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
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


HALF_NORMALISED: Final = ("googlenet", "inception_v3")
