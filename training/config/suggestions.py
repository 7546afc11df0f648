"""Suggest what to write instead of an unknown option. Every suggestion is tried before it is made.

A suggestion is an assignment that the recipe accepts: with the value that was given, if that means
the same, else without a value. It is written as it has to be written at its place: as an override
such as `'stage.head.lr=0.01'` on the command line, as a line of TOML in a file.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from serving.errors import OptionError
from serving.imaging.preprocess import Preprocess
from serving.terminal import quote
from training.config import other_tools, overrides
from training.config.other_tools import LOST, Counterpart
from training.config.overrides import EPOCHS, SECTIONS
from training.config.schema import Recipe
from training.config.toml_lines import Path

CheckNetwork = Callable[[Recipe], Iterable[tuple[Path, str]]]
"""Function that yields the path and the description of each mistake that concerns the network."""

_MOST: Final = 20
"""Largest number of suggestions for a recipe. Each one is tried on the whole recipe."""
_STAGES: Final = 3
"""Largest number of stages for which a suggestion is written out."""
_SIMILAR: Final = 0.7
"""Smallest similarity of a misspelled name; with less, `epochs` is taken for `preprocess`."""
_LONGEST: Final = 60
_OF_THE_NETWORK: Final = ("arch", "size", "image_size", "unfreeze", "kind")
"""Options whose value may be valid, but not for the network."""


class _Candidate(NamedTuple):
    """An option that may be meant, and its value or `LOST`."""

    path: Path
    value: Any


class Suggestions:
    """Suggestions for the wrong options of one recipe."""

    def __init__(
        self,
        base: Mapping[str, Any],
        overridden: Sequence[Path],
        check_network: CheckNetwork | None = None,
    ) -> None:
        """Prepare suggestions.

        Args:
            base: The values of the recipe without its wrong options.
            overridden: Paths of the options that overrides have set.
            check_network: Finds out whether a value suits the network; None: that is not found out.
        """
        self._base, self._overridden, self._check = base, set(overridden), check_network
        self._left = _MOST
        self._before: set[tuple[Path, str]] | None = None
        self._base_errors = _errors(base)

    def for_unknown(self, path: Path, value: Any) -> str:
        """Return a text that follows "OPTION is unknown", such as "; did you mean 'lr'?"."""
        if self._left == 0:
            return ""
        self._left -= 1
        whole = self._in_another_table(path, value)
        if whole:
            return whole
        found = other_tools.find(str(path[-1]))
        if found is not None and found.flag:
            return _flag(found, value)
        candidates = list(_similar(path, value) if isinstance(value, Mapping) else ())
        if found is not None and not candidates:
            candidates = list(self._counterparts(path, value, found))
        candidates = candidates or list(_similar(path, value))
        if not candidates and found is None:
            candidates = [_Candidate(one, value) for one in self._elsewhere(str(path[-1]))]
        if not candidates:
            return f": {found.note}" if found and found.note else ""
        return self._text(path, candidates, found.note if found else "")

    def for_table(self, path: Path, value: Any) -> str:
        """Return a text for a value in place of a table, such as `optimizer = "adam"`."""
        name = other_tools.MAIN.get(str(path[0])) if len(path) == 1 else None
        if name is None or self._left == 0 or isinstance(value, Mapping | list):
            return ""
        self._left -= 1
        if path == ("data",):
            return "it is a table of options" + _flag(Counterpart(flag="--data"), value)
        found = other_tools.find(str(path[0]))
        value = found.value(value) if found and found.option == f"{path[0]}.{name}" else value
        return "it is a table of options" + self._text(path, [_Candidate((*path, name), value)], "")

    def for_value(self, path: Path, value: Any) -> str:
        """Return a text for a wrong value that has a counterpart, such as `flip = true`, or ""."""
        if self._left == 0 or not isinstance(value, str | int | float):
            return ""
        self._left -= 1
        option = ".".join(part for part in path if isinstance(part, str))
        meant = [found.value(value) for found in other_tools.OF_OPTION.get(option, ())]
        meant += [other_tools.as_list(value), other_tools.as_name(value)]
        for one in meant:
            if one is not LOST and one != value:
                candidate = _Candidate(path, one)
                if self._accepted(candidate) is not LOST:
                    return self._text(path, [candidate], "")
        return ""

    def _in_another_table(self, path: Path, value: Any) -> str:
        """Return a text for an override in a table that does not exist, such as `stages.head.lr`.

        The table may be misspelled; or the option alone may be meant, as in `training.epochs`.
        """
        if path not in self._overridden and not any(one[:1] == path for one in self._overridden):
            return ""
        rest: list[str] = []
        while isinstance(value, Mapping) and len(value) == 1:
            ((key, value),) = value.items()
            rest.append(str(key))
        if not rest or isinstance(value, Mapping):
            return ""
        for table in _near(str(path[-1]), names("")):
            key = ".".join([table, *rest])
            changed: Any = copy.deepcopy(dict(self._base))
            try:
                option = overrides.apply(changed, f"{key}={overrides.toml(value)}")
            except OptionError:
                continue
            if _errors(changed) <= self._base_errors:
                return f"; did you mean {overrides.write(key, option, value)}?"
        if other_tools.find(rest[-1]) is None:
            return ""
        inner = (*path, *rest)
        self._overridden.add(inner)
        return self.for_unknown(inner, value)

    def _text(self, path: Path, candidates: Sequence[_Candidate], note: str) -> str:
        tried = [one._replace(value=self._accepted(one)) for one in candidates]
        good = [one for one in tried if one.value is not LOST] or tried
        on_command_line = path in self._overridden
        words = list(
            dict.fromkeys(
                self._override(one) if on_command_line else self._line(path, one)
                for one in good[:_STAGES]
            )
        )
        aside = f" ({note})" if note and good[0].value is LOST else ""
        return f"; did you mean {' or '.join(words)}?{aside}"

    def _accepted(self, candidate: _Candidate) -> Any:
        """Return the candidate's value if the recipe accepts it, else `LOST`."""
        path, value = candidate
        if overrides.is_text(path) and isinstance(value, int | date):
            value = str(value)
        if value is LOST or len(str(value)) > _LONGEST or isinstance(value, Mapping):
            return LOST
        if path[0] == "stage" and path[-1] == EPOCHS:
            stage = self._base["stage"][path[1]]
            if stage.get("cycles", 1) != 1:
                return LOST
            path = (*path[:-1], "cycle_len")
        values = _with(self._base, path, value)
        if not _errors(values) <= self._base_errors:
            return LOST
        if self._check is not None and path[-1] in _OF_THE_NETWORK and not self._base_errors:
            if self._before is None:
                self._before = set(self._check(Recipe.model_validate(self._base)))
            if not self._before.issuperset(self._check(Recipe.model_validate(values))):
                return LOST
        return value

    def _counterparts(self, path: Path, value: Any, found: Counterpart) -> Iterator[_Candidate]:
        option, value = found.option, found.value(value)
        if path[0] == "stage" and len(path) > 2:  # inside a stage, this stage is meant
            option = other_tools.IN_A_STAGE.get(option, option)
            section, _, name = option.rpartition(".")
            if section in ("stage", "augment"):
                inside = ("augment",) if section == "augment" else ()
                yield _Candidate((*path[:2], *inside, name), value)
                return
        if not option:
            return
        paths = list(self._paths(option))
        yield from (_Candidate(one, value) for one in paths)
        if not paths and option == f"stage.{EPOCHS}":  # every stage has several cycles
            yield from (_Candidate(one, LOST) for one in self._paths("stage.cycle_len"))

    def _paths(self, option: str) -> Iterator[Path]:
        """Yield the path of an option such as "optimizer.kind"; "stage.lr" is one of each stage."""
        section, _, name = option.rpartition(".")
        if section.partition(".")[0] != "stage":
            yield (section, name) if section else (name,)
            return
        inside = section.split(".")[1:]
        for number, stage in enumerate(self._base.get("stage") or ()):
            if isinstance(stage, Mapping) and not (name == EPOCHS and stage.get("cycles", 1) != 1):
                yield ("stage", number, *inside, name)

    def _elsewhere(self, name: str) -> Iterator[Path]:
        """Yield the paths of an option with this name, or a similar one, in any other table."""
        for wanted in (lambda known: known == name, lambda known: bool(_near(name, [known]))):
            for table in SECTIONS:
                for known in names(table):
                    if wanted(known) and table != "stage.lr":
                        yield from self._paths(f"{table}.{known}".lstrip("."))
                        return

    def _override(self, candidate: _Candidate) -> str:
        key = option_name(candidate.path, self._base)
        if candidate.value is LOST:
            return f"'{key}'"
        return overrides.write(key, candidate.path, candidate.value)

    def _line(self, path: Path, candidate: _Candidate) -> str:
        """Return the line of TOML, and where it belongs unless it is the table of `path`."""
        *table, name = candidate.path
        text = "cycle_len" if name == EPOCHS else str(name)
        if candidate.value is not LOST:
            text += f" = {overrides.toml(candidate.value)}"
        text = f'"{text}"' if "'" in text else f"'{text}'"
        if tuple(table) == path[:-1]:
            return text
        if not table:
            return f"{text} at the top"
        if table[0] != "stage":
            return f"{text} under [{table[0]}]"
        inside = "augment of " if len(table) > 2 else ""
        return f"{text} in {inside}{option_name(tuple(table[:2]), self._base)}"


