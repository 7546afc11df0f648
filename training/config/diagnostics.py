"""Write error messages for a recipe: the option, what is wrong, and the nearest valid name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from serving.errors import OptionError
from serving.imaging.preprocess import Preprocess
from training.config.forms import did_you_mean
from training.config.schema import Recipe, Spread, Stage
from training.config.sections import AugmentConfig
from training.config.toml_lines import Path

SECTIONS: Final[dict[str, type]] = {
    "": Recipe,
    **{
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    },
    "preprocess": Preprocess,
    "stage": Stage,
    "stage.lr": Spread,
    "stage.augment": AugmentConfig,
}
"""Dotted name of a table, without the numbers of stages -> the class with its options."""


def describe_errors(
    error: ValidationError, values: Mapping[str, Any]
) -> Iterator[tuple[Path, str]]:
    """Describe every error that pydantic found in a recipe.

    For each error, the path of the wrong option and a sentence about the error are yielded.
    """
    for item in error.errors():
        path = item["loc"]
        value = _at(values, path)
        if path == ("preprocess",) and isinstance(value, Mapping):
            yield from _preprocess(value)
        else:
            yield path, _sentence(item, path, value, values)


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


def check_architecture(
    values: Mapping[str, Any], check_arch: Callable[[str], object]
) -> Iterator[tuple[Path, str]]:
    """Check the recipe's architecture by `check_arch`.

    If `check_arch` raises OptionError, yield the path of the option `arch` and the error message.
    """
    arch = values.get("arch")
    if isinstance(arch, str):
        try:
            check_arch(arch)
        except OptionError as error:
            yield ("arch",), str(error)


def option_name(path: Sequence[str | int], values: Mapping[str, Any]) -> str:
    """Format a path as in an override, such as `stage.head.lr`.

    If the stage has no name, its index is used instead: `stage.1.lr`.
    """
    name = _at(values, (*path[:2], "name")) if path[:1] == ("stage",) else None
    parts = [path[0], name, *path[2:]] if len(path) > 1 and isinstance(name, str) else path
    return ".".join(map(str, parts))


def _at(values: Any, path: Sequence[str | int]) -> Any:
    """Return the value at a path; None if the path does not exist."""
    for part in path:
        in_table = isinstance(values, Mapping) and part in values
        in_list = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if not (in_table or in_list):
            return None
        values = values[part]
    return values


def _sentence(item: Any, path: Path, value: Any, values: Mapping[str, Any]) -> str:
    name = option_name(path, values)
    if item["type"] == "extra_forbidden":
        return f"{name} is unknown{_nearest_option(path)}"
    if item["type"] == "missing":
        return f"{name} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "literal_error":
        message = f"use {item['ctx']['expected']}"
    elif item["type"] in ("model_type", "dataclass_type", "dict_type"):
        message = f"write a table [{name}]"
    elif message.startswith("Input should be "):
        message = f"must be {message.removeprefix('Input should be ').partition(',')[0]}"
    hint = did_you_mean(value, _words(path))
    return f"{_shown(path, value, values)}: {message[0].lower()}{message[1:]}{hint}"


def _shown(path: Path, value: Any, values: Mapping[str, Any]) -> str:
    """Format an option as `OPTION = VALUE`, or as `OPTION` if the value is long or a table."""
    text = repr(value)
    short = not isinstance(value, Mapping) and len(text) <= 60
    return option_name(path, values) + (f" = {text}" if short else "")


def _nearest_option(path: Path) -> str:
    """Suggest the nearest name in the same table, or else the same name in another table."""
    table = ".".join(str(part) for part in path[:-1] if isinstance(part, str))
    name = str(path[-1])
    hint = did_you_mean(name, _names(table))
    if hint:
        return hint
    elsewhere = (f"{other}.{name}" for other in SECTIONS if other and name in _names(other))
    here = [name] if name in _names("") else []
    return "".join(f"; did you mean {other!r}?" for other in [*here, *elsewhere][:1])


def _names(table: str) -> list[str]:
    section = SECTIONS.get(table)
    if section is Preprocess:
        return [field.name for field in dataclasses.fields(Preprocess)]
    return list(getattr(section, "model_fields", {}))


def _words(path: Path) -> list[str]:
    """Return the words that an option accepts; empty if the option also accepts other values."""
    table = SECTIONS.get(".".join(str(part) for part in path[:-1] if isinstance(part, str)))
    field = getattr(table, "model_fields", {}).get(path[-1]) if path else None
    words = typing.get_args(field.annotation) if field is not None else ()
    return [word for word in words if isinstance(word, str)]


def _preprocess(values: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Check the options of [preprocess] one by one, and yield a path and a sentence for each error.

    The dataclass `Preprocess` itself stops at the first error.
    """
    for name, value in values.items():
        path: Path = ("preprocess", name)
        if name not in _names("preprocess"):
            yield path, f"preprocess.{name} is unknown{_nearest_option(path)}"
            continue
        try:
            Preprocess.from_dict({name: value})
        except OptionError as error:
            words = ("bilinear", "bicubic", "lanczos") if name == "interpolation" else ()
            yield path, f"{error}{did_you_mean(value, words)}"
