"""Split a multipart body into its parts, in time that is linear in its length.

Everything is found by `bytes.find` and bounded before it is looked at: the number of parts, and the
number and length of the header lines of a part. python-multipart reads heads byte by byte and
splits their parameters in quadratic time; a form of 250 KB could hold the event loop for 0.35 s.
"""

from __future__ import annotations

import re
from typing import Final

from python_multipart.multipart import parse_options_header

from serving.errors import RequestError

MAX_PARTS: Final = 64
MAX_HEADERS: Final = 8
"""Largest number of header lines of a part."""
MAX_HEADER: Final = 4224
"""Largest length of a header line, in bytes."""
MAX_PARAMETERS: Final = 16
"""Largest number of semicolons in a Content-Disposition."""
MAX_BOUNDARY: Final = 256

_BOUNDARY_ENDS: Final = (b"\r\n", b"--")
_BLANKS: Final = (b" ", b"\t")
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BAD: Final = "the multipart body is not well formed"
_CUT: Final = "the multipart body breaks off before its last boundary"
_LINE_FEEDS: Final = "the lines of the multipart body end in LF, and must end in CR LF (RFC 2046)"
_NO_BOUNDARY: Final = "the multipart body has no boundary as its Content-Type states it"


class ManyFalseBoundaries(Exception):
    """More places look like a boundary, and are none, than the caller allows."""


def split(body: bytes, boundary: bytes, most_false: int | None = None) -> list[tuple[bytes, bytes]]:
    """Return the (name, content) of each part, in order.

    The name is the parameter `name` of the part's Content-Disposition, b"" if it has none.

    Args:
        body: The whole body.
        boundary: The boundary of the Content-Type.
        most_false: Number of false boundaries after which to give up; None: no limit.

    Raises:
        RequestError: The body is not well formed, or a part or their number is too large.
        ManyFalseBoundaries: See `most_false`.
    """
    if len(boundary) > MAX_BOUNDARY:
        raise RequestError(_BAD)
    delimiter, at, false = b"\r\n--" + boundary, len(boundary) + 4, 0
    if not body.startswith(b"--%b\r\n" % boundary):
        at, false = _opening(body, delimiter, most_false)
        if body.startswith(b"--", at):
            return []
        at = _line_end(body, at)
    parts: list[tuple[bytes, bytes]] = []
    while True:
        if len(parts) >= MAX_PARTS:
            raise RequestError(f"more than {MAX_PARTS} parts in one request; send fewer")
        name, start = _head(body, at)
        at = start
        while True:
            found = body.find(delimiter, at)
            if found < 0:
                raise RequestError(_CUT)
            at = found + len(delimiter)
            if (after := body[at : at + 2]) in _BOUNDARY_ENDS or after[:1] in _BLANKS:
                break
            false = _count(false, most_false)
        parts.append((name, body[start:found]))
        if after == b"--":
            return parts
        at = _line_end(body, at)


def _opening(body: bytes, delimiter: bytes, most_false: int | None) -> tuple[int, int]:
    """Return the place behind the first boundary, and the number of false ones before it.

    What stands before it, the preamble, is ignored (RFC 2046, section 5.1.1).
    """
    first = delimiter[2:]
    start = body.find(b"-") if body[:1] in (b"\r", b"\n") else 0
    if body and start >= 0 and body.startswith(first, start):
        at = start + len(first)
        if _ends_boundary(body, at):
            return at, 0
        if body[at : at + 1] == b"\n":
            raise RequestError(_LINE_FEEDS)
    at = false = 0
    while (found := body.find(delimiter, at)) >= 0:
        at = found + len(delimiter)
        if _ends_boundary(body, at):
            return at, false
        false = _count(false, most_false)
    begins = body[start : start + len(first) + 2] if start >= 0 else b""
    if any(whole.startswith(begins) for whole in (first + b"\r\n", first + b"--")):
        raise RequestError(_CUT)
    raise RequestError(_BAD if first in body else _NO_BOUNDARY)


def _ends_boundary(body: bytes, at: int) -> bool:
    """Return whether the boundary before `at` is one, and no text that begins alike."""
    return body[at : at + 2] in _BOUNDARY_ENDS or body[at : at + 1] in _BLANKS


def _count(false: int, most_false: int | None) -> int:
    if most_false is not None and false >= most_false:
        raise ManyFalseBoundaries
    return false + 1


def _line_end(body: bytes, at: int) -> int:
    """Return the place behind the end of the line of a boundary, which may have blanks."""
    end = body.find(b"\r\n", at)
    if body[at : end if end >= 0 else None].strip(b" \t"):
        raise RequestError(_BAD)
    if end < 0:
        raise RequestError(_CUT)
    return end + 2


def _head(body: bytes, at: int) -> tuple[bytes, int]:
    """Read the header lines of a part; return its name and the place where its content begins."""
    disposition = b""
    for _ in range(MAX_HEADERS + 1):
        if body.startswith(b"\r\n", at):
            return _name(disposition), at + 2
        end = body.find(b"\r", at, at + MAX_HEADER + 1)
        if end < 0:
            raise RequestError(_CUT if len(body) - at <= MAX_HEADER else _BAD)
        field, colon, value = body[at:end].partition(b":")
        if not colon or not _TOKEN.fullmatch(field) or body[end + 1 : end + 2] not in (b"\n", b""):
            raise RequestError(_BAD)
        if field.lower() == b"content-disposition":
            disposition = value.lstrip(b" ")
        at = end + 2
    raise RequestError(_BAD)


def _name(disposition: bytes) -> bytes:
    if disposition.count(b";") > MAX_PARAMETERS:
        raise RequestError(f"a Content-Disposition has more than {MAX_PARAMETERS} parameters")
    return parse_options_header(disposition)[1].get(b"name", b"")