def option_name(path: Sequence[str | int], values: Mapping[str, Any]) -> str:
    """Format a path as in an override, such as `stage.head.lr`.

    If the stage has no name, its index is used instead: `stage.1.lr`.
    """
    name = value_at(values, (*path[:2], "name")) if path[:1] == ("stage",) else None
    parts = [path[0], name, *path[2:]] if len(path) > 1 and isinstance(name, str) else path
    return ".".join(map(str, parts))


def value_at(values: Any, path: Sequence[str | int]) -> Any:
    """Return the value at a path; None if the path does not exist."""
    for part in path:
        in_table = isinstance(values, Mapping) and part in values
        in_list = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if not (in_table or in_list):
            return None
        values = values[part]
    return values


def names(table: str) -> list[str]:
    """Return the names of the options in a table, such as "preprocess"."""
    section = SECTIONS.get(table)
    if section is Preprocess:
        return [field.name for field in dataclasses.fields(Preprocess)]
    return list(getattr(section, "model_fields", {}))


def without(values: Any, paths: Iterable[Path]) -> Any:
    """Return a copy of a recipe's values without the options at these paths."""
    here: dict[str | int, list[Path]] = {}
    for path in paths:
        if path:
            here.setdefault(path[0], []).append(path[1:])
    if isinstance(values, Mapping):
        return {
            key: without(value, here[key]) if key in here else value
            for key, value in values.items()
            if () not in here.get(key, ())
        }
    if isinstance(values, list | tuple):  # an element that is removed would renumber the others
        return [without(value, here.get(i, ())) for i, value in enumerate(values)]
    return values


