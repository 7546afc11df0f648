"""Forms: as python-multipart splits them, and in time that is linear in their length."""

from __future__ import annotations

import random
import re
import time
from contextlib import suppress

import pytest
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.errors import EmptyBody, RequestError
from serving.http import forms, multipart

HEAD = b'Content-Disposition: form-data; name="image"'
TYPE = b"multipart/form-data; boundary=b"


def by_library(body: bytes, boundary: bytes) -> list[tuple[bytes, bytes]] | None:
    """The parts by python-multipart; None for a body that is not well formed or has no end."""
    parts: list[tuple[bytes, bytes]] = []
    state = {"data": b"", "field": b"", "value": b"", "disposition": b"", "end": b""}

    def add(key: str):
        def take(data: bytes, start: int, end: int) -> None:
            state[key] += data[start:end]

        return take

    def end_header() -> None:
        if state["field"].lower() == b"content-disposition":
            state["disposition"] = state["value"]
        state["field"] = state["value"] = b""

    def end_part() -> None:
        name = parse_options_header(state["disposition"])[1].get(b"name", b"")
        parts.append((name, state["data"]))

    callbacks = {
        "on_part_begin": lambda: state.update(data=b"", disposition=b""),
        "on_part_data": add("data"),
        "on_part_end": end_part,
        "on_header_field": add("field"),
        "on_header_value": add("value"),
        "on_header_end": end_header,
        "on_end": lambda: state.update(end=b"1"),
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(body)
    except (FormParserError, ValueError):
        return None
    return parts if state["end"] else None


OPENING = re.compile(rb"--b(?=[ \t]|\r\n|--)")


def without_preamble(body: bytes) -> bytes:
    """The library reads no preamble, and no blanks after the first boundary."""
    at = max(0, body.find(b"-")) if body[:1] in (b"\r", b"\n") else 0
    if not OPENING.match(body, at) and body[at : at + 4] != b"--b\n":
        found = re.search(rb"\r\n" + OPENING.pattern, body)
        if not found:
            return body
        body, at = body[found.start() + 2 :], 0
    return body[: at + 3] + re.sub(rb"\A[ \t]+(?=\r\n)", b"", body[at + 3 :])


def by_us(body: bytes, boundary: bytes) -> list[tuple[bytes, bytes]] | None:
    try:
        return multipart.split(body, boundary)
    except RequestError:
        return None


PIECES = (
    *(b"--b", b"\r\n", b"\r\n--b", b"\r\n--b--", b"--", b"-", b"b", b"\r", b"\n", b" ", b"\t"),
    *(HEAD, b'Content-Disposition: form-data; name="a;b"', b"X: y", b": z", b"A b: c", b"X:", b"X"),
    *(b"content-disposition:  form-data; name=image; filename=x", b"data", b"\r\n\r\n", b"\xff"),
)


@pytest.mark.parametrize("seed", range(8))
def test_random_bodies_are_split_as_by_the_library(seed: int):
    rng = random.Random(seed)
    well_formed = 0
    for _ in range(4000):
        if rng.random() < 0.5:
            body = b"".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 14)))
        else:  # a valid form with one change
            one = b"--b\r\n" + HEAD + b"\r\nX: y\r\n\r\ndata"
            body = bytearray(b"\r\n".join([one] * rng.randrange(1, 4)) + b"\r\n--b--\r\n")
            at = rng.randrange(len(body))
            body[at : at + rng.randrange(4)] = rng.choice(PIECES)
            body = bytes(body)
        expected = by_library(without_preamble(body), b"b")
        assert by_us(body, b"b") == expected, body
        well_formed += expected is not None
    assert well_formed > 300


def test_browsers_and_curl_are_understood():
    disposition = b'Content-Disposition: form-data; name="image"; filename="a;b \\"c\\".jpg"'
    body = b"--b\r\n" + disposition + b"\r\nContent-Type: image/jpeg\r\n\r\n\xff\r\n--b--\r\n"
    assert forms.parse(body, TYPE).images == (b"\xff",)


def form(*heads: bytes) -> bytes:
    return b"".join(b"--b\r\n" + head + b"\r\n\r\nx\r\n" for head in heads) + b"--b--\r\n"


HOSTILE = {
    "semicolons": form(*[HEAD + b";" * 4000] * 60),
    "quotes": form(*[HEAD + b';"' * 2000] * 60),
    "few semicolons and many quotes": form(*[HEAD + b'; a="' * 14 + b'"' * 4000] * 60),
    "spaces": form(*[HEAD + b"\r\nX:" + b" " * 4000] * 60),
    "a long line": b"--b\r\n" + b"X: " + b"y" * 250_000 + b"\r\n\r\n\r\n--b--",
    "a long name": b"--b\r\n" + b"X" * 250_000 + b": y\r\n\r\n\r\n--b--",
    "many lines": b"--b\r\n" + b"X: y\r\n" * 40_000 + b"\r\n\r\n--b--",
    "blanks behind the boundary": b"--b\r\n\r\n\r\n--b" + b" " * 250_000,
    "almost boundaries": b"--b\r\n" + HEAD + b"\r\n\r\n" + b"\r\n--" * 62_000 + b"\r\n--b--",
    "line ends": b"--b\r\n" + HEAD + b"\r\n\r\n" + b"\r\n" * 125_000 + b"\r\n--b--",
    "before the first": b"\r\n" * 125_000 + b"--b",
    "parts": form(*[b"X: y"] * 20_000),
    "lines that break off": form(*[b"X: y\rX: y"] * 20_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_form_of_250_kb_takes_more_than_milliseconds(kind: str):
    body = HOSTILE[kind]
    assert len(body) > 200_000
    best = 1.0
    for _ in range(3):  # the least of three: others use the machine too
        started = time.thread_time()
        with suppress(RequestError, EmptyBody):
            forms.parse(body, TYPE, 1000)
        best = min(best, time.thread_time() - started)
    assert best < 0.008


def test_false_boundaries_are_left_to_a_thread():
    body = b"--b\r\n" + HEAD + b"\r\n\r\n" + b"\r\n--bx" * 40_000 + b"\r\n--b--"
    with pytest.raises(multipart.ManyFalseBoundaries):
        forms.parse(body, TYPE, 1000)
    assert forms.parse(body, TYPE).images == (b"\r\n--bx" * 40_000,)
