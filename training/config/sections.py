"""The TOML tables of a recipe other than `[[stage]]`, such as `[data]` and `[augment]`.

Each class defines the options of one table, with their defaults and valid values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

from serving.imaging.tta import VIEWS
from training.config.forms import accepts


class Section(BaseModel):
    """Base class for a table of a recipe; unknown option names are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Options for reading labels from the data folder, for splitting, and for caching photos.

    `valid` and `folds` draw the training/validation split at random. They concern only photos whose
    split is not defined already, by a folder such as `train` or by a `--split` file.

    Attributes:
        pattern: Regular expression that is searched in file names; its first group is the label.
        csv: CSV file in the data folder with one line per photo.
        columns: Names of two columns of `csv`: the photo's id and its label.
        suffix: Text that is appended to the id to get the file name.
        images: Folder of the photos inside the data folder, for `pattern` and `csv`.
        layout: "auto" recognises folders of parts and refuses what can be read in two ways;
            "classes" takes every folder for a class; "inner" takes the folders of the innermost
            level that all have about the same names, such as `daisy` in `2023/daisy`.
        synsets: Labels of ImageNet's folders, such as n01440764: "names" takes the names from a
            list beside the folders, such as `words.txt`, if there is one; "keep" keeps the numbers.
        valid: Share of each class that is held out for validation, in (0, 1).
        folds: Number of cross-validation folds to split each class into; 0 uses `valid` instead.
        fold: Number of the fold to validate on, from 0; training uses all other folds. The folds
            are those that `folds` draws, or the numbered folds of a `--split` file.
        group: Photos that stay together in the split that is drawn: "folder", those of one folder;
            else a regular expression that is searched in the path, and whose first group, or match,
            is the name of what stays together; "" draws each photo by itself.
        similar: What is done with classes whose names look alike, such as `Cat` and `cat`, or `7`
            and `007`: "refuse" them, "merge" them to one class, or "keep" them.
        presize: Side of the cached training photos, as a multiple of the image size.
    """

    pattern: str = ""
    csv: str = ""
    columns: Annotated[
        tuple[str, str], accepts("use the names of two columns, of the id and of the label")
    ] = ("id", "label")
    images: str = ""
    suffix: str = ""
    layout: Literal["auto", "classes", "inner"] = "auto"
    synsets: Literal["names", "keep"] = "names"
    valid: float = Field(0.2, gt=0, lt=1)
    folds: int = Field(0, ge=0, le=1000)
    fold: int = Field(0, ge=0)
    group: str = ""
    similar: Literal["refuse", "merge", "keep"] = "refuse"
    presize: float = Field(1.5, ge=1, le=4)

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

    @field_validator("group")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"neither 'folder' nor a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.pattern and self.csv:
            raise ValueError("pattern and csv both give labels; keep one")
        if self.folds == 1:
            raise ValueError("folds = 1: use 2 or more")
        if self.folds and self.fold >= self.folds:
            raise ValueError(f"fold = {self.fold} of folds = {self.folds}: count folds from 0")
        if self.columns[0] == self.columns[1]:
            raise ValueError(f"columns are both {self.columns[0]!r}: name the id's and the label's")
        if self.pattern and (idle := self.of_tables()):
            raise ValueError(f"{idle[0]} has no effect with pattern; leave it out")
        if self.layout != "auto" and (self.csv or self.pattern):
            raise ValueError("layout has no effect with csv or pattern; leave it out")
        return self

    def of_tables(self) -> list[str]:
        """Return the names of options that are set and are for tables of labels alone."""
        defaults = {"columns": ("id", "label"), "suffix": ""}
        return [name for name, default in defaults.items() if getattr(self, name) != default]


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
"""Options that a preset changes from their defaults; options in the recipe override both.

basic, side_on and top_down are the transforms_basic, _side_on and _top_down of fast.ai 0.7.
"""


_SCALE: Final = "use [smallest, largest], both shares in (0, 1]"


def _check_scale(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError(_SCALE)
    return value


class AugmentConfig(Section):
    """Random augmentation of training photos; the preset supplies the options that are not set.

    Attributes:
        preset: Name of a set of options, see `PRESETS`.
        crop: "random" crops anywhere in the photo, "center" crops as in validation.
        flip: "horizontal" mirrors every second view of a photo; with "dihedral" the views have the
            8 symmetries of the square by turns.
        scale: Smallest and largest area of the random crop, as a share of the photo's largest
            square.
        ratio: Largest aspect ratio of the crop; 1 keeps it square.
        max_rotate: Largest rotation in either direction, in degrees.
        max_zoom: Largest zoom factor.
        max_shift: Largest shift, as a share of the crop's side.
        max_warp: Largest perspective change, as a share of the side.
        max_lighting: Largest relative change of brightness and contrast.
        max_saturation: Largest relative change of saturation.
        max_hue: Largest rotation of the hue in either direction, as a share of the colour circle.
        policy: Policy of random operations: "rand_augment", "trivial_augment" or "none".
        policy_ops: Number of operations of rand_augment.
        policy_magnitude: Magnitude of rand_augment, from 0 to 30.
        erase: Probability that a rectangle is erased.
        mixup: Alpha of mixup's Beta distribution; 0 is off.
        cutmix: Alpha of cutmix's Beta distribution; 0 is off.
    """

    preset: Literal["none", "basic", "side_on", "top_down", "photo"] = "photo"
    crop: Literal["random", "center"] = "random"
    flip: Literal["none", "horizontal", "dihedral"] = "none"
    scale: Annotated[tuple[float, float], AfterValidator(_check_scale), accepts(_SCALE)] = (
        1.0,
        1.0,
    )
    ratio: float = Field(1.0, ge=1, le=2)
    max_rotate: float = Field(0.0, ge=0, le=180)
    max_zoom: float = Field(1.0, ge=1, le=10)
    max_shift: float = Field(0.0, ge=0, le=0.5)
    max_warp: float = Field(0.0, ge=0, le=0.5)
    max_lighting: float = Field(0.0, ge=0, lt=1)
    max_saturation: float = Field(0.0, ge=0, le=1)
    max_hue: float = Field(0.0, ge=0, le=0.5)
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
        """Whether mixup or cutmix is on; activations can't be cached per photo then."""
        return self.mixup > 0 or self.cutmix > 0