def _with(values: Any, path: Path, value: Any) -> Any:
    """Return a copy of a recipe's values with the option at a path set."""
    if not path:
        return value
    if isinstance(values, list | tuple):
        index = int(path[0])
        return [*values[:index], _with(values[index], path[1:], value), *values[index + 1 :]]
    inner = values.get(path[0], {}) if isinstance(values, Mapping) else {}
    return {
        **(values if isinstance(values, Mapping) else {}),
        path[0]: _with(inner, path[1:], value),
    }


def _errors(values: Any) -> set[tuple[Any, str]]:
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        return {(item["loc"], item["msg"]) for item in error.errors()}
    return set()


def _similar(path: Path, value: Any) -> Iterator[_Candidate]:
    table = ".".join(str(part) for part in path[:-1] if isinstance(part, str))
    for name in _near(str(path[-1]), names(table)):
        yield _Candidate((*path[:-1], name), value)


def _near(name: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=1, cutoff=_SIMILAR)


def _flag(found: Counterpart, value: Any) -> str:
    carried = found.value(value)
    plain = isinstance(carried, str | int | float) and not isinstance(carried, bool)
    if carried is LOST or not plain:
        return f": it is the option {found.flag} of the command line"
    return f": write {found.flag} {quote(str(carried))} on the command line"
