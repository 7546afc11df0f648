"""The ASGI app of the service, which wraps BentoML's ASGI app.

This app answers the routes for prediction, readiness, the manifest and the demo page. `/livez`,
`/metrics`, `/docs` and its files are BentoML's (`serving.http.bentoml_routes`), and BentoML handles
the ASGI lifespan.

Prediction does not go through BentoML's middleware, because the middleware takes ten times as long
per request as this app, adds a metrics label for every requested path, and has its own format of
errors.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

from serving.bundle import signing
from serving.errors import (
    FledgeError,
    ImageError,
    NotReady,
    Overloaded,
    RequestError,
    Unauthorized,
)
from serving.http import forms, json_body, problems
from serving.http.access import Access
from serving.http.bentoml_routes import PAGE, BentomlRoutes
from serving.http.demo_page import render
from serving.http.keys import ApiKeys
from serving.http.messages import (
    BATCH_PATH,
    ASGIApp,
    ClientDisconnect,
    Message,
    Receive,
    Request,
    Response,
    Send,
)
from serving.http.model_manager import ModelManager
from serving.http.multipart import ManyFalseBoundaries
from serving.http.predict import predict_image, predict_images
from serving.imaging.not_images import describe
from serving.inference.decoding import request_id
from serving.server import bentoml_compat, connection_limits, log_queue, tls
from serving.server.disconnect import DISCONNECT, Disconnect
from serving.server.shutdown import GracefulShutdown
from serving.settings import Settings

READ_TIMEOUT: Final = 60.0
"""Seconds that a client may take to send the body of a request."""

_READ_METHODS: Final = ("GET", "HEAD")
_SMALL_FORM: Final = 2**18
_MOST_FALSE: Final = 1000
"""Largest form or JSON that is parsed on the event loop, in bytes and in false boundaries; one with
more is parsed in a thread."""
_CLOSED_BY_CALLER: Final = 499  # in the log only; nginx uses this status too
_log = logging.getLogger("bentoml.fledge")

Handler = Callable[["App", Request], Awaitable[Response]]


class App:
    """ASGI app that answers Fledge's routes and passes BentoML's routes on to BentoML's app."""

    def __init__(self, inner: ASGIApp, model_manager: Callable[[], ModelManager]) -> None:
        """Build the app.

        Args:
            inner: BentoML's ASGI app.
            model_manager: Function that returns the model manager. Each request calls this
                function, because the manager exists only after BentoML has started the service.
        """
        self._inner = inner
        self._bentoml = BentomlRoutes(inner)
        self._model_manager = model_manager
        self._shutdown = GracefulShutdown()
        self._access = Access()
        self._api_keys: ApiKeys | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to BentoML's app."""
        if scope["type"] == "websocket":  # not supported, and BentoML would add its path as a label
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                try:
                    self._install()
                except FledgeError as error:  # else uvicorn would serve without a lifespan
                    await receive()
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
            await self._inner(scope, receive, send)
            return
        path = scope["path"]
        request = Request.of(scope, receive)
        refusal = self._access.refusal(scope, request.headers)
        if refusal is None and scope["method"] in _READ_METHODS and self._bentoml.has(path):
            await self._bentoml.answer(scope, send)
            return
        request_id.set(f"{request.id} from {request.client or '-'}")
        disconnect = scope.get(DISCONNECT) or Disconnect()
        disconnect.task = asyncio.current_task()
        try:
            response = await self._respond(request, refusal)
        except ClientDisconnect:
            self._log(request, _CLOSED_BY_CALLER, "closed-by-caller")
            return
        except asyncio.CancelledError:
            self._log(request, _CLOSED_BY_CALLER, "closed-by-caller")
            if disconnect.happened:
                return
            raise
        finally:
            disconnect.task = None
            if request.upload is not None:
                self._model_manager().bodies.give_back(request.upload)
        response.headers.extend(self._access.cors_headers(request.headers))
        if self._shutdown.started:
            response.headers.append((b"connection", b"close"))
        await response.send(request, send)
        if path != "/readyz":  # probes call it every few seconds
            self._log(request, response.status, response.code)

    def _log(self, request: Request, status: int, code: str) -> None:
        log = self._model_manager().telemetry.log
        log(request.id, request.method, request.path, status, code, request.seconds, request.client)

    def _install(self) -> None:
        """Set up the uvicorn server of this process, before it begins to listen."""
        log_queue.install()
        server = bentoml_compat.running_uvicorn_server()
        if server is not None:
            settings = Settings.from_env()
            listening = partial(bentoml_compat.listening_addresses, server)
            self._access = Access(settings.hosts, settings.cors_origins, listening)

            def count(reason: str) -> None:
                self._model_manager().telemetry.refused_connection(reason)

            context = tls.context_of(settings)
            connection_limits.install(server, settings.max_connections, count, context)
        self._shutdown.install(asyncio.get_running_loop())  # replaces the handler with the server

    async def _respond(self, request: Request, refusal: Exception | None) -> Response:
        try:
            if refusal is not None:
                raise refusal
            handlers = _ROUTES.get(request.path)
            if handlers is None:
                if request.path in bentoml_compat.ROUTES or request.path == PAGE:
                    return _method_not_allowed(request, _READ_METHODS)
                raise problems.NotFound("no such path; GET /docs lists the API")
            handler = handlers.get(request.method)
            if handler is None:
                preflight = self._access.preflight(request.method, request.headers, handlers)
                if preflight is not None:
                    return preflight
                return _method_not_allowed(request, handlers)
            return await handler(self, request)
        except ClientDisconnect:
            raise
        except Exception as error:  # the client gets a problem document, the log the traceback
            if problems.is_fault(error):
                _log.exception("request %s failed", request.id)
            return Response.problem(error, request)

    async def predict(self, request: Request) -> Response:
        """Answer `POST /predict`: classify one image.

        The image is the raw body, the multipart field `image`, or base64 in the JSON field `image`.
        """
        model_manager = self._model_manager()
        body = b""
        with _count_errors(model_manager):
            try:
                pairs = forms.query(request.query)
                body = await self._body(request, model_manager)
                content_type = request.content_type
                if forms.is_multipart(content_type) or (
                    body[:1] in json_body.FIRST and json_body.is_json(body, content_type)
                ):
                    form = await _parse(body, content_type, "image")
                    if len(form.images) > 1:
                        keys = bool(model_manager.settings.api_keys)
                        line = request.curl(keys=keys, path=BATCH_PATH)
                        raise RequestError(f"more than one image; send several so: {line}")
                    body, pairs = form.images[0], [*pairs, *form.pairs]
                answer = await predict_image(model_manager, body, forms.options(pairs))
            except (ImageError, RequestError) as error:
                raise self._explain(request, error, body) from None
        model_manager.telemetry.answered(answer)
        model_manager.telemetry.observe("total", request.seconds)
        return Response.of(answer)

    async def predict_batch(self, request: Request) -> Response:
        """Answer `POST /predict/batch`: classify the images in several multipart fields `image`.

        They may also be an array of base64 texts, the JSON field `images`. The response has one
        answer or error per image.
        """
        model_manager = self._model_manager()
        body = b""
        explain = partial(self._explain, request)
        with _count_errors(model_manager):
            try:
                pairs = forms.query(request.query)
                body = await self._body(request, model_manager)
                content_type = request.content_type
                is_json = json_body.is_json(body, content_type)
                if not is_json and not forms.is_multipart(content_type):
                    what = describe(body)
                    this = f"this is {what}; " if what else ""
                    raise RequestError(f"{this}use several fields `image`, or JSON with `images`")
                form = await _parse(body, content_type, "images")
                body = b""
                self._keys(model_manager).count(request, len(form.images) - 1)
                options = forms.options([*pairs, *form.pairs])
                answers = await predict_images(
                    model_manager, form.images, options, request.id, explain
                )
            except (ImageError, RequestError) as error:
                raise explain(error, body) from None
        overloaded = [one["error"] for one in answers if _is_overloaded(one)]
        if len(overloaded) == len(answers):
            full = Overloaded("the queue has no room for these images; try again later")
            return Response.problem(full, request)
        for problem in overloaded:
            problem["retry_after"] = problems.OVERLOADED_SECONDS
        return Response.of(answers)

    async def model(self, request: Request) -> Response:
        """Answer `GET /model`: the bundle's manifest, and the precision and provider in use."""
        model_manager = self._model_manager()
        with _count_errors(model_manager, (Unauthorized, problems.RateLimited)):
            await self._keys(model_manager).authorise(request)
        return Response(200, model_manager.model.manifest)

    async def ready(self, request: Request) -> Response:
        """Answer `GET /readyz`: 200 and the served model, or 503 and the reason."""
        model_manager = self._model_manager()
        # Clients get the reason without paths of this machine; the log has the full text.
        refusal = model_manager.refusal.replace(str(model_manager.settings.bundle), "the bundle")
        refusal = re.sub(rf"({signing.TRUSTED} =) \S+", r"\1 …", refusal)
        try:
            model = model_manager.model
        except FledgeError as error:
            return Response.problem(type(error)(refusal), request)
        if model.engine.overdue.all:
            busy = NotReady("every thread works on an image whose request has ended")
            return Response.problem(busy, request)
        predictor = model.predictor
        state = {
            "status": "ready",
            "model": predictor.model,
            "precision": predictor.precision,
            "provider": predictor.runtime.provider,
        }
        return Response.of(state | ({"refused": refusal} if refusal else {}))

    async def demo_page(self, request: Request) -> Response:
        """Answer `GET /` with the demo page. The page polls until a model is loaded."""
        try:
            model = self._model_manager().model.predictor.model
        except FledgeError:
            model = ""
        return render(model)

    def _keys(self, model_manager: ModelManager) -> ApiKeys:
        if self._api_keys is None:
            settings = model_manager.settings
            self._api_keys = ApiKeys(settings.api_keys, settings.key_rate / settings.workers)
        return self._api_keys

    def _explain(self, request: Request, error: FledgeError, data: bytes) -> FledgeError:
        keys = bool(self._model_manager().settings.api_keys)
        return problems.explain(error, data, request, keys=keys)

    async def _body(self, request: Request, model_manager: ModelManager) -> bytes:
        await self._keys(model_manager).authorise(request, images=1)
        coding = request.headers.get(b"content-encoding")
        if coding and coding.strip().lower() not in (b"", b"identity"):
            line = request.curl(keys=bool(model_manager.settings.api_keys))
            raise problems.UnsupportedCoding(
                f"the body has Content-Encoding {coding.decode('latin-1')[:40]!r}, and bodies are "
                f"not decompressed; send the file itself: {line}"
            )
        limit, content_type = model_manager.settings.max_bytes, request.content_type
        if forms.is_multipart(content_type):
            limit += forms.MAX_OVERHEAD
        elif b"json" in content_type.lower() and json_body.is_json_type(content_type):
            limit = json_body.max_length(limit)
        bodies = model_manager.bodies
        body = await request.body(min(limit, bodies.most), bodies, READ_TIMEOUT)
        model_manager.telemetry.observe("read", request.seconds)
        return body


