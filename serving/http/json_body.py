"""Read images and options from the JSON bodies of prediction requests.

    {"image": "<base64 or data URL>", "tta": 4}               POST /predict
    {"images": ["<base64 or data URL>", …], "top_k": 1}       POST /predict/batch

Long strings are found by `bytes.find` and replaced by short names before the text is parsed, so
that the copies and the time of the JSON reader are bounded by `MAX_REST`, however long the
body is. Each image is then decoded from the body itself, in pieces. Of a body of N bytes the images
take 0.75 N bytes besides; `body_budget.COPIES` counts that.
"""

from __future__ import annotations

import binascii
import io
import json
import re
from typing import Any, Final, NamedTuple

from serving.errors import EmptyBody, RequestError
from serving.http.forms import MAX_OVERHEAD, MAX_PARTS, OPTIONS, Form, quoted_names
from serving.imaging.not_images import describe
from serving.utils import json_reader
from serving.utils.json_reader import JsonError

MAX_REST: Final = MAX_OVERHEAD
"""Largest length of a JSON text without its long strings, in bytes."""
MAX_QUOTES: Final = 1000
"""Largest number of quotation marks, which bounds the number of strings."""
FIRST: Final = frozenset((b"{", b"[", b'"', b"\xef", b" ", b"\t", b"\r", b"\n"))
"""First bytes of JSON. No image that is served begins with one."""
_LONG: Final = 64  # bytes; `base64` breaks lines after 76 characters
_MAX_SLASHES: Final = 64  # backslashes in front of a quotation mark
_PIECE: Final = 2**18  # bytes of base64 that are decoded at once; other threads run between two
_SHOWN: Final = 4096  # bytes of a string from which it is described

