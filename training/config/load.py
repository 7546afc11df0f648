"""Load a `Recipe` from a TOML file and command-line overrides; all errors are reported together."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from serving.errors import OptionError
from serving.inputs.path_kind import not_wanted
from serving.utils.regular_files import read_limited
from training.config import diagnostics, overrides, shipped, toml_lines
from training.config.schema import Recipe
from training.config.suggestions import CheckNetwork, Suggestions, value_at, without
from training.utils.console import format_mistakes

MAX_BYTES: Final = 2**16
"""Largest recipe. Each unknown option takes a millisecond: the nearest name is looked up."""

_MAX_DOTS: Final = 500  # in a line; a key of n parts takes a time of n^2


def read(
    path: Path,
    changes: Sequence[str] = (),
    check_network: CheckNetwork | None = None,
) -> Recipe:
    """Read a recipe and apply `key=value` overrides such as `stage.head.lr=0.01`.

    Args:
        path: A file, or the name of a recipe that Fledge ships, such as `quick`.
        changes: The overrides.
        check_network: Function that finds the mistakes that concern the network; see `parse`.

    Raises:
        OptionError: The file can't be read, or the file or the overrides have errors. The message
            lists all errors with their line numbers.
    """
    text, other = "", not_wanted(shipped.find(path), "recipe")
    try:
        with shipped.find(path).open("rb") as file:  # also a pipe, such as a shell's <(command)
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OptionError(f"{path}: a recipe has at most {MAX_BYTES:,} bytes")
        text = data.decode().replace("\r\n", "\n")
        return read_text(text, str(path), changes, check_network)
    except FileNotFoundError:
        raise OptionError(shipped.unknown(path)) from None
    except IsADirectoryError:
        raise OptionError(other or f"{path}: a folder, not a recipe") from None
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        # Also what tomllib raises for bytes that are not UTF-8 and for numbers of 5,000 digits.
        if other:
            raise OptionError(other) from None
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
    changes: Sequence[str] = (),
    check_network: CheckNetwork | None = None,
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
    for change in changes:
        try:
            overridden.append(overrides.apply(values, change))
        except OptionError as error:
            failed.append(str(error))
    return parse(values, where, toml_lines.lines_of(text), overridden, failed, check_network)


def parse(
    values: Mapping[str, Any],
    where: str,
    lines_of: Mapping[toml_lines.Path, int] | None = None,
    overridden: Sequence[toml_lines.Path] = (),
    failed: Sequence[str] = (),
    check_network: CheckNetwork | None = None,
) -> Recipe:
    """Validate a recipe's values.

    Args:
        values: The values of the file, with overrides applied.
        where: Name of the file, for the error message.
        lines_of: Line number of each option in the file, by the option's path.
        overridden: Paths of the options that overrides have set.
        failed: Error messages of overrides that could not be applied.
        check_network: Function that yields the mistakes that concern the network, such as an
            unknown architecture. It imports torch. If the recipe has other mistakes, it is called
            with a copy without the wrong options. None: they are not found.

    Raises:
        OptionError: The values or the overrides have errors. The message has one line per error.
    """
    errors = list(diagnostics.check_names(values))
    values, taken = diagnostics.take_epochs(values, errors)
    lines, given = dict(lines_of or {}), list(overridden)
    for path in taken:
        as_length = (*path[:-1], "cycle_len")
        if path in lines:
            lines[as_length] = lines[path]
        if path in given:
            given.append(as_length)
    recipe = correct = None
    try:
        recipe = correct = Recipe.model_validate(values)
    except ValidationError as error:
        base = without(values, diagnostics.wrong_paths(error, values))
        suggestions = Suggestions(base, given, check_network)
        errors = [*diagnostics.describe_errors(error, values, suggestions), *errors]
        correct = _completed(base)
    if correct is not None and check_network is not None:
        errors += check_network(correct)
    if recipe is not None and not errors and not failed:
        return recipe
    located = [(_line(path, lines, given), sentence) for path, sentence in errors]
    located.sort(key=lambda item: item[0])
    located += [(_COMMAND_LINE, text) for text in failed]
    raise OptionError(
        *format_mistakes(where, [f"{_place(line)}{sentence}" for line, sentence in located])
    )


def _completed(base: Mapping[str, Any]) -> Recipe | None:
    """Return a recipe of the values that are right, for the check of the network; None: no arch."""
    stages = base.get("stage")
    named = [
        {"name": str(number), **stage} if isinstance(stage, Mapping) else stage
        for number, stage in enumerate(stages if isinstance(stages, list) else ())
    ]
    plain = {"name": "recipe", "arch": base.get("arch"), "stage": [{"name": "all"}]}
    for values in ({"name": "recipe", **base, "stage": named}, plain):
        with suppress(ValidationError):
            return Recipe.model_validate(values)
    return None


def suggest(path: Path, key: str, text: str) -> str:
    """Return what to write for an option that was given like one of the command line, or "".

    Args:
        path: The recipe, as for `read`.
        key: The option, such as "epochs".
        text: Its value; "" if it has none.
    """
    try:
        values = tomllib.loads(read_limited(shipped.find(path), MAX_BYTES).decode())
        option = overrides.apply(values, f"{key}={text or 'true'}")
        values, _ = diagnostics.take_epochs(values, [])
    except (OSError, ValueError, RecursionError, OptionError):
        return ""
    value = value_at(values, option)
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        suggestions = Suggestions(without(values, [option]), [option])
        unknown = any(
            item["type"] == "extra_forbidden" and item["loc"] == option for item in error.errors()
        )
        if unknown:
            return suggestions.for_unknown(option, value)
        table = suggestions.for_table(option, value)
        return f"; {table}" if table else f"; did you mean '{key}=VALUE'?"
    return f"; did you mean {overrides.write(key, option, value)}?"


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
