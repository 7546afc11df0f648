"""The ASGI app before BentoML's own: takes the hot routes, hands health and metrics on.

BentoML's middleware costs a request ten times what this does, counts unknown paths without bound,
and answers errors in its own shape. So what a caller of the model meets is here, and `/livez`,
`/metrics`, `/docs.json` and the lifecycle are BentoML's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from serving.bundle import signing
from serving.errors import FledgeError, RequestError, Unauthorized
from serving.http import forms, problems
from serving.http.demo_page import DOCS_POLICY, guarded, page
from serving.http.messages import App, Gone, Message, Receive, Reply, Request, Send
from serving.http.model_manager import Desk
from serving.server.shutdown import Leaving

READ_TIMEOUT: Final = 60.0
"""Seconds that a body may take to come in."""

BENTOML: Final = frozenset({"/livez", "/healthz", "/metrics", "/docs.json", "/schema.json"})
# By name: BentoML makes a label of its metrics of any path that it is asked for.
_ASSETS: Final = frozenset(
    f"/static_content/{name}"
    for name in (
        "favicon-dark-32x32.png",
        "favicon-light-32x32.png",
        "index.css",
        "marked.min.js",
        "swagger-initializer.js",
        "swagger-ui-bundle.js",
        "swagger-ui-standalone-preset.js",
        "swagger-ui.css",
    )
)
_READ: Final = ("GET", "HEAD")
_SHORT_FORM: Final = 2**18
_log = logging.getLogger("bentoml.fledge")

Handler = Callable[["Front", Request], Awaitable[Reply]]


class Front:
    """Routes of the model, in front of `inner`, BentoML's app."""

    def __init__(self, inner: App, desk: Callable[[], Desk]) -> None:
        """`desk` is asked at each request: it exists once BentoML has started the service."""
        self._inner = inner
        self._desk = desk
        self._leaving = Leaving()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "websocket":  # nothing here speaks it, and BentoML would count its path
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                self._leaving.watch(asyncio.get_running_loop())
            await self._inner(scope, receive, send)
            return
        path = scope["path"]
        if scope["method"] in _READ:
            if path == "/docs":  # BentoML has its OpenAPI page at the root, where ours is
                inner = {**scope, "path": "/", "raw_path": b"/"}
                await self._inner(inner, receive, guarded(send, DOCS_POLICY))
                return
            if path in BENTOML or path in _ASSETS:
                await self._inner(scope, receive, send)
                return
        request = Request.of(scope, receive)
        try:
            reply = await self._reply(request)
        except Gone:
            return
        if self._leaving.begun:
            reply.headers.append((b"connection", b"close"))
        await reply.send(request, send)
        if path != "/readyz":  # probes ask every few seconds
            log = self._desk().telemetry.log
            log(request.id, request.method, path, reply.status, reply.code, request.seconds)

    async def _reply(self, request: Request) -> Reply:
        try:
            handlers = _ROUTES.get(request.path)
            if handlers is None:
                if request.path in BENTOML or request.path == "/docs":
                    return _not_allowed(request, _READ)
                raise problems.NotFound("no such path; GET / tells what there is")
            handler = handlers.get(request.method)
            if handler is None:
                return _not_allowed(request, handlers)
            return await handler(self, request)
        except Gone:
            raise
        except Exception as error:  # the caller gets an answer and the log the traceback
            if problems.is_fault(error):
                _log.exception("request %s failed", request.id)
            return Reply.problem(error, request)

    async def predict(self, request: Request) -> Reply:
        """`POST /predict`: one image, as the raw body or as the multipart field `image`."""
        desk = self._desk()
        with _counted(desk):
            pairs = forms.query(request.query)
            body = await self._body(request, desk)
            if forms.is_multipart(request.content_type):
                form = await _form(body, request)
                if len(form.images) > 1:
                    raise RequestError("more than one image; send several to /predict/batch")
                body, pairs = form.images[0], [*pairs, *form.pairs]
            answer = await desk.answer(body, forms.options(pairs))
        desk.telemetry.answered(answer)
        desk.telemetry.observe("total", request.seconds)
        return Reply.of(answer)

    async def predict_batch(self, request: Request) -> Reply:
        """`POST /predict/batch`: several multipart fields `image`; an answer or error for each."""
        desk = self._desk()
        with _counted(desk):
            if not forms.is_multipart(request.content_type):
                raise RequestError("send multipart/form-data with several fields `image`")
            pairs = forms.query(request.query)
            form = await _form(await self._body(request, desk), request)
            options = forms.options([*pairs, *form.pairs])
            return Reply.of(await desk.answer_each(form.images, options, request.id))

    async def model(self, request: Request) -> Reply:
        """`GET /model`: the manifest, and how it is served here."""
        desk = self._desk()
        _authorise(request, desk)
        return Reply(200, desk.model.manifest)

    async def ready(self, request: Request) -> Reply:
        """`GET /readyz`: 200 and what is served, or 503 and why not."""
        desk = self._desk()
        # The log has it in full; where the bundle lies is nobody's business out there.
        refusal = desk.refusal.replace(str(desk.settings.bundle), "the bundle")
        refusal = re.sub(rf"({signing.TRUSTED} =) \S+", r"\1 …", refusal)
        try:
            predictor = desk.model.predictor
        except FledgeError as error:
            return Reply.problem(type(error)(refusal), request)
        told = {
            "status": "ready",
            "model": predictor.model,
            "precision": predictor.precision,
            "provider": predictor.runtime.provider,
        }
        return Reply.of(told | ({"refused": refusal} if refusal else {}))

    async def home(self, request: Request) -> Reply:
        """`GET /`: the demo page. It comes before there is a model too, and waits for it."""
        try:
            model = self._desk().model.predictor.model
        except FledgeError:
            model = ""
        return page(model)

    async def _body(self, request: Request, desk: Desk) -> bytes:
        _authorise(request, desk)
        envelope = forms.ENVELOPE if forms.is_multipart(request.content_type) else 0
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                body = await request.body(desk.settings.max_bytes + envelope)
        except TimeoutError as error:
            raise problems.SlowRequest(f"the body took more than {READ_TIMEOUT:g} s") from error
        desk.telemetry.observe("read", request.seconds)
        return body