_TYPE: Final = re.compile(rb"\s*[\w.+-]+/(?:[\w.+-]+\+)?json\s*(?:;|$)", re.IGNORECASE)
_OBJECT: Final = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\{")
_VALUE: Final = re.compile(rb'(?:\xef\xbb\xbf)?[ \t\r\n]*[\["]')
_MARK: Final = b"\\u0000"  # begins the names of long strings; no other string may have it
_DATA_URL: Final = re.compile(rb'data:[^,"]{0,200}?;base64,', re.IGNORECASE)
_STANDARD: Final = bytes.maketrans(b"-_", b"+/")  # the URL-safe alphabet in the standard one
_POSITION: Final = re.compile(r": line \d+ column \d+ \(char \d+\)$")


class _Place(NamedTuple):
    """Where a string is: `text[start:stop]`, with JSON's escapes, without quotation marks."""

    text: bytes
    start: int
    stop: int

    @property
    def head(self) -> bytes:
        return self.text[self.start : min(self.stop, self.start + _SHOWN)].replace(b"\\/", b"/")


def is_json_type(content_type: bytes) -> bool:
    """Return whether a Content-Type is application/json, or another type of JSON."""
    return _TYPE.match(content_type) is not None


def is_json(body: bytes, content_type: bytes) -> bool:
    """Return whether a body is JSON: an object, or with a Content-Type of JSON another value.

    No image that is served begins like that, so the Content-Type of images does not matter.
    """
    if _OBJECT.match(body):
        return True
    return is_json_type(content_type) and _VALUE.match(body) is not None


def max_length(max_bytes: int) -> int:
    """Return the largest accepted length of a JSON body, for images of `max_bytes` together."""
    return 4 * -(-max_bytes // 3) + MAX_REST


def parse(body: bytes, field: str) -> Form:
    """Read a JSON body.

    Args:
        body: The whole body of the request.
        field: "image", whose value is one text, or "images", whose value is an array of texts.

    Raises:
        RequestError: The body is not such JSON, exceeds a limit, or a text is not base64.
        EmptyBody: The JSON has no field `field`.
    """
    try:
        rest, places = _without_long_strings(body)
        values = json_reader.parse(rest)
    except JsonError as error:
        raise RequestError(f"the JSON can't be read: {_POSITION.sub('', str(error))}") from error

    def place(text: str) -> _Place:
        if text[:1] == "\0":
            return places[int(text[1:])]
        escaped = json.dumps(text).encode()[1:-1]
        return _Place(escaped, 0, len(escaped))

    if not isinstance(values, dict):
        raise RequestError(f'the JSON is {_kind(values)}, and must be {{"{field}": …}}')
    names = [place(name).head[:40].decode("utf-8", "replace") for name in values]
    if field not in values:
        raise EmptyBody(f"no field `{field}` in the JSON; {quoted_names(names)}")
    texts = values[field]
    images: tuple[bytes, ...]
    if field == "image":
        images = (_decode("image", place(_text("image", texts))),)
    else:
        if not isinstance(texts, list):
            raise RequestError(f"`images` is {_kind(texts)}, and must be an array of base64 texts")
        if not texts:
            raise EmptyBody("the array `images` is empty")
        if len(texts) > MAX_PARTS:
            raise RequestError(f"more than {MAX_PARTS} images in one request; send fewer")
        images = tuple(
            _decode(f"images[{number}]", place(_text(f"images[{number}]", text)))
            for number, text in enumerate(texts)
        )
    pairs = [
        (name, place(value).head[:41].decode("utf-8", "replace"))
        if isinstance(value, str)
        else (name, json.dumps(value)[:41])
        for name, (key, value) in zip(names, values.items(), strict=True)
        if key != field and not (value is None and key in OPTIONS)
    ]
    return Form(images, tuple(pairs))


def _without_long_strings(body: bytes) -> tuple[bytes, list[_Place]]:
    """Replace strings of more than `_LONG` bytes by their number in the returned list."""
    if body.count(b'"') > MAX_QUOTES:
        raise JsonError("it has too many values")
    at = done = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    pieces: list[bytes] = []
    places: list[_Place] = []
    size = 0

    def keep(stop: int) -> None:
        nonlocal size
        size += stop - done
        if size > MAX_REST:
            raise JsonError(f"it has more than {MAX_REST:,} bytes besides its texts")
        pieces.append(body[done:stop])

    while (start := body.find(b'"', at)) >= 0:
        stop = _end_of_string(body, start + 1)
        if stop - start > _LONG:
            keep(start)
            pieces.append(b'"%b%d"' % (_MARK, len(places)))
            places.append(_Place(body, start + 1, stop))
            done = stop + 1
        at = stop + 1
    keep(len(body))
    rest = b"".join(pieces)
    if rest.count(_MARK) != len(places):
        raise JsonError("it has the character U+0000")
    return rest, places


def _end_of_string(body: bytes, first: int) -> int:
    """Return the place of the quotation mark that ends the string that begins at `first`."""
    at = first
    while (end := body.find(b'"', at)) >= 0:
        before = body[max(first, end - _MAX_SLASHES) : end]
        slashes = len(before) - len(before.rstrip(b"\\"))
        if slashes == _MAX_SLASHES:
            raise JsonError("it has too many backslashes")
        if slashes % 2 == 0:
            return end
        at = end + 1
    raise JsonError("a text has no end")


def _kind(value: Any) -> str:
    """Name the type of a JSON value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a text", list: "an array", dict: "an object"}
    return kinds.get(type(value), "a number")


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise RequestError(f"`{name}` is {_kind(value)}, and must be the encoded file as base64 text")


def _decode(name: str, place: _Place) -> bytes:
    """Decode one image from base64, or from a data URL with base64.

    Both alphabets of RFC 4648 are read, line breaks are left out, as `base64` writes them, and the
    padding may be missing. Everything else is refused.
    """
    text, start, stop = place
    if found := _DATA_URL.match(text, start, stop):
        start = found.end()
    elif text[start : start + 5].lower() == b"data:":
        raise RequestError(f"`{name}` is a data URL without `;base64,`")
    image, rest, padded = io.BytesIO(), b"", False
    try:
        while start < stop:
            piece, start = _piece(text, start, stop)
            piece = rest + piece.translate(_STANDARD, b"\r\n")
            if padded and piece:
                raise ValueError
            if start == stop:
                piece += b"=" * (-len(piece) % 4)
            whole = len(piece) - len(piece) % 4
            image.write(binascii.a2b_base64(piece[:whole], strict_mode=True))
            padded, rest = padded or piece[:whole].endswith(b"="), piece[whole:]
    except ValueError:
        what = describe(place.head)
        more = f": it is {what}" if what and "base64" not in what else " (RFC 4648)"
        raise RequestError(f"`{name}` is not base64{more}") from None
    return image.getvalue()  # no copy


def _piece(text: bytes, start: int, stop: int) -> tuple[bytes, int]:
    """Return the next piece without JSON's escapes, and where the one after it begins."""
    end = min(start + _PIECE, stop)
    if end < stop:  # not within an escape, which has at most six bytes
        escape = text.rfind(b"\\", max(start + 1, end - 6), end)
        end = escape if escape >= 0 else end
    piece = text[start:end]
    if b"\\" in piece:
        # Line breaks are no JSON, but shells put the lines of `base64` in as they are.
        piece = str(json.loads(b'"%b"' % piece, strict=False)).encode("ascii")
    return piece, end
