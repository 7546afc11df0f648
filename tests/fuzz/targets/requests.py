"""Prediction requests: query strings and multipart bodies, alone and through the whole app."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from serving.errors import TooLarge
from serving.http import forms, json_body
from serving.imaging import decode, not_images
from tests.fuzz import mutators
from tests.fuzz.target import Target

BATCH_PIXELS = 100_000
"""`max_pixels` of the service. 64 pictures of one body take its deadline of some seconds together,
which is more than the CPU time of one input."""

_BOUNDARY = b"multipart/form-data; boundary=b"


def _part(head: bytes, body: bytes) -> bytes:
    return b"--b\r\nContent-Disposition: " + head + b"\r\n\r\n" + body + b"\r\n"


_IMAGE = b'form-data; name="image"; filename="x.jpg"'
_BODIES = (
    _part(_IMAGE, b"pixels") + b"--b--\r\n",
    _part(_IMAGE, b"one") + _part(_IMAGE, b"two") + b"--b--",
    _part(b'form-data; name="tta"', b"4") + _part(_IMAGE, b"\xff\xd8--b\r\n") + b"--b--\r\n",
    _part(b"form-data; name=top_k", b"1") + _part(b"form-data; name=image", b"") + b"--b--\r\n",
    b"before\r\n" + _part(b"form-data; name*=utf-8''image", b"x") + b"--b--\r\nafter",
    _part(b'form-data; name="im\\"age"; name="image"', b"x") + b"--b--\r\n",
)


def form_seeds() -> Iterator[bytes]:
    for query in (b"", b"tta=4", b"tta=4&top_k=2", b"top_k=%31&tta", b"a=b&" * 9):
        yield query + b"\n" + _BOUNDARY + b"\n" + _BODIES[0]
    for body in _BODIES:
        yield b"\n" + _BOUNDARY + b"\n" + body
    yield b'\nmultipart/form-data; charset="x"; boundary="b"\n' + _BODIES[0]


def check_form(data: bytes) -> None:
    """The input: a query string, a Content-Type and a body, separated by line breaks."""
    query, _, rest = data.partition(b"\n")
    content_type, _, body = rest.partition(b"\n")
    pairs = forms.query(query)
    form = forms.parse(body, content_type)
    if not form.images or len(form.images) + len(form.pairs) > forms.MAX_PARTS:
        raise AssertionError("no image, or too many parts")
    found = forms.options([*pairs, *form.pairs])
    if not isinstance(found.tta, int) or not isinstance(found.top_k, int | None):
        raise AssertionError(str(found))


def prepare_form() -> None:
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # one line for each fault


def mutate_form(rng: random.Random, data: bytes) -> bytes:
    """Change one line of the heads, or copy, drop and move whole parts."""
    head, mark, body = data.partition(b"\n")
    kind, mark2, body = body.partition(b"\n")
    parts = body.split(b"--b")
    at = rng.randrange(len(parts))
    choice = rng.randrange(7)
    if choice == 0:
        parts[at:at] = [rng.choice(parts)] * rng.choice((1, 1, 2, 63, 64))
    elif choice == 1:
        del parts[at]
    elif choice == 2:
        name, colon, rest = parts[at].partition(b":")
        parts[at] = name + colon + rng.choice(_ODD) + rest
    elif choice == 3:
        parts[at] = parts[at].replace(b"\r\n", rng.choice((b"\n", b"\r", b"\r\n\r\n")), 1)
    elif choice == 4:
        kind = rng.choice(
            (_BOUNDARY, b"multipart/form-data", _BOUNDARY + rng.choice(_ODD), _BOUNDARY.upper())
        )
    elif choice == 5:
        head = rng.choice((b"tta=", b"top_k=", b"")) + rng.choice(_ODD) + b"&" + head
    else:
        cut = rng.randint(0, len(parts[at]))
        parts[at] = parts[at][:cut] + rng.choice(_ODD) + parts[at][cut:]
    return head + mark + kind + mark2 + b"--b".join(parts)


_TEXT = base64.b64encode(bytes(range(256)))
_JSON_BODIES = (
    b'{"image": "' + _TEXT + b'", "tta": 2, "top_k": null}',
    b'{"images": ["' + _TEXT + b'", "data:image/png;base64,iVBORw0KGgo="], "top_k": "1"}',
    b'\xef\xbb\xbf {"image":"data:;base64,' + _TEXT.replace(b"/", b"\\/") + b'"}',
    b'{"image":"' + base64.encodebytes(bytes(range(256))).replace(b"\n", b"\\r\\n") + b'"}',
    b'{"image":"' + base64.urlsafe_b64encode(bytes(range(251, 256)) * 30).rstrip(b"=") + b'"}',
    b'{"image":"","tta":1e3,"x":{"y":[1,"z"]}}',
)


def json_seeds() -> Iterator[bytes]:
    for body in _JSON_BODIES:
        yield (b"images\n" if b"images" in body else b"image\n") + body
    for text in (b"<!DOCTYPE html>", b"https://a.example/x", b"x.jpg", b"b'\\xff'", _TEXT, b"a=b"):
        yield b"image\n" + text


def check_json(data: bytes) -> None:
    """The input: the name of the field, a line break, and a body."""
    field, _, body = data.partition(b"\n")
    name = "images" if field == b"images" else "image"
    if "\n" in not_images.describe(body):
        raise AssertionError("a description of several lines")
    form = json_body.parse(body, name)
    if not 1 <= len(form.images) <= (forms.MAX_PARTS if name == "images" else 1):
        raise AssertionError(f"{len(form.images)} images")
    if sum(map(len, form.images)) > len(body):
        raise AssertionError("more bytes than came")
    forms.options(form.pairs)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Change the values of the JSON, or put an odd text into one of its texts."""
    field, mark, body = data.partition(b"\n")
    if rng.random() < 0.5:
        return field + mark + mutators.json_change()(rng, body)
    at = rng.randrange(len(body) + 1)
    return field + mark + body[:at] + rng.choice(_JSON_ODD) + body[at + rng.randrange(3) :]


