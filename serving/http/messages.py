"""Classes of HTTP requests and responses, implemented on top of ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from serving.errors import RequestError, TooLarge, Unauthorized
from serving.http import problems
from serving.http.body_budget import SLOW_SECONDS, BodyBudget, Upload

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Message, Receive, Send], Awaitable[None]]

_UNREAD: Final = (
    TooLarge,
    Unauthorized,
    problems.SlowRequest,
    problems.BadHost,
    problems.CrossSite,
    problems.RateLimited,
    problems.UnsupportedCoding,
)
"""Errors before the body is read; the connection is closed if the body has not arrived yet."""
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
BATCH_PATH: Final = "/predict/batch"
_SAFE_QUERY: Final = re.compile(r"[A-Za-z0-9_=&.-]{1,100}")
_MAX_DIGITS: Final = 20  # of 2**64
_MAX_DROP_SECONDS: Final = 2.0
_MAX_DROP_BYTES: Final = 64 * 2**20
"""Limits, in seconds and bytes, on reading and discarding the rest of a refused request body."""


class ClientDisconnect(Exception):
    """The client closed the connection before it had sent the whole body."""


@dataclass
class Request:
    """Method, path and headers of an HTTP request; the method `body` reads the body.

    Attributes:
        method: HTTP method, in upper case.
        path: Decoded path, without the query string.
        query: Query string, not decoded.
        headers: Header values by lower-case name; if a header is repeated, its last value.
        receive: ASGI callable that receives the body.
        client: Address of the caller, "" if it is not known. A proxy on this machine states it in
            X-Forwarded-For.
        scope: The ASGI scope.
        id: The client's X-Request-ID if it is valid, else a random id.
        body_complete: Whether the whole body has been read.
        upload: What the body has taken from the `BodyBudget`; None before it is read.
        started: `time.perf_counter()` when the headers arrived.
    """

    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    receive: Receive
    id: str
    client: str = ""
    scope: Message = field(default_factory=dict, repr=False)
    body_complete: bool = False
    upload: Upload | None = None
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, scope: Message, receive: Receive) -> Request:
        """Create the request from an ASGI scope of type "http"."""
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        id_ = sent_id.decode() if _REQUEST_ID.fullmatch(sent_id) else os.urandom(8).hex()
        query = scope["query_string"]
        client = scope.get("client")
        address = client[0] if client else ""
        path, method = scope["path"], scope["method"]
        return cls(method, path, query, headers, receive, id_, address, scope)

    @property
    def content_type(self) -> bytes:
        """The Content-Type header, or b"" if there is none."""
        return self.headers.get(b"content-type", b"")

    def curl(self, *, keys: bool = False, path: str | None = None) -> str:
        """Return the curl command that sends an image file to the address of this request.

        Args:
            keys: Whether the service needs a key; KEY stands for it.
            path: Path for the command; None: that of this request.
        """
        path = path or self.path
        query = self.query.decode("latin-1")
        url = self._origin + path
        if _SAFE_QUERY.fullmatch(query) and path == self.path:
            url += f"?{query}"
        key = "-H 'Authorization: Bearer KEY' " if keys else ""
        files = "--data-binary @photo.jpg"
        if path == BATCH_PATH:
            files = "-F image=@a.jpg -F image=@b.jpg"
        return f"curl {key}{files} {shlex.quote(url)}"

    @property
    def _origin(self) -> str:
        """Scheme, host and port by which the client has reached the service."""
        host = self.headers.get(b"host", b"").decode("latin-1")
        if not host:  # HTTP/1.0
            name, port = self.scope.get("server") or ("localhost", None)
            host = f"[{name}]" if ":" in name else name
            host += f":{port}" if port else ""
        return f"{self.scope.get('scheme', 'http')}://{host}"

    @property
    def seconds(self) -> float:
        """Seconds since the headers of the request arrived."""
        return time.perf_counter() - self.started

    async def body(self, limit: int, budget: BodyBudget, seconds: float) -> bytes:
        """Read the whole body.

        Args:
            limit: Largest accepted length, in bytes.
            budget: Budget from which the body takes its bytes; `upload` counts them.
            seconds: Time that the client may take.

        Raises:
            SlowRequest: The body took longer, or the budget had no room for a slow body.
            Overloaded: The budget has no room for the body. The rest of the body is not read.
            TooLarge: The body is longer than `limit`. The rest of the body is not read.
            ClientDisconnect: The client closed the connection before the end of the body.
        """
        message = f"more than the {limit} bytes allowed (FLEDGE_MAX_BYTES)"
        now = asyncio.get_running_loop().time()
        stated = self.headers.get(b"content-length", b"0")
        if stated.isdigit():
            if len(stated) > _MAX_DIGITS:  # zeros, else the parser would have refused it
                raise RequestError(f"Content-Length has more than {_MAX_DIGITS} digits")
            if int(stated) > limit:
                raise TooLarge(f"a body of {stated.decode():.20} bytes, {message}")
            budget.check(int(stated), now)
        chunks: list[bytes] = []
        size = 0
        timeout = asyncio.timeout_at(now + seconds)
        upload = self.upload = Upload(timeout, now)
        try:
            async with timeout:
                while True:
                    event = await self.receive()
                    if event["type"] == "http.disconnect":
                        raise ClientDisconnect
                    if upload.ended:
                        raise TimeoutError
                    chunk = event.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise TooLarge(message)
                    complete = not event.get("more_body", False)
                    budget.take(upload, len(chunk), complete=complete)
                    chunks.append(chunk)
                    if complete:
                        self.body_complete = True
                        return b"".join(chunks)
        except TimeoutError as error:
            if upload.ended:
                detail = f"{SLOW_SECONDS:g} s, and others need the memory; send it faster"
            else:
                detail = f"{seconds:g} s"
            raise problems.SlowRequest(f"the body took more than {detail}") from error

    async def drop_rest(self) -> None:
        """Read and discard the rest of the body, up to a limit in seconds and in bytes.

        Closing a connection that has unread bytes resets the connection. Many clients send the
        whole body before they read the response. After a reset, the response can't be read.
        """
        if b"expect" in self.headers:
            return  # the client sends no body before it gets a response
        left = _MAX_DROP_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MAX_DROP_SECONDS):
                while not self.body_complete and left > 0:
                    event = await self.receive()
                    left -= len(event.get("body", b""))
                    self.body_complete = not event.get("more_body", False)


@dataclass
class Response:
    """An HTTP response.

    Attributes:
        status: HTTP status.
        body: Content of the body.
        media_type: Value of the Content-Type header.
        headers: Headers of this response only; `send` adds the headers that all responses have.
        code: "ok" or the code of the error, for the access log.
    """

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    code: str = "ok"

    @classmethod
    def of(cls, value: Any) -> Response:
        """Return a response with status 200 and `value` as JSON."""
        return cls(200, _json(value))

    @classmethod
    def problem(cls, error: Exception, request: Request) -> Response:
        """Return the response for an error: `application/problem+json` and matching headers.

        For example, status 429 gets the header `Retry-After`.
        """
        body = problems.problem(error, request.id)
        headers = []
        seconds = problems.retry_after(error)
        if seconds is not None:
            headers.append((b"retry-after", str(seconds).encode()))
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, problems.UnsupportedCoding):
            headers.append((b"accept-encoding", b"identity"))
        refused = isinstance(error, _UNREAD)
        if refused and not request.body_complete:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        return cls(body["status"], _json(body), problems.MEDIA_TYPE, headers, body["code"])

    def _entity_headers(self) -> list[tuple[bytes, bytes]]:
        if self.status == 204:
            return []
        length = str(len(self.body)).encode()
        return [(b"content-type", self.media_type.encode()), (b"content-length", length)]

    async def send(self, request: Request, send: Send) -> None:
        """Send the response through the ASGI callable `send`.

        Adds headers such as Content-Length and X-Request-ID. For the method HEAD, the body is left
        out.
        """
        headers = [
            *self._entity_headers(),
            (b"x-request-id", request.id.encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
            *self.headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        body = b"" if request.method == "HEAD" else self.body
        if (b"connection", b"close") in self.headers:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await request.drop_rest()
            body = b""
        await send({"type": "http.response.body", "body": body})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