_ROUTES: Final[dict[str, dict[str, Handler]]] = {
    "/predict": {"POST": Front.predict},
    "/predict/batch": {"POST": Front.predict_batch},
    "/model": dict.fromkeys(_READ, Front.model),
    "/readyz": dict.fromkeys(_READ, Front.ready),
    "/": dict.fromkeys(_READ, Front.home),
}


async def _form(body: bytes, request: Request) -> forms.Form:
    """Take a form apart; a long one on a thread, since it may be made to take long."""
    if len(body) <= _SHORT_FORM:
        return forms.parse(body, request.content_type)
    return await asyncio.to_thread(forms.parse, body, request.content_type)


@contextmanager
def _counted(desk: Desk) -> Iterator[None]:
    """Count what ends in an error by its code."""
    try:
        yield
    except Gone:
        raise
    except Exception as error:
        desk.telemetry.count(problems.code_of(error))
        raise


def _authorise(request: Request, desk: Desk) -> None:
    keys = desk.settings.api_keys
    if not keys:
        return
    scheme, _, key = request.headers.get(b"authorization", b"").partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    # Every key is compared, in constant time: how long it takes tells nothing.
    known = sum(hmac.compare_digest(digest, one) for one in keys)
    if scheme.lower() != b"bearer" or not known:
        raise Unauthorized("send a valid key as `Authorization: Bearer KEY`")


def _not_allowed(request: Request, allowed: Iterable[str]) -> Reply:
    allow = ", ".join(allowed)
    error = problems.MethodNotAllowed(f"{request.method[:20]} is not for this path; use {allow}")
    reply = Reply.problem(error, request)
    reply.headers.append((b"allow", allow.encode()))
    return reply