_JSON_ODD = (
    *(
        b'"',
        b"\\",
        b"\\\\",
        b'\\"',
        b"\\u0000",
        b"\\u002b",
        b"\\ud800",
        b"\\n",
        b"\n",
        b"=",
        b"-",
        b"_",
    ),
    *(
        b"data:",
        b";base64,",
        b"{",
        b"[" * 101,
        b'"a":1,',
        b"A" * 70,
        b"\0",
        b"\xff",
        b"NaN",
        b"9" * 50,
    ),
)
_ODD = (
    *(b'"', b"\\", b";", b"=", b"\0", b"\r\n", b"--", b"\xff", b"%00", b"%ff", b"9" * 400, b"-1"),
    *(b"; name=image", b"; name*=utf-8''a", b"; name*0=im; name*1=age", b" ", b"\xd9\xa1", b"1e3"),
    *(
        b"X: y\r\n" * 200,
        b"a" * 5000,
        b"; filename=\\\\a\\b",
        b"; charset=utf-7",
        b"''",
        b"utf-99''",
    ),
)
_WORDS = (
    *(b"multipart/form-data", b"boundary=", b"Content-Disposition", b"form-data", b"name=", b"tta"),
    *(b"image", b"filename", b"top_k", b"--b", b"--b--", b"\r\n\r\n", b"charset", b"name*=", b"&"),
)


# The whole app, in this process, with a real model.

_loop: asyncio.AbstractEventLoop
_app: Any
_failures: list[BaseException] = []


