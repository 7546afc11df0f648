"""Recipe files and overrides -> a `Recipe`. Validated once, all mistakes reported together."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.errors import OptionError
from training.options import Recipe, Stage


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
