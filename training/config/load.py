"""Load a `Recipe` from a TOML file and command-line overrides; all errors are reported together."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from serving.errors import OptionError
from training.config import diagnostics, toml_lines
from training.config.schema import Recipe
from training.utils.console import format_mistakes

MAX_BYTES: Final = 2**16
"""Largest recipe. Each unknown option takes a millisecond: the nearest name is looked up."""

_MAX_DOTS: Final = 500  # in a line; a key of n parts takes a time of n^2


def read(
    path: Path,
    overrides: Sequence[str] = (),
    check_arch: Callable[[str], object] | None = None,
) -> Recipe:
    """Read a recipe file and apply `key=value` overrides such as `stage.head.lr=0.01`.

    Raises:
        OptionError: The file can't be read, or the file or the overrides have errors. The message
            lists all errors with their line numbers.
    """
    text = ""
    try:
        with path.open("rb") as file:  # also a pipe, such as a shell's <(command)
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OptionError(f"{path}: a recipe has at most {MAX_BYTES:,} bytes")
        text = data.decode().replace("\r\n", "\n")
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
    except (ValueError, RecursionError) as error:
        # Also what tomllib raises for bytes that are not UTF-8 and for numbers of 5,000 digits.
        raise OptionError(f"{path} is no TOML file: {_describe_toml_error(error, text)}") from None


def _describe_toml_error(error: Exception, text: str) -> str:
    """Return tomllib's message, or, for a duplicate key, a message with the name of the key."""
    found = re.match(r"Cannot overwrite a value \(at (?:line ([0-9]+)|end)", str(error))
    if not found:
        return str(error)
    lines = text.split("\n")
    line = int(found[1] or len(lines))
    key, equals, _ = lines[line - 1].partition("=")
    return f"{key.strip()} is there twice (line {line})" if equals else str(error)


def read_text(
    text: str,
    where: str,
    overrides: Sequence[str] = (),
    check_arch: Callable[[str], object] | None = None,
) -> Recipe:
    """Parse the text of a recipe and apply `key=value` overrides.

    Error messages begin with `where`.

    Raises:
        OptionError: The text or the overrides have errors.
        ValueError: The text is not valid TOML.
        RecursionError: The text has hundreds of nested arrays or tables.
    """
    if any(line.count(".") > _MAX_DOTS for line in text.split("\n")):
        raise OptionError(f"{where}: a line has more than {_MAX_DOTS} dots")
    values = tomllib.loads(text)
    overridden: list[toml_lines.Path] = []
    failed: list[str] = []
    for override in overrides:
        try:
            overridden.append(_apply(values, override))
        except OptionError as error:
            failed.append(str(error))
    return parse(values, where, toml_lines.lines_of(text), overridden, failed, check_arch)


def parse(
    values: Mapping[str, Any],
    where: str,
    lines_of: Mapping[toml_lines.Path, int] | None = None,
    overridden: Sequence[toml_lines.Path] = (),
    failed: Sequence[str] = (),
    check_arch: Callable[[str], object] | None = None,
) -> Recipe:
    """Validate a recipe's values.

    Args:
        values: The values of the file, with overrides applied.
        where: Name of the file, for the error message.
        lines_of: Line number of each option in the file, by the option's path.
        overridden: Paths of the options that overrides have set.
        failed: Error messages of overrides that could not be applied.
        check_arch: Function that raises OptionError for an unknown architecture. It is called only
            if the recipe has other errors, because valid recipes must load without torchvision.

    Raises:
        OptionError: The values or the overrides have errors. The message has one line per error.
    """
    errors = list(diagnostics.check_names(values))
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        errors = [*diagnostics.describe_errors(error, values), *errors]
    if recipe is not None and not errors and not failed:
        return recipe
    if check_arch:
        errors += diagnostics.check_architecture(values, check_arch)
    located = [(_line(path, lines_of or {}, overridden), sentence) for path, sentence in errors]
    located.sort(key=lambda item: item[0])
    located += [(_COMMAND_LINE, text) for text in failed]
    raise OptionError(
        *format_mistakes(where, [f"{_place(line)}{sentence}" for line, sentence in located])
    )


_COMMAND_LINE = 2**62
"""Line number of overrides, larger than any in a file."""


def _line(
    path: toml_lines.Path,
    lines_of: Mapping[toml_lines.Path, int],
    overridden: Sequence[toml_lines.Path],
) -> int:
    for given in overridden:
        # An error of a table may be caused by any of its options.
        if given[: len(path)] == path or path[: len(given)] == given:
            return _COMMAND_LINE
    depths = range(len(path), 0, -1)
    return next((lines_of[path[:n]] for n in depths if path[:n] in lines_of), 0)


def _place(line: int) -> str:
    return "on the command line: " if line == _COMMAND_LINE else f"line {line}: " if line else ""


def _apply(values: dict[str, Any], override: str) -> toml_lines.Path:
    """Apply an override to `values`, and return the path of the option that it sets."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OptionError(f"{override!r}: use key=value, such as stage.head.lr=0.01")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text
    table: Any = values
    path: toml_lines.Path = ()
    *tables, last = key.split(".")
    for part in tables:
        if isinstance(table, list):
            number = _stage(table, part, override)
            path, table = (*path, number), table[number]
        else:
            path, table = (*path, part), table.setdefault(part, {})
        if not isinstance(table, dict | list):
            raise OptionError(f"{override!r}: {part} is no section")
    if isinstance(table, list):
        raise OptionError(f"{override!r}: name the option too, as stage.{last}.lr")
    table[last] = value
    return (*path, last)


def _stage(stages: list[Any], name: str, override: str) -> int:
    """Return the index of the stage with this name."""
    names = [str(stage.get("name")) if isinstance(stage, dict) else "" for stage in stages]
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"{override!r}: no stage {name!r}; the recipe has {', '.join(names)}{hint}")
