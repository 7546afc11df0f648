"""Parse the query strings and multipart bodies of prediction requests into images and options.

All input is untrusted. Names and values of options are validated. In a multipart body, the headers
Content-Length and Content-Type of the parts are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.errors import EmptyBody, OptionError, RequestError

MAX_OVERHEAD: Final = 65_536
"""Bytes that a multipart body may have in addition to the size limit of its images."""

MAX_PARTS: Final = 64
_NAMES: Final = ("tta", "top_k")
_INTEGER: Final = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class PredictOptions:
    """Options of a prediction request.

    Attributes:
        tta: Number of TTA views (crops or flips of the photo) whose probabilities are averaged; 0
            and 1 both mean the centre crop only.
        top_k: Number of classes in the answer, best first. None: five classes, or all classes if
            the model has fewer than five.
    """

    tta: int = 0
    top_k: int | None = None


def options(pairs: Iterable[tuple[str, str]]) -> PredictOptions:
    """Parse the (name, value) pairs of a query string or form into `PredictOptions`.

    Raises:
        OptionError: A name is unknown or given twice, or a value is not a whole number.
    """
    values: dict[str, int] = {}
    for name, text in pairs:
        if name not in _NAMES:
            raise OptionError(f"unknown option {name[:40]!r}: use {' and '.join(_NAMES)}")
        if name in values:
            raise OptionError(f"{name} is given twice; give it once")
        if not _INTEGER.fullmatch(text):
            raise OptionError(f"{name} = {text[:40]!r}: use a whole number")
        values[name] = int(text)
    return PredictOptions(**values)


def query(raw: bytes) -> list[tuple[str, str]]:
    """Split a query string into (name, value) pairs.

    Raises:
        OptionError: The query string has more than eight pairs.
    """
    try:
        return parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=8)
    except ValueError as error:
        raise OptionError(f"too many options: use {' and '.join(_NAMES)}") from error


@dataclass(frozen=True)
class Form:
    """The fields of a multipart body.

    Attributes:
        images: Contents of the fields named `image`, in order.
        pairs: (name, value) of each other field, in order.
    """

    images: tuple[bytes, ...]
    pairs: tuple[tuple[str, str], ...]


def is_multipart(content_type: bytes) -> bool:
    """Return whether a Content-Type is multipart/form-data."""
    return content_type[:19].lower() == b"multipart/form-data"


def parse(body: bytes, content_type: bytes) -> Form:
    """Parse a multipart body.

    Args:
        body: The whole body of the request.
        content_type: The Content-Type header, which states the boundary.

    Raises:
        RequestError: The body is not well formed, or has more than `MAX_PARTS` parts.
        EmptyBody: The body has no field `image`.
    """
    collector = _Collector()
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise RequestError("multipart/form-data without a boundary")
    try:
        parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise RequestError("the multipart body is not well formed") from error
    if not collector.ended:
        raise RequestError("the multipart body breaks off before its last boundary")
    images = tuple(data for name, data in collector.parts if name == b"image")
    if not images:
        raise EmptyBody("no image: send it as the multipart field `image`")
    pairs = tuple(
        (name.decode("latin-1"), data[:41].decode("latin-1"))
        for name, data in collector.parts
        if name != b"image"
    )
    return Form(images, pairs)


class _Collector:
    """Callbacks for `MultipartParser` that collect the (name, content) of each part in `parts`."""

    def __init__(self) -> None:
        self.parts: list[tuple[bytes, bytes]] = []
        self.ended = False
        self._data: list[bytes] = []
        self._field, self._value, self._disposition = b"", b"", b""

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin_part,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_part_end": self._end_part,
            "on_header_field": self._add_field,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_end": self._end_body,
        }

    def _begin_part(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise RequestError(f"more than {MAX_PARTS} parts in one request; send fewer")
        self._data, self._disposition = [], b""

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def _end_part(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"")
        self.parts.append((name, b"".join(self._data)))

    def _end_body(self) -> None:
        self.ended = True
