"""What is wrong with a recipe, told so that it can be mended: where, what, and the nearest name."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from serving.errors import OptionError
from serving.imaging.preprocess import Preprocess
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
"""Dotted name of a table, without the stages' numbers -> what it may hold."""

TAKES: Final = {
    "name": "use letters, digits, '.', '_' and '-'",
    "arch_args": "write a table [arch_args]",
    "compile": "use true, false or 'cuda_graphs'",
    "data.columns": "use the names of two columns, of the id and of the label",
    "head.hidden": "use a width or a list of widths, each at least 1",
    "head.dropout": "use a share in [0, 1), or a list with one for every Linear layer",
    "augment.scale": "use [smallest, largest], both shares in (0, 1]",
    "stage": "write a table [[stage]] for each, at least one",
    "stage.name": "use small letters, digits, '_' and '-', such as 'head'",
    "stage.unfreeze": "use a number of layer groups, 'all', 'gradual', "
    "or a list of patterns such as ['layer4.*']",
    "stage.lr": "use 'find', a number above 0, a list with one for each group, "
    "or { low = 1e-5, high = 1e-3 }",
}
"""What options of several forms take, in one sentence instead of one for each form."""

WORDS: Final = {
    "compile": ("cuda_graphs",),
    "stage.lr": ("find",),
    "stage.unfreeze": ("all", "gradual"),
}
"""The words among those forms."""


def found(error: ValidationError, values: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """(path, sentence) of every mistake that pydantic found in a recipe's values."""
    told = set()
    for item in error.errors():
        path, value = _resolve(item, values)
        if item["type"] == "too_short" and value:
            continue  # stages with mistakes don't count; their mistakes are told
        option = _plain(path)
        form = option if option in TAKES else ""
        if path == ("preprocess",) and isinstance(value, Mapping):
            mistakes = list(_preprocess(value))
        elif option.split(".")[:2] == ["stage", "lr"] and isinstance(
            _at(values, path[:3]), Mapping
        ):
            # Of the forms that were tried, only the table's mistakes are of use.
            mistakes = [(path, _sentence(item, path, value, values))] if _is_spread(item) else []
        elif form and item["type"] != "value_error" and _at(values, path, _NOTHING) is not _NOTHING:
            path = path[: _depth(path, form)]
            value = _at(values, path)
            hint = _near(value, WORDS.get(form, ()))
            mistakes = [(path, f"{_shown(path, value, values)}: {TAKES[form]}{hint}")]
        else:
            mistakes = [(path, _sentence(item, path, value, values))]
        for mistake in mistakes:
            if mistake not in told:
                told.add(mistake)
                yield mistake


def of_names(values: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Names that are taken."""
    if values.get("name") == "latest":
        yield ("name",), "name = 'latest' is what runs/latest is for; choose another"
    stages = values.get("stage")
    seen: dict[object, int] = {}
    for number, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
        name = stage.get("name") if isinstance(stage, Mapping) else None
        if isinstance(name, str) and seen.setdefault(name, number) != number:
            yield ("stage", number, "name"), f"stage names must differ, {name!r} is there twice"


def of_arch(
    values: Mapping[str, Any], check_arch: Callable[[str], object]
) -> Iterator[tuple[Path, str]]:
    """An architecture that `check_arch` refuses."""
    arch = values.get("arch")
    if isinstance(arch, str):
        try:
            check_arch(arch)
        except OptionError as error:
            yield ("arch",), str(error)


def called(path: Sequence[str | int], values: Mapping[str, Any]) -> str:
    """A path as overrides write it: a stage by its name, where it has one."""
    name = _at(values, (*path[:2], "name")) if path[:1] == ("stage",) else None
    parts = [path[0], name, *path[2:]] if len(path) > 1 and isinstance(name, str) else path
    return ".".join(map(str, parts))


def _resolve(item: Any, values: Mapping[str, Any]) -> tuple[Path, Any]:
    """Where in the file an error stands; pydantic's own names for the forms tried are left out."""
    path: Path = ()
    value: Any = values
    for number, part in enumerate(item["loc"], start=1):
        below = _at(value, (part,), _NOTHING)
        if below is not _NOTHING:
            path, value = (*path, part), below
        elif item["type"] == "missing" and number == len(item["loc"]) and isinstance(part, str):
            path = (*path, part)
    return path, value


_NOTHING: Final = object()


def _at(values: Any, path: Sequence[str | int], default: Any = None) -> Any:
    for part in path:
        in_table = isinstance(values, Mapping) and part in values
        in_list = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if not (in_table or in_list):
            return default
        values = values[part]
    return values


def _plain(path: Path) -> str:
    """The dotted name of an option, without numbers; a stage's [augment] is the recipe's."""
    return ".".join(str(part) for part in path if isinstance(part, str)).replace(
        "stage.augment.", "augment."
    )


def _depth(path: Path, form: str) -> int:
    """How much of a path an option's name takes."""
    depths = range(1, len(path) + 1)
    return next((n for n in depths if _plain(path[:n]) == form), len(path))


def _is_spread(item: Any) -> bool:
    # A form with a validator of its own is called "function-after[…, Spread]".
    return any(Spread.__name__ in str(part) for part in item["loc"])


def _sentence(item: Any, path: Path, value: Any, values: Mapping[str, Any]) -> str:
    name = called(path, values)
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
    hint = _near(value, _words(path))
    return f"{_shown(path, value, values)}: {message[0].lower()}{message[1:]}{hint}"


def _shown(path: Path, value: Any, values: Mapping[str, Any]) -> str:
    text = repr(value)
    short = not isinstance(value, Mapping) and len(text) <= 60
    return called(path, values) + (f" = {text}" if short else "")


def _near(given: Any, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, words, n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _nearest_option(path: Path) -> str:
    """The nearest name in the same table, or else the same name in another one."""
    table = ".".join(str(part) for part in path[:-1] if isinstance(part, str))
    name = str(path[-1])
    hint = _near(name, _names(table))
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
    """The words that an option may be, where it is a choice of words."""
    table = SECTIONS.get(".".join(str(part) for part in path[:-1] if isinstance(part, str)))
    field = getattr(table, "model_fields", {}).get(path[-1]) if path else None
    words = typing.get_args(field.annotation) if field is not None else ()
    return [word for word in words if isinstance(word, str)]


def _preprocess(values: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Its options are checked one by one: the dataclass stops at the first mistake."""
    for name, value in values.items():
        path: Path = ("preprocess", name)
        if name not in _names("preprocess"):
            yield path, f"preprocess.{name} is unknown{_nearest_option(path)}"
            continue
        try:
            Preprocess.from_dict({name: value})
        except OptionError as error:
            words = ("bilinear", "bicubic", "lanczos") if name == "interpolation" else ()
            yield path, f"{error}{_near(value, words)}"
