"""Overrides of a recipe's options on the command line, such as `stage.head.lr=0.01`."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from datetime import date, time
from typing import Any, Final

from pydantic import BaseModel

from serving.errors import OptionError
from serving.imaging.preprocess import Preprocess
from serving.terminal import quote
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

EPOCHS: Final = "epochs"
"""Another word for a stage's `cycle_len`, where the stage has one cycle."""


def apply(values: dict[str, Any], override: str) -> Path:
    """Apply an override to `values`, and return the path of the option that it sets.

    Raises:
        OptionError: The override is not `key=value`, or there is no such table or stage.
    """
    key, equals, text = override.partition("=")
    if key != key.strip():  # as in a file: `seed = 3`
        key, text = key.strip(), text.strip()
    key = re.sub(r"^stages?\[([0-9]+)\]", r"stage.\1", key)
    if not equals or not key:
        raise OptionError(f"{override!r}: use key=value, such as stage.head.lr=0.01")
    table: Any = values
    path: Path = ()
    *tables, last = key.split(".")
    for part in tables:
        if isinstance(table, list):
            number = _stage(table, part, key, text)
            path, table = (*path, number), table[number]
        else:
            path, table = (*path, part), table.setdefault(part, {})
        if not isinstance(table, dict | list):
            raise OptionError(f"{override!r}: {part} is no section; it is set by {part}=VALUE")
    if isinstance(table, list):
        raise OptionError(f"{override!r}: {_which_stage(table, last, text)}")
    path = (*path, last)
    if path[:1] == ("stage",) and last in (EPOCHS, "cycle_len"):  # two words for one option
        table.pop("cycle_len" if last == EPOCHS else EPOCHS, None)
    table[last] = read_value(path, text)
    return path


def read_value(path: Path, text: str) -> Any:
    """Parse the value of an override: as TOML, or as text without quotes.

    Where the option is a text, 2024 and 2024-01-01 stay text.
    """
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text
    return text if is_text(path) and not isinstance(value, str) else value


def is_text(path: Path) -> bool:
    """Whether the option at a path takes any text, such as `name`."""
    *tables, name = path
    section = SECTIONS.get(".".join(part for part in tables if isinstance(part, str)))
    field = getattr(section, "model_fields", {}).get(name)
    return field is not None and field.annotation is str


def write(key: str, path: Path, value: Any) -> str:
    """Return the override that sets an option to a value, as it must be written in a shell."""
    text = str(value) if isinstance(value, str) else toml(value)
    if isinstance(value, str) and read_value(path, text) != value:
        text = toml(value)
    return _quoted(f"{key}={text}")


def toml(value: Any) -> str:
    """Return a value as it is written in TOML."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml(item)}' for key, item in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def stage_names(stages: Any) -> list[str]:
    """Return the name of each stage as overrides use it; its number if it has none."""
    tables = stages if isinstance(stages, list | tuple) else ()
    return [
        str(stage["name"]) if isinstance(stage, dict) and "name" in stage else str(number)
        for number, stage in enumerate(tables)
    ]


def _stage(stages: list[Any], name: str, key: str, text: str) -> int:
    """Return the index of the stage with this name, or with this number if it has no name."""
    names = stage_names(stages)
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, n=1)
    if name.isdecimal() and len(name) < 4 and int(name) < len(names):
        near = [names[int(name)]]
    hint = ""
    if near:
        fixed = key.replace(f"stage.{name}.", f"stage.{near[0]}.", 1)
        hint = f"; did you mean {_quoted(f'{fixed}={text}')}?"
    raise OptionError(
        f"{f'{key}={text}'!r}: no stage {name!r}; the recipe has {', '.join(names)}{hint}"
    )


def _which_stage(stages: list[Any], last: str, text: str) -> str:
    """Return a remedy for an override that lacks the stage's name, or the option of the stage."""
    names = stage_names(stages)
    if last in names:
        return f"name the option of the stage, too, such as stage.{last}.lr={text or 0.01}"
    return f"name the stage, too: {_choices([f'stage.{name}.{last}={text}' for name in names])}"


def _choices(words: Sequence[str]) -> str:
    return " or ".join(map(_quoted, words[:3])) or "the recipe has none"


def _quoted(word: str) -> str:
    quoted = quote(word)
    return f"'{word}'" if quoted == word else quoted