def _widths(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class HeadConfig(Section):
    """Options of the classifier head.

    Attributes:
        kind: The layers of the head:

            - "concat_pool": average and max pooling, concatenated; then BatchNorm, dropout, Linear,
              ReLU for each hidden layer; then BatchNorm, dropout, Linear (fast.ai, "Practical Deep
              Learning for Coders", 2018).
            - "deep": average pooling; then dropout, Linear, BatchNorm, ReLU for each hidden layer;
              then dropout, Linear.
            - "linear": average pooling, dropout and one Linear.
        hidden: Width of each hidden layer, for "concat_pool" and "deep".
        dropout: Dropout probability in [0, 1) before the last Linear; half of it is used before the
            other Linear layers. A list has one probability for every Linear.
    """

    kind: Literal["concat_pool", "deep", "linear"] = "concat_pool"
    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        BeforeValidator(_widths),
        accepts("use a width or a list of widths, each at least 1"),
    ] = (512,)
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | tuple[Annotated[float, Field(ge=0, lt=1)], ...],
        accepts("use a share in [0, 1), or a list with one for every Linear layer"),
    ] = 0.5

    @model_validator(mode="after")
    def _one_for_each(self) -> HeadConfig:
        layers = 1 if self.kind == "linear" else len(self.hidden) + 1
        if isinstance(self.dropout, tuple) and len(self.dropout) != layers:
            raise ValueError(
                f"dropout has {len(self.dropout)} values for {layers} Linear layers; "
                "one number fits any head"
            )
        return self


class OptimizerConfig(Section):
    """Options of the optimizer.

    Attributes:
        kind: The algorithm: "sgd", "adam" or "adamw".
        momentum: Momentum of sgd; first beta of adam and adamw.
        nesterov: Whether sgd uses Nesterov momentum.
        weight_decay: Factor of the weight decay.
        decay: "l2" adds weight_decay times the weights to the gradient. "decoupled" subtracts lr
            times weight_decay times the weights from the weights. "auto" is decoupled for adamw and
            l2 for the others.
        decay_norms: Whether weight decay is also applied to norm layers and biases.
        l1: Factor of the L1 decay: `l1` times the sign of each weight is added to the gradient.
        clip_norm: Largest norm of all gradients together; 0 is off.
        accumulate: Number of batches per optimizer step.
        ema: Decay of the exponential moving average of the weights; 0 is off. The average is
            validated and saved instead of the weights.
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
    """Options of the learning rate range test, used by stages with `lr = "find"`.

    Attributes:
        pick: Name of the suggested rate to use. Except for "minimum", the rate is limited to a
            tenth of the rate with the lowest loss.
        direction: "up" tests from low to high rates, "down" from high to low rates.
        low: Lowest tested rate.
        high: Highest tested rate.
        steps: Number of tested rates.
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
    """Test-time augmentation (TTA) of the evaluation at the end of a run.

    The predictions for several views (crops or flips) of a photo are averaged. The plain view is
    the unaugmented photo, as in validation.

    Attributes:
        kind: "views" uses the fixed views of the service. "flip", "five_crop" and "multi_scale" use
            other fixed views. "draws" uses the plain view and random training augmentations.
        count: Number of views or random augmentations; 0 switches TTA off for every kind. The kinds
            flip, five_crop and multi_scale have a fixed number of views.
        average: "mean" averages probabilities, "log_mean" averages their logarithms.
        plain_weight: Weight of the plain view, from 0 to 1; the other views share the rest. 0 gives
            all views the same weight.
    """

    kind: Literal["views", "flip", "five_crop", "multi_scale", "draws"] = "views"
    count: int = Field(4, ge=0, le=1000)
    average: Literal["mean", "log_mean"] = "mean"
    plain_weight: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _as_many_as_there_are(self) -> TtaConfig:
        if self.kind == "views" and self.count > len(VIEWS):
            raise ValueError(
                f"count = {self.count}: there are {len(VIEWS)} fixed views; "
                "use fewer, or kind = 'draws'"
            )
        return self