_ROUTES: Final[dict[str, dict[str, Handler]]] = {
    "/predict": {"POST": App.predict},
    BATCH_PATH: {"POST": App.predict_batch},
    "/model": dict.fromkeys(_READ_METHODS, App.model),
    "/readyz": dict.fromkeys(_READ_METHODS, App.ready),
    "/": dict.fromkeys(_READ_METHODS, App.demo_page),
}


async def _parse(body: bytes, content_type: bytes, field: str) -> forms.Form:
    """Parse a form or JSON, on the event loop if it is small.

    Args:
        body: The body.
        content_type: Its Content-Type.
        field: Field of JSON with the image or images.
    """
    is_form = forms.is_multipart(content_type)
    if len(body) <= _SMALL_FORM:
        if not is_form:
            return json_body.parse(body, field)
        with suppress(ManyFalseBoundaries):
            return forms.parse(body, content_type, _MOST_FALSE)
    parse = partial(forms.parse, body, content_type)
    if not is_form:
        parse = partial(json_body.parse, body, field)
    parsing = asyncio.create_task(asyncio.to_thread(parse))
    try:
        return await asyncio.shield(parsing)
    except asyncio.CancelledError:
        await asyncio.wait([parsing])  # the thread has the body until then
        raise


def _is_overloaded(answer: dict[str, Any]) -> bool:
    return "error" in answer and answer["error"]["code"] == Overloaded.code


@contextmanager
def _count_errors(
    model_manager: ModelManager, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Count an exception of the `with` block in the metrics, by error code; then re-raise it.

    Only exceptions of `kinds` are counted, and `ClientDisconnect` is not.
    """
    try:
        yield
    except ClientDisconnect:
        raise
    except kinds as error:
        model_manager.telemetry.count(problems.code_of(error))
        raise


def _method_not_allowed(request: Request, allowed: Iterable[str]) -> Response:
    allow = ", ".join(allowed)
    error = problems.MethodNotAllowed(f"{request.method[:20]} is not for this path; use {allow}")
    response = Response.problem(error, request)
    response.headers.append((b"allow", allow.encode()))
    return response
