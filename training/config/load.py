"""Recipe files and overrides -> a `Recipe`. Validated once, all mistakes reported together."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.errors import OptionError
from training.config import diagnostics, toml_lines
from training.config.schema import Recipe
from training.utils.console import listed


def read(
    path: Path,
    overrides: Sequence[str] = (),
    check_arch: Callable[[str], object] | None = None,
) -> Recipe:
    """Read a recipe file and apply `key=value` overrides such as `stage.head.lr=0.01`.

    Raises:
        OptionError: The file can't be read, or there are mistakes in it or in the overrides: all of
            them in one message, each with its line.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return read_text(text, str(path), overrides, check_arch)
    except FileNotFoundError:
        folder = Path(__file__).parents[1] / "recipes"
        shipped = ", ".join(sorted(file.name for file in folder.glob("*.toml")))
        if folder.is_relative_to(Path.cwd()):
            folder = folder.relative_to(Path.cwd())
        raise OptionError(f"{path}: no such recipe; {folder} has {shipped}") from None
    except IsADirectoryError:
        raise OptionError(f"{path}: a folder, not a recipe") from None
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} is no TOML file: {_named(error, text)}") from None


def _named(error: ValueError, text: str) -> str:
    """What tomllib says, and which key it speaks of where it does not say."""
    found = re.match(r"Cannot overwrite a value \(at (?:line ([0-9]+)|end)", str(error))
    if not found:
        return str(error)
    every = text.split("\n")
    line = int(found[1] or len(every))
    key, equals, _ = every[line - 1].partition("=")
    return f"{key.strip()} is there twice (line {line})" if equals else str(error)


def read_text(
    text: str,
    where: str,
    overrides: Sequence[str] = (),
    check_arch: Callable[[str], object] | None = None,
) -> Recipe:
    """As `read`, of a recipe's text; `where` is named in the errors."""
    values = tomllib.loads(text)
    overridden: list[toml_lines.Path] = []
    refused: list[str] = []
    for override in overrides:
        try:
            overridden.append(_apply(values, override))
        except OptionError as error:
            refused.append(str(error))
    return parse(values, where, toml_lines.lines_of(text), overridden, refused, check_arch)


def parse(
    values: Mapping[str, Any],
    where: str,
    lines_of: Mapping[toml_lines.Path, int] | None = None,
    overridden: Sequence[toml_lines.Path] = (),
    refused: Sequence[str] = (),
    check_arch: Callable[[str], object] | None = None,
) -> Recipe:
    """Validate a recipe's values.

    Args:
        values: As TOML gives them, overrides applied.
        where: Named in the errors.
        lines_of: Path -> line of the file.
        overridden: Paths that the command line has set.
        refused: What is wrong with overrides that could not be applied.
        check_arch: Raises OptionError for an unknown architecture; asked only when the recipe has
            other mistakes, so that valid recipes load without torchvision.

    Raises:
        OptionError: All mistakes, one message with a line for each.
    """
    wrong = list(diagnostics.of_names(values))
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        wrong = [*diagnostics.found(error, values), *wrong]
    if recipe is not None and not wrong and not refused:
        return recipe
    if check_arch:
        wrong += diagnostics.of_arch(values, check_arch)
    places = [(_line(path, lines_of or {}, overridden), sentence) for path, sentence in wrong]
    places = sorted(places, key=lambda found: found[0]) + [(_LAST, text) for text in refused]
    raise OptionError(listed(where, [f"{_called(line)}{sentence}" for line, sentence in places]))


_LAST = 2**62
"""Behind every line: the command line."""


def _line(
    path: toml_lines.Path,
    lines_of: Mapping[toml_lines.Path, int],
    overridden: Sequence[toml_lines.Path],
) -> int:
    for given in overridden:
        # A table's own mistake may come from any of its options.
        if given[: len(path)] == path or path[: len(given)] == given:
            return _LAST
    depths = range(len(path), 0, -1)
    return next((lines_of[path[:n]] for n in depths if path[:n] in lines_of), 0)


def _called(line: int) -> str:
    return "on the command line: " if line == _LAST else f"line {line}: " if line else ""


def _apply(values: dict[str, Any], override: str) -> toml_lines.Path:
    """Set what an override names; returns its path."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OptionError(f"{override!r}: use key=value, such as stage.head.lr=0.01")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    place: Any = values
    path: toml_lines.Path = ()
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
