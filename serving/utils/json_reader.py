"""Read JSON that may come from others: within limits, and with a schema.

Python's own reader accepts more than JSON: NaN, numbers that become infinite, lone surrogates
(which can't be written again) and keys that occur twice. Megabytes of brackets become gigabytes of
lists.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from serving.utils.regular_files import read_limited

MAX_BYTES: Final = 2**25
"""Largest text. A manifest with 22,000 classes, 8 golden images and three precisions has 18 MB."""

_MAX_DEPTH: Final = 100
_MAX_CONTAINERS: Final = 50_000  # objects and arrays; an object takes 200 bytes or more
_MAX_KEYS: Final = 200_000  # pydantic takes a kilobyte for each that is wrong
_MAX_VALUES: Final = 2_000_000
_MAX_DIGITS: Final = 40  # of an integer
_MAX_REASON: Final = 300  # characters of an error message

T = TypeVar("T")


class JsonError(ValueError):
    """The text is not JSON, exceeds a limit, or does not fit the schema; in one line."""


def read_json(path: Path, schema: TypeAdapter[T], most: int = MAX_BYTES) -> T:
    """Read a JSON file and validate it.

    Args:
        path: A regular file.
        schema: What the JSON must contain.
        most: Largest size of the file in bytes.

    Raises:
        OSError: The file can't be read, is no regular file, or is larger.
        JsonError: The content is wrong.
    """
    return validate(parse(read_limited(path, most)), schema)


def parse(text: str | bytes, *, paths: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        paths: Whether strings may be paths, which can have bytes that are not UTF-8. Python's JSON
            has these as lone surrogates.

    Raises:
        JsonError: The text is not JSON in UTF-8, or exceeds a limit; or a key is there twice, a
            number is not finite, or a string can't be encoded.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        if len(text) > MAX_BYTES:
            raise JsonError(f"it is longer than {MAX_BYTES:,} characters")
        if (
            text.count("{") + text.count("[") > _MAX_CONTAINERS
            or text.count(":") > _MAX_KEYS
            or text.count(",") > _MAX_VALUES
        ):
            raise JsonError("it has too many values")
        values = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        if not _is_shallow(values):
            raise RecursionError
        check_text(values, paths=paths)
    except RecursionError:
        raise JsonError("it is nested too deep") from None
    except ValueError as error:
        raise JsonError(_one_line(str(error))) from error
    return values


def check_text(values: Any, *, paths: bool = False) -> None:
    """Check that a value can be written as JSON in UTF-8: numbers are finite, texts are encodable.

    Args:
        values: Value of a JSON text.
        paths: As for `parse`.

    Raises:
        JsonError: It can't.
    """
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode(errors="surrogateescape" if paths else "strict")
    except ValueError as error:
        raise JsonError(_one_line(str(error))) from error


def validate(values: Any, schema: TypeAdapter[T]) -> T:
    """Return the object that `schema` builds from the value of a JSON text.

    Raises:
        JsonError: The value does not fit; the message names the field.
    """
    try:
        return schema.validate_python(values)
    except ValidationError as error:
        raise JsonError(describe(error)) from error


def describe(error: ValidationError) -> str:
    """Describe the first validation error in one line: field, value if short, and broken rule."""
    found = error.errors(include_url=False)[0]
    field, value = f"{'.'.join(map(str, found['loc'])):.200}", found["input"]
    if found["type"] == "missing":
        return _one_line(f"{field} is missing")
    if found["type"] == "extra_forbidden":
        return _one_line(f"{field} is an unknown field")
    message = found["msg"].removeprefix("Value error, ")
    message = message.replace("dictionary", "object").replace("tuple", "array")  # JSON's terms
    short = value is None or isinstance(value, str | int | float)
    given = f" = {value!r:.80}" if short else ""
    start = f"{field}{given}: " if field else ""
    return _one_line(f"{start}{message[0].lower()}{message[1:]}")


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}…"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise JsonError(f"{twice!r:.80} is there twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonError(f"{digits[:10]}… has more than {_MAX_DIGITS} digits")
    return int(digits)


def _is_shallow(values: Any) -> bool:
    level: list[Any] = [values]
    for _ in range(_MAX_DEPTH):
        if not level:
            return True
        level = [item for one in level for item in _items(one) if isinstance(item, dict | list)]
    return not level


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
