"""Parse the query strings and multipart bodies of prediction requests into images and options.

All input is untrusted. Names and values of options are validated. In a multipart body, the headers
Content-Length and Content-Type of the parts are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from python_multipart.multipart import parse_options_header

from serving.errors import EmptyBody, OptionError, RequestError
from serving.http import multipart

MAX_OVERHEAD: Final = 65_536
"""Bytes that a multipart body may have in addition to the size limit of its images."""

MAX_PARTS: Final = multipart.MAX_PARTS
OPTIONS: Final = ("tta", "top_k")
"""Names of the options."""
_INTEGER: Final = re.compile(r"-?[0-9]{1,9}")
_SHOWN_NAMES: Final = 8


@dataclass(frozen=True)
class PredictOptions:
    """Options of a prediction request.

    Attributes:
        tta: Number of TTA views (crops or flips of the photo) whose probabilities are averaged; 0
            and 1 both mean the plain view only.
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
        if name not in OPTIONS:
            raise OptionError(f"unknown option {name[:40]!r}: use {' and '.join(OPTIONS)}")
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
        raise OptionError(f"too many options: use {' and '.join(OPTIONS)}") from error


@dataclass(frozen=True)
class Form:
    """The fields of a multipart body, or of a JSON body.

    Attributes:
        images: Contents of the fields named `image`, in order.
        pairs: (name, value) of each other field, in order.
    """

    images: tuple[bytes, ...]
    pairs: tuple[tuple[str, str], ...]


def is_multipart(content_type: bytes) -> bool:
    """Return whether a Content-Type is multipart/form-data."""
    return content_type[:19].lower() == b"multipart/form-data"


def parse(body: bytes, content_type: bytes, most_false: int | None = None) -> Form:
    """Parse a multipart body.

    Args:
        body: The whole body of the request.
        content_type: The Content-Type header, which states the boundary.
        most_false: See `multipart.split`.

    Raises:
        RequestError: The body is not well formed, or has more than `MAX_PARTS` parts.
        EmptyBody: The body has no field `image`.
        ManyFalseBoundaries: See `multipart.split`.
    """
    if content_type.count(b";") > multipart.MAX_PARAMETERS:
        raise RequestError(f"a Content-Type of more than {multipart.MAX_PARAMETERS} parameters")
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise RequestError(
            "multipart/form-data without a boundary; leave the header Content-Type to the client, "
            "which states it"
        )
    parts = multipart.split(body, boundary, most_false)
    images = tuple(data for name, data in parts if name == b"image")
    if not images:
        names = [name[:40].decode("utf-8", "replace") for name, _ in parts]
        raise EmptyBody(f"no field `image` in the form; {quoted_names(names)}")
    pairs = tuple(
        (name.decode("latin-1"), data[:41].decode("latin-1"))
        for name, data in parts
        if name != b"image"
    )
    return Form(images, pairs)


def quoted_names(names: Sequence[str]) -> str:
    """Return a clause that lists the names of the fields that a request has, up to eight."""
    if not names:
        return "it has no fields"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"it has {', '.join(f'`{name}`' for name in names[:_SHOWN_NAMES])}{more}"
