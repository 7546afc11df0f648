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
from serving.http.messages import (
    ASGIApp,
    ClientDisconnect,
    Message,
    Receive,
    Request,
    Response,
    Send,
)
from serving.http.model_manager import ModelManager
from serving.server.shutdown import GracefulShutdown

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

Handler = Callable[["App", Request], Awaitable[Response]]


class App:
    """Routes of the model, in front of `inner`, BentoML's app."""

    def __init__(self, inner: ASGIApp, model_manager: Callable[[], ModelManager]) -> None:
        """`desk` is asked at each request: it exists once BentoML has started the service."""
        self._inner = inner
        self._desk = model_manager
        self._leaving = GracefulShutdown()

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
        except ClientDisconnect:
            return
        if self._leaving.begun:
            reply.headers.append((b"connection", b"close"))
        await reply.send(request, send)
        if path != "/readyz":  # probes ask every few seconds
            log = self._desk().telemetry.log
            log(request.id, request.method, path, reply.status, reply.code, request.seconds)

    async def _reply(self, request: Request) -> Response:
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
        except ClientDisconnect:
            raise
        except Exception as error:  # the caller gets an answer and the log the traceback
            if problems.is_fault(error):
                _log.exception("request %s failed", request.id)
            return Response.problem(error, request)

    async def predict(self, request: Request) -> Response:
        """`POST /predict`: one image, as the raw body or as the multipart field `image`."""
        model_manager = self._desk()
        with _counted(model_manager):
            pairs = forms.query(request.query)
            body = await self._body(request, model_manager)
            if forms.is_multipart(request.content_type):
                form = await _form(body, request)
                if len(form.images) > 1:
                    raise RequestError("more than one image; send several to /predict/batch")
                body, pairs = form.images[0], [*pairs, *form.pairs]
            answer = await model_manager.answer(body, forms.options(pairs))
        model_manager.telemetry.answered(answer)
        model_manager.telemetry.observe("total", request.seconds)
        return Response.of(answer)

    async def predict_batch(self, request: Request) -> Response:
        """`POST /predict/batch`: several multipart fields `image`; an answer or error for each."""
        model_manager = self._desk()
        with _counted(model_manager):
            if not forms.is_multipart(request.content_type):
                raise RequestError("send multipart/form-data with several fields `image`")
            pairs = forms.query(request.query)
            form = await _form(await self._body(request, model_manager), request)
            options = forms.options([*pairs, *form.pairs])
            return Response.of(await model_manager.answer_each(form.images, options, request.id))

    async def model(self, request: Request) -> Response:
        """`GET /model`: the manifest, and how it is served here."""
        model_manager = self._desk()
        _authorise(request, model_manager)
        return Response(200, model_manager.model.manifest)

    async def ready(self, request: Request) -> Response:
        """`GET /readyz`: 200 and what is served, or 503 and why not."""
        model_manager = self._desk()
        # The log has it in full; where the bundle lies is nobody's business out there.
        refusal = model_manager.refusal.replace(str(model_manager.settings.bundle), "the bundle")
        refusal = re.sub(rf"({signing.TRUSTED} =) \S+", r"\1 …", refusal)
        try:
            predictor = model_manager.model.predictor
        except FledgeError as error:
            return Response.problem(type(error)(refusal), request)
        told = {
            "status": "ready",
            "model": predictor.model,
            "precision": predictor.precision,
            "provider": predictor.runtime.provider,
        }
        return Response.of(told | ({"refused": refusal} if refusal else {}))

    async def home(self, request: Request) -> Response:
        """`GET /`: the demo page. It comes before there is a model too, and waits for it."""
        try:
            model = self._desk().model.predictor.model
        except FledgeError:
            model = ""
        return page(model)

    async def _body(self, request: Request, model_manager: ModelManager) -> bytes:
        _authorise(request, model_manager)
        envelope = forms.ENVELOPE if forms.is_multipart(request.content_type) else 0
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                body = await request.body(model_manager.settings.max_bytes + envelope)
        except TimeoutError as error:
            raise problems.SlowRequest(f"the body took more than {READ_TIMEOUT:g} s") from error
        model_manager.telemetry.observe("read", request.seconds)
        return body


_ROUTES: Final[dict[str, dict[str, Handler]]] = {
    "/predict": {"POST": App.predict},
    "/predict/batch": {"POST": App.predict_batch},
    "/model": dict.fromkeys(_READ, App.model),
    "/readyz": dict.fromkeys(_READ, App.ready),
    "/": dict.fromkeys(_READ, App.home),
}


async def _form(body: bytes, request: Request) -> forms.Form:
    """Take a form apart; a long one on a thread, since it may be made to take long."""
    if len(body) <= _SHORT_FORM:
        return forms.parse(body, request.content_type)
    return await asyncio.to_thread(forms.parse, body, request.content_type)


@contextmanager
def _counted(model_manager: ModelManager) -> Iterator[None]:
    """Count what ends in an error by its code."""
    try:
        yield
    except ClientDisconnect:
        raise
    except Exception as error:
        model_manager.telemetry.count(problems.code_of(error))
        raise


def _authorise(request: Request, model_manager: ModelManager) -> None:
    keys = model_manager.settings.api_keys
    if not keys:
        return
    scheme, _, key = request.headers.get(b"authorization", b"").partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    # Every key is compared, in constant time: how long it takes tells nothing.
    known = sum(hmac.compare_digest(digest, one) for one in keys)
    if scheme.lower() != b"bearer" or not known:
        raise Unauthorized("send a valid key as `Authorization: Bearer KEY`")


def _not_allowed(request: Request, allowed: Iterable[str]) -> Response:
    allow = ", ".join(allowed)
    error = problems.MethodNotAllowed(f"{request.method[:20]} is not for this path; use {allow}")
    reply = Response.problem(error, request)
    reply.headers.append((b"allow", allow.encode()))
    return reply
