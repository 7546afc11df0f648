"""Write error messages for a recipe: the option, what is wrong, and what to write instead."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from datetime import date, time
from typing import Any

from pydantic import ValidationError

from serving.errors import OptionError
from serving.imaging.preprocess import WORDS, Preprocess
from training.config.forms import did_you_mean
from training.config.overrides import EPOCHS, SECTIONS, is_text, toml
from training.config.suggestions import Suggestions, names, option_name, value_at
from training.config.toml_lines import Path


def describe_errors(
    error: ValidationError, values: Mapping[str, Any], suggestions: Suggestions
) -> Iterator[tuple[Path, str]]:
    """Describe every error that pydantic found in a recipe.

    For each error, the path of the wrong option and a sentence about the error are yielded.
    """
    for item in error.errors():
        path = item["loc"]
        value = value_at(values, path)
        if path == ("preprocess",) and isinstance(value, Mapping):
            yield from _preprocess(value, suggestions)
        else:
            yield path, _sentence(item, path, value, values, suggestions)


def wrong_paths(error: ValidationError, values: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the paths of the options that pydantic refused.

    For an error of a whole table, such as options that contradict each other, the path of each
    option in the table is yielded, except a stage's name and which layers it trains.
    """
    for item in error.errors():
        path = item["loc"]
        value = value_at(values, path)
        if isinstance(value, Mapping) and item["type"] != "extra_forbidden":
            kept = ("name", "unfreeze") if path[:1] == ("stage",) else ()
            yield from ((*path, key) for key in value if key not in kept)
        else:
            yield path[:3] if path[:1] == ("stage",) else path[:2]


def check_names(values: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Check the names of the recipe and its stages, and yield a path and a sentence per error.

    A recipe must not be named "latest", and all stages must have different names.
    """
    if values.get("name") == "latest":
        yield ("name",), "name = 'latest' is reserved for the link runs/latest; choose another"
    stages = values.get("stage")
    seen: dict[object, int] = {}
    for number, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
        name = stage.get("name") if isinstance(stage, Mapping) else None
        if isinstance(name, str) and seen.setdefault(name, number) != number:
            yield ("stage", number, "name"), f"stage names must differ, {name!r} is there twice"


def take_epochs(
    values: Mapping[str, Any], errors: list[tuple[Path, str]]
) -> tuple[dict[str, Any], list[Path]]:
    """Replace `epochs` in stages by `cycle_len`, which is the same where a stage has one cycle.

    Args:
        values: The values of a recipe, which are not changed.
        errors: The list to which mistakes are added.

    Returns:
        The new values, and the paths of the options that were replaced.
    """
    taken: list[Path] = []
    stages = values.get("stage")
    if not isinstance(stages, list | tuple):
        return dict(values), taken
    changed: list[Any] = list(stages)
    for number, stage in enumerate(stages):
        if not isinstance(stage, Mapping) or EPOCHS not in stage:
            continue
        path: Path = ("stage", number, EPOCHS)
        name, epochs = option_name(path, values), stage[EPOCHS]
        changed[number] = {key: value for key, value in stage.items() if key != EPOCHS}
        cycles = stage.get("cycles", 1)
        if "cycle_len" in stage:
            errors.append((path, f"{name} is another word for cycle_len, which is there, too"))
        elif cycles != 1:
            length = option_name((*path[:2], "cycle_len"), values)
            errors.append(
                (
                    path,
                    f"{name}: the stage has {cycles} cycles; set {length}, the epochs of a cycle",
                )
            )
        else:
            changed[number]["cycle_len"] = epochs
            taken.append(path)
    return {**values, "stage": changed}, taken


def _sentence(
    item: Any, path: Path, value: Any, values: Mapping[str, Any], suggestions: Suggestions
) -> str:
    name = option_name(path, values)
    if item["type"] == "extra_forbidden":
        return f"{name} is unknown{suggestions.for_unknown(path, value)}"
    if item["type"] == "missing":
        return f"{name} is missing"
    if is_text(path) and not isinstance(value, str | Mapping | list):
        return f'{name} = {_written(value)}: text needs quotes: {path[-1]} = "{_written(value)}"'
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "literal_error":
        message = f"use {item['ctx']['expected']}"
    elif item["type"] in ("model_type", "dataclass_type", "dict_type"):
        message = suggestions.for_table(path, value) or f"write a table [{name}]"
    elif message.startswith("Input should be "):
        message = f"must be {message.removeprefix('Input should be ').partition(',')[0]}"
    hint = ""
    if "did you mean" not in message:
        hint = suggestions.for_value(path, value) or did_you_mean(value, _words(path))
    return f"{_shown(path, value, values)}: {message[0].lower()}{message[1:]}{hint}"


def _written(value: Any) -> str:
    return toml(value) if isinstance(value, date | time) else str(value)


def _shown(path: Path, value: Any, values: Mapping[str, Any]) -> str:
    """Format an option as `OPTION = VALUE`, or as `OPTION` if the value is long or a table."""
    text = value.isoformat() if isinstance(value, date | time) else repr(value)
    short = not isinstance(value, Mapping) and len(text) <= 60
    return option_name(path, values) + (f" = {text}" if short else "")


def _words(path: Path) -> list[str]:
    """Return the words that an option accepts; empty if the option also accepts other values."""
    table = SECTIONS.get(".".join(str(part) for part in path[:-1] if isinstance(part, str)))
    field = getattr(table, "model_fields", {}).get(path[-1]) if path else None
    words = typing.get_args(field.annotation) if field is not None else ()
    return [word for word in words if isinstance(word, str)]


def _preprocess(values: Mapping[str, Any], suggestions: Suggestions) -> Iterator[tuple[Path, str]]:
    """Check the options of [preprocess] one by one, and yield a path and a sentence for each error.

    The dataclass `Preprocess` itself stops at the first error.
    """
    for name, value in values.items():
        path: Path = ("preprocess", name)
        if name not in names("preprocess"):
            hint = suggestions.for_unknown(path, value)
            yield path, f"preprocess.{name} is unknown{hint}"
            continue
        try:
            Preprocess.from_dict({name: value})
        except OptionError as error:
            hint = suggestions.for_value(path, value) or did_you_mean(value, WORDS.get(name, ()))
            yield path, f"{error}{hint}"