class _Failures(logging.Handler):
    """Collects the exceptions of which the app logs a traceback, and answers 500."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            _failures.append(record.exc_info[1])


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TooLarge("no process may be started")


def prepare_app() -> None:
    global _loop, _app
    prepare_form()
    from serving.http.app import App
    from serving.http.model_manager import ModelManager
    from serving.http.telemetry import Telemetry
    from serving.settings import Settings
    from tests.support.tiny_bundle import tiny_bundle

    bundle = tiny_bundle(Path("bundle").absolute())
    settings = Settings(bundle=bundle, device="cpu", max_pixels=BATCH_PIXELS)
    # No process may be started here: images that need one are refused.
    decode.decoders.decode = _refuse  # type: ignore[method-assign]
    manager = ModelManager(settings, Telemetry())
    manager.load()
    if manager.refusal:
        raise RuntimeError(manager.refusal)
    logger = logging.getLogger("bentoml.fledge")
    logger.handlers, logger.propagate = [_Failures()], False
    logging.getLogger("bentoml").handlers = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - the access log: written, but not kept
    _loop = asyncio.new_event_loop()
    asyncio.set_event_loop(_loop)
    _app = App(inner, lambda: manager)


def request_seeds() -> Iterator[bytes]:
    from tests.support.tiny_bundle import photo

    jpeg = photo(1, (24, 16))
    yield b"POST /predict\ncontent-type: image/jpeg\n\n" + jpeg
    yield b"POST /predict?tta=3&top_k=2\n\n" + jpeg
    for path in (b"/predict", b"/predict/batch?tta=2"):
        for body in _BODIES[:3]:
            form = body.replace(b"one", jpeg).replace(b"pixels", jpeg)
            yield b"POST " + path + b"\ncontent-type: " + _BOUNDARY + b"\n\n" + form
    text = base64.b64encode(jpeg)
    yield b"POST /predict\ncontent-type: application/json\n\n" + b'{"image":"' + text + b'"}'
    yield b"POST /predict/batch?tta=2\n\n" + b'{"images":["' + text + b'","' + text + b'"]}'
    yield b"POST /predict\ncontent-encoding: gzip\n\n" + jpeg
    for path in (b"/", b"/readyz", b"/model", b"/docs", b"/livez", b"/nowhere", b"/predict"):
        yield b"GET " + path + b"\naccept: */*\nx-request-id: a.b:c-1\n\n"
    yield b"HEAD /model\nauthorization: Bearer x\nexpect: 100-continue\n\n"


def check_request(data: bytes) -> None:
    """The input: `METHOD PATH?QUERY`, lines of headers, an empty line, the body."""
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, address = first.partition(b" ")
    path, _, query = address.partition(b"?")
    headers = [
        (name.strip().lower(), value.strip())
        for name, _, value in (line.partition(b":") for line in lines)
    ]
    scope = {
        "type": "http",
        "method": method.decode("latin-1").upper(),
        "path": path.decode("utf-8", "replace"),
        "query_string": query,
        "headers": headers,
    }
    status, answer = _loop.run_until_complete(_ask(scope, body))
    if _failures:
        error = _failures[0]
        _failures.clear()
        raise error
    kind = dict(answer[0]).get(b"content-type", b"")
    if status >= 400 and kind and scope["method"] != "HEAD":
        problem = json.loads(answer[1])
        if problem["status"] != status or not problem["code"]:
            raise AssertionError(f"{status}: {problem}")
    if (status >= 500 and status not in (503, 504)) or status < 200:  # a busy machine may be late
        raise AssertionError(f"status {status}")


async def _ask(scope: Any, body: bytes) -> tuple[int, tuple[Any, bytes]]:
    events = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return events.pop() if events else {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        sent.append(event)

    await _app(scope, receive, send)
    if not sent:
        return 204, ([], b"")
    return sent[0]["status"], (sent[0]["headers"], b"".join(one["body"] for one in sent[1:]))


def mutate_request(rng: random.Random, data: bytes) -> bytes:
    from tests.robustness.mutate import parts

    head, _, body = data.partition(b"\n\n")
    if rng.random() < 0.3:
        return mutators.lines_change()(rng, head) + b"\n\n" + body
    if b"--b" in body:
        changed = mutate_form(rng, b"\n\n" + body).partition(b"\n")[2].partition(b"\n")[2]
        return head + b"\n\n" + changed
    return head + b"\n\n" + parts(rng, body, body)


TARGETS = (
    Target("form", check_form, form_seeds, mutate_form, prepare=prepare_form, words=_WORDS),
    Target("json", check_json, json_seeds, mutate_json, words=(*_JSON_ODD, b"image", b"images")),
    Target(
        "request",
        check_request,
        request_seeds,
        mutate_request,
        prepare=prepare_app,
        words=(*_WORDS, b"/predict", b"/predict/batch", b"POST ", b"GET ", b"content-type: "),
    ),
)
