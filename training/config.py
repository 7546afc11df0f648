"""What a recipe may say. Validated once, all mistakes reported together."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from serving.errors import OptionError
from serving.preprocess import Preprocess
from training.model import HeadConfig
from training.schedule import cycle_lengths


class Section(BaseModel):
    """A table of the recipe: unknown names are mistakes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """How photos are split where neither folders nor `--split` do it.

    valid: share of each class that is held out; fold: the validation fold of a `--split` file.
    """

    valid: float = Field(0.2, gt=0, lt=1)
    fold: int = Field(0, ge=0)


def _share(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("use [smallest, largest], both shares in (0, 1]")
    return value


class AugmentConfig(Section):
    """Random changes to training photos.

    scale: smallest and largest area of the random crop, as a share of the photo's largest square.
    ratio: widest stretch of the crop's sides; 1 is none.
    max_rotate: degrees either way. max_lighting: largest change of brightness and contrast.
    """

    flip: bool = True
    scale: Annotated[tuple[float, float], AfterValidator(_share)] = (0.35, 1.0)
    ratio: float = Field(1.2, ge=1, le=2)
    max_rotate: float = Field(10.0, ge=0, le=180)
    max_lighting: float = Field(0.2, ge=0, lt=1)


class OptimizerConfig(Section):
    """kind: sgd with Nesterov momentum (weight_decay is an L2 term) or adamw (decoupled).

    Weight decay spares norms and biases (Jia et al., 2018; He et al., 2019, "Bag of Tricks").
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)


ALL: Final = 99
"""More layer groups than any network has."""


def _unfreeze(value: Any) -> Any:
    return ALL if value == "all" else value


class Stage(Section):
    """One stage of a fine-tune.

    unfreeze: how many of the body's last layer groups train beside the head; 0 is the head alone,
        "all" the whole network. What stays frozen is wholly in eval mode.
    lr: the head's learning rate; "find" runs lr_find first.
    lr_divide: every layer group's rate is that of the group behind it divided by this.
    schedule: sgdr (`cycles` of `cycle_len` epochs, each `cycle_mult` times the one before),
        one_cycle or constant, both over the same number of epochs.
    batchnorm: "fixed" keeps the statistics of the body's BatchNorms where training left them and
        trains only their scale and shift, the better choice for small sets and small batches;
        "train" lets the unfrozen ones move.
    views: how many augmented views of each photo a frozen prefix is run on; the epochs take turns.
        0 draws anew every epoch and caches nothing.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    unfreeze: Annotated[int, BeforeValidator(_unfreeze)] = Field(0, ge=0)
    lr: Literal["find"] | Annotated[float, Field(gt=0)] = "find"
    lr_divide: float = Field(3.0, ge=1)
    schedule: Literal["sgdr", "one_cycle", "constant"] = "sgdr"
    cycles: int = Field(1, ge=1, le=100)
    cycle_len: int = Field(1, ge=1, le=10_000)
    cycle_mult: float = Field(1.0, ge=1, le=10)
    batchnorm: Literal["fixed", "train"] = "fixed"
    views: int = Field(4, ge=0)

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
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    stage: tuple[Stage, ...] = Field(min_length=1)


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides such as `stage.head.lr=0.01`.

    Raises:
        OptionError: The file can't be read, or it has mistakes: all of them, one message.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        shipped = sorted(p.stem for p in (Path(__file__).parent / "recipes").glob("*.toml"))
        known = ", ".join(f"training/recipes/{name}.toml" for name in shipped)
        raise OptionError(f"{path}: no such recipe; Fledge ships {known}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} is no TOML file: {error}") from None
    for override in overrides:
        _apply(values, override)
    return parse(values, str(path))


def parse(values: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe's values; `where` is named in the errors."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = "; ".join(_mistake(item, values) for item in error.errors())
        raise OptionError(f"{where}: {mistakes}") from None
    if recipe.name == "latest":
        raise OptionError(f"{where}: name = 'latest' is what runs/latest is for; choose another")
    names = [stage.name for stage in recipe.stage]
    if len(set(names)) < len(names):
        raise OptionError(f"{where}: stage names must differ, got {', '.join(names)}")
    return recipe


def _mistake(item: Any, values: Mapping[str, Any]) -> str:
    place = [_step(part, values) for part in item["loc"]]
    name = ".".join(part for part in place if part not in ("constrained-float", "literal"))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], _known(item["loc"]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{name} is unknown{hint}"
    if item["type"] == "missing":
        return f"{name} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name} = {item['input']!r}: {message[0].lower()}{message[1:]}"


def _step(part: str | int, values: Mapping[str, Any]) -> str:
    """A stage by its name, as overrides call it, where it has one."""
    if isinstance(part, int):
        try:
            return str(values["stage"][part]["name"])
        except (KeyError, TypeError, IndexError):
            return str(part)
    return part


def _known(place: Sequence[Any]) -> list[str]:
    """The option names of the section that `place` stands in."""
    section: Any = Recipe
    for part in place[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = Stage if part == "stage" else section.model_fields[part].annotation
    return list(getattr(section, "model_fields", {}))


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OptionError(f"{override!r}: use key=value, such as stage.head.lr=0.01")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    place: Any = values
    *path, last = key.split(".")
    for part in path:
        if isinstance(place, list):
            place = _stage(place, part, override)
        else:
            place = place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise OptionError(f"{override!r}: {part} is no section")
    if isinstance(place, list):
        raise OptionError(f"{override!r}: name the option too, as stage.{last}.lr")
    place[last] = value


def _stage(stages: list[Any], name: str, override: str) -> Any:
    for stage in stages:
        if stage.get("name") == name:
            return stage
    have = ", ".join(str(stage.get("name")) for stage in stages)
    raise OptionError(f"{override!r}: no stage {name!r}; the recipe has {have}")
