"""The ASGI app before BentoML's own: takes the hot routes, hands health and metrics on.

BentoML's middleware costs a request ten times what this does, counts unknown paths without bound,
and answers errors in its own shape. So what a caller of the model meets is here, and `/livez`,
`/metrics`, `/docs.json` and the lifecycle are BentoML's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from serving import forms, problems
from serving.desk import Desk
from serving.errors import FledgeError, Overloaded, RequestError, TooLarge, Unauthorized

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

READ_TIMEOUT: Final = 60.0
"""Seconds that a body may take to come in."""

BENTOML: Final = frozenset({"/livez", "/healthz", "/metrics", "/docs.json", "/schema.json"})
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger("bentoml.fledge")


class _Gone(Exception):
    """The caller hung up before the body was whole; there is nobody to answer."""


@dataclass
class _Request:
    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    receive: Receive
    id: str
    started: float = field(default_factory=time.perf_counter)


@dataclass
class _Reply:
    status: int
    body: bytes
    media_type: str = "application/json"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    code: str = "ok"


Handler = Callable[["Front", _Request], Awaitable[_Reply]]


class Front:
    """Routes of the model, in front of `inner`, BentoML's app."""

    def __init__(self, inner: App, desk: Callable[[], Desk]) -> None:
        """`desk` is asked at each request: it exists once BentoML has started the service."""
        self._inner = inner
        self._find_desk = desk

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD"):
            if path == "/docs":  # BentoML has its OpenAPI page at the root, where ours is
                scope, path = {**scope, "path": "/", "raw_path": b"/"}, "/metrics"
            if path in BENTOML or path.startswith("/static_content/"):
                await self._inner(scope, receive, send)
                return
        request = _request(scope, receive)
        try:
            reply = await self._reply(request)
        except _Gone:
            return
        await _send(reply, request, send)
        if path == "/readyz":
            return  # probes ask every few seconds
        seconds = time.perf_counter() - request.started
        desk = self._find_desk()
        desk.telemetry.log(request.id, request.method, path, reply.status, reply.code, seconds)

    async def _reply(self, request: _Request) -> _Reply:
        handlers = _ROUTES.get(request.path)
        try:
            if handlers is None:
                if request.path in BENTOML:
                    return _refuse(request, ("GET", "HEAD"))
                raise problems.NotFound("no such path; GET / lists what there is")
            handler = handlers.get(request.method)
            if handler is None:
                return _refuse(request, handlers)
            return await handler(self, request)
        except _Gone:
            raise
        except FledgeError as error:
            if error.http_status == 500:
                _log.exception("request %s failed", request.id)
            return _problem(error, request)
        except Exception as error:  # the caller gets an answer and the log the traceback
            _log.exception("request %s failed", request.id)
            return _problem(error, request)

    async def predict(self, request: _Request) -> _Reply:
        """`POST /predict`: one image, as the raw body or as the multipart field `image`."""
        desk = self._find_desk()
        try:
            pairs = forms.query(request.query)
            content_type = request.headers.get(b"content-type", b"")
            body = await self._body(request, desk, forms.is_multipart(content_type))
            if forms.is_multipart(content_type):
                form = forms.parse(body, content_type)
                if len(form.images) > 1:
                    raise RequestError("more than one image; send several to /predict/batch")
                body, pairs = form.images[0], [*pairs, *form.pairs]
            answer = await desk.answer(body, forms.options(pairs))
        except Exception as error:
            if not isinstance(error, _Gone):
                desk.telemetry.count(getattr(error, "code", "internal"))
            raise
        desk.telemetry.count("ok")
        desk.telemetry.observe("total", time.perf_counter() - request.started)
        return _Reply(200, _json(answer))

    async def predict_batch(self, request: _Request) -> _Reply:
        """`POST /predict/batch`: several multipart fields `image`; an answer or error for each."""
        desk = self._find_desk()
        try:
            content_type = request.headers.get(b"content-type", b"")
            if not forms.is_multipart(content_type):
                raise RequestError("send multipart/form-data with several fields `image`")
            pairs = forms.query(request.query)
            body = await self._body(request, desk, True)
            form = forms.parse(body, content_type)
            options = forms.options([*pairs, *form.pairs])
            answers = await desk.answer_each(form.images, options, request.id)
        except Exception as error:
            if not isinstance(error, _Gone):
                desk.telemetry.count(getattr(error, "code", "internal"))
            raise
        return _Reply(200, _json(answers))

    async def model(self, request: _Request) -> _Reply:
        """`GET /model`: the manifest, and how it is served here."""
        desk = self._find_desk()
        _authorise(request, desk)
        return _Reply(200, desk.model.manifest)

    async def ready(self, request: _Request) -> _Reply:
        """`GET /readyz`: 200 and what is served, or 503 and why not."""
        desk = self._find_desk()
        try:
            predictor = desk.model.predictor
        except FledgeError as error:
            return _problem(type(error)(desk.refusal), request)
        facts = {
            "model": predictor.model,
            "precision": predictor.precision,
            "provider": predictor.runtime.provider,
        }
        return _Reply(200, _json({"status": "ready", **facts}))

    async def home(self, request: _Request) -> _Reply:
        """`GET /`: what is served and where to look next."""
        model = self._find_desk().model.predictor.model
        headers = [(b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'")]
        page = _HOME.format(model=html.escape(model)).encode()
        return _Reply(200, page, "text/html; charset=utf-8", headers)

    async def _body(self, request: _Request, desk: Desk, multipart: bool) -> bytes:
        """The whole body, refused as soon as it is known to be too long."""
        _authorise(request, desk)
        limit = desk.settings.max_bytes + (forms.ENVELOPE if multipart else 0)
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                body = await _read(request, limit)
        except TimeoutError as error:
            raise problems.SlowRequest(f"the body took more than {READ_TIMEOUT:g} s") from error
        desk.telemetry.observe("read", time.perf_counter() - request.started)
        return body


_ROUTES: Final[dict[str, dict[str, Handler]]] = {
    "/predict": {"POST": Front.predict},
    "/predict/batch": {"POST": Front.predict_batch},
    "/model": {"GET": Front.model, "HEAD": Front.model},
    "/readyz": {"GET": Front.ready, "HEAD": Front.ready},
    "/": {"GET": Front.home, "HEAD": Front.home},
}

_HOME: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Fledge</title>
<style>:root{{color-scheme:light dark}}body{{font:1rem system-ui;max-width:40rem;margin:3rem auto}}
</style>
<h1>{model}</h1>
<p>Send an image: <code>curl --data-binary @photo.jpg -H "Content-Type: image/jpeg"
http://HOST:PORT/predict</code></p>
<p><a href="docs">API</a> · <a href="model">the model</a> · <a href="metrics">metrics</a></p>
"""


def _request(scope: Message, receive: Receive) -> _Request:
    headers = dict(scope["headers"])
    stated = headers.get(b"x-request-id", b"")
    kept = stated.decode() if _REQUEST_ID.fullmatch(stated) else os.urandom(8).hex()
    return _Request(scope["method"], scope["path"], scope["query_string"], headers, receive, kept)


async def _read(request: _Request, limit: int) -> bytes:
    message = f"more than the {limit} bytes allowed"
    stated = request.headers.get(b"content-length", b"0")
    if stated.isdigit() and int(stated) > limit:
        raise TooLarge(message)
    chunks: list[bytes] = []
    size = 0
    while True:
        event = await request.receive()
        if event["type"] == "http.disconnect":
            raise _Gone
        chunk = event.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise TooLarge(message)
        chunks.append(chunk)
        if not event.get("more_body", False):
            return b"".join(chunks)


def _authorise(request: _Request, desk: Desk) -> None:
    keys = desk.settings.api_keys
    if not keys:
        return
    scheme, _, key = request.headers.get(b"authorization", b"").partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    # Every key is compared, in constant time: how long it takes tells nothing.
    known = sum(hmac.compare_digest(digest, one) for one in keys)
    if scheme.lower() != b"bearer" or not known:
        raise Unauthorized("send a valid key as `Authorization: Bearer KEY`")


def _refuse(request: _Request, allowed: Any) -> _Reply:
    allow = ", ".join(allowed)
    error = problems.MethodNotAllowed(f"{request.method[:20]} is not for this path; use {allow}")
    reply = _problem(error, request)
    reply.headers.append((b"allow", allow.encode()))
    return reply


def _problem(error: Exception, request: _Request) -> _Reply:
    body = problems.problem(error, request.id)
    headers = []
    if isinstance(error, Overloaded):
        headers.append((b"retry-after", b"1"))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, (TooLarge, Unauthorized, problems.SlowRequest)):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return _Reply(body["status"], _json(body), problems.MEDIA_TYPE, headers, body["code"])


async def _send(reply: _Reply, request: _Request, send: Send) -> None:
    headers = [
        (b"content-type", reply.media_type.encode()),
        (b"content-length", str(len(reply.body)).encode()),
        (b"x-request-id", request.id.encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    body = b"" if request.method == "HEAD" else reply.body
    await send({"type": "http.response.body", "body": body})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
