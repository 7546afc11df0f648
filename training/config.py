"""Recipe files and overrides -> a `Recipe`. Validated once, all mistakes reported together."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.errors import OptionError
from training import lines, mistakes
from training.options import Recipe


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides such as `stage.head.lr=0.01`.

    Raises:
        OptionError: The file can't be read, or there are mistakes in it or in the overrides: all of
            them in one message, each with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return read_text(text, str(path), overrides)
    except FileNotFoundError:
        shipped = sorted(p.stem for p in (Path(__file__).parent / "recipes").glob("*.toml"))
        known = ", ".join(f"training/recipes/{name}.toml" for name in shipped)
        raise OptionError(f"{path}: no such recipe; Fledge ships {known}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} is no TOML file: {error}") from None


def read_text(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """As `read`, of a recipe's text; `where` is named in the errors."""
    values = tomllib.loads(text)
    overridden: list[lines.Path] = []
    refused: list[str] = []
    for override in overrides:
        try:
            overridden.append(_apply(values, override))
        except OptionError as error:
            refused.append(str(error))
    return parse(values, where, lines.lines_of(text), overridden, refused)


def parse(
    values: Mapping[str, Any],
    where: str,
    lines_of: Mapping[lines.Path, int] | None = None,
    overridden: Sequence[lines.Path] = (),
    refused: Sequence[str] = (),
) -> Recipe:
    """Validate a recipe's values.

    Args:
        values: As TOML gives them, overrides applied.
        where: Named in the errors.
        lines_of: Path -> line of the file.
        overridden: Paths that the command line has set.
        refused: What is wrong with overrides that could not be applied.

    Raises:
        OptionError: All mistakes, one message.
    """
    wrong = list(mistakes.of_names(values))
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        wrong = [*mistakes.found(error, values), *wrong]
    if recipe is not None and not wrong and not refused:
        return recipe
    places = [(_line(path, lines_of or {}, overridden), sentence) for path, sentence in wrong]
    places = sorted(places, key=lambda found: found[0]) + [(_LAST, text) for text in refused]
    told = [(_called(line), sentence) for line, sentence in places]
    raise OptionError(f"{where}: {mistakes.together(told)}")


_LAST = 2**62
"""Behind every line: the command line."""


def _line(
    path: lines.Path, lines_of: Mapping[lines.Path, int], overridden: Sequence[lines.Path]
) -> int:
    for given in overridden:
        # A table's own mistake may come from any of its options.
        if given[: len(path)] == path or path[: len(given)] == given:
            return _LAST
    depths = range(len(path), 0, -1)
    return next((lines_of[path[:n]] for n in depths if path[:n] in lines_of), 0)


def _called(line: int) -> str:
    return "on the command line" if line == _LAST else f"line {line}" if line else ""


def _apply(values: dict[str, Any], override: str) -> lines.Path:
    """Set what an override names; returns its path."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OptionError(f"{override!r}: use key=value, such as stage.head.lr=0.01")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    place: Any = values
    path: lines.Path = ()
    *tables, last = key.split(".")
    for part in tables:
        if isinstance(place, list):
            number = _stage(place, part, override)
            path, place = (*path, number), place[number]
        else:
            path, place = (*path, part), place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise OptionError(f"{override!r}: {part} is no section")
    if isinstance(place, list):
        raise OptionError(f"{override!r}: name the option too, as stage.{last}.lr")
    place[last] = value
    return (*path, last)


def _stage(stages: list[Any], name: str, override: str) -> int:
    """Which of the stages has a name."""
    names = [str(stage.get("name")) if isinstance(stage, dict) else "" for stage in stages]
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"{override!r}: no stage {name!r}; the recipe has {', '.join(names)}{hint}")
