"""One HTTP exchange over ASGI: what came in, what goes out, and the body between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from serving.errors import Overloaded, TooLarge, Unauthorized
from serving.http import problems

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Message, Receive, Send], Awaitable[None]]

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


_LINGER: Final = 2.0
_LINGER_BYTES: Final = 64 * 2**20
"""Seconds and bytes for which the rest of a refused body is still read, and dropped."""


class ClientDisconnect(Exception):
    """The caller hung up before the body was whole; there is nobody to answer."""


@dataclass
class Request:
    """A request's head, and the way to its body.

    headers: names in lower case; id: the caller's X-Request-ID, or made.
    whole: nothing of the body is left to read.
    """

    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    receive: Receive
    id: str
    whole: bool = False
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, scope: Message, receive: Receive) -> Request:
        """From an ASGI scope."""
        headers = dict(scope["headers"])
        stated = headers.get(b"x-request-id", b"")
        kept = stated.decode() if _REQUEST_ID.fullmatch(stated) else os.urandom(8).hex()
        query = scope["query_string"]
        return cls(scope["method"], scope["path"], query, headers, receive, kept)

    @property
    def content_type(self) -> bytes:
        """As the caller states it; nothing is decided by it but form or no form."""
        return self.headers.get(b"content-type", b"")

    @property
    def seconds(self) -> float:
        """Since the head came in."""
        return time.perf_counter() - self.started

    async def body(self, limit: int) -> bytes:
        """The whole body, refused as soon as it is known to be longer than `limit` bytes.

        Raises:
            TooLarge: It is longer; the rest is not read.
            Gone: The caller hung up.
        """
        message = f"more than the {limit} bytes allowed"
        stated = self.headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limit:
            raise TooLarge(message)
        chunks: list[bytes] = []
        size = 0
        while True:
            event = await self.receive()
            if event["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = event.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise TooLarge(message)
            chunks.append(chunk)
            if not event.get("more_body", False):
                self.whole = True
                return b"".join(chunks)

    async def drop_rest(self) -> None:
        """Read what is left of the body and forget it, within limits.

        A connection that is closed while bytes lie unread is reset, and a caller who sends before
        he reads would never see his answer.
        """
        if b"expect" in self.headers:
            return  # he waits to be asked for the body
        left = _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while not self.whole and left > 0:
                    event = await self.receive()
                    left -= len(event.get("body", b""))
                    self.whole = not event.get("more_body", False)


@dataclass
class Response:
    """An answer. code: "ok" or an error's, for the log."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    code: str = "ok"

    @classmethod
    def of(cls, value: Any) -> Response:
        """200 with `value` as JSON."""
        return cls(200, _json(value))

    @classmethod
    def problem(cls, error: Exception, request: Request) -> Response:
        """`error` as `application/problem+json`, with the headers that belong to its status."""
        body = problems.problem(error, request.id)
        headers = []
        if isinstance(error, Overloaded):
            headers.append((b"retry-after", b"1"))
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        refused = isinstance(error, (TooLarge, Unauthorized, problems.SlowRequest))
        if refused and not request.whole:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        return cls(body["status"], _json(body), problems.MEDIA_TYPE, headers, body["code"])

    async def send(self, request: Request, send: Send) -> None:
        """Send it, with the headers that every answer of ours has."""
        headers = [
            (b"content-type", self.media_type.encode()),
            (b"content-length", str(len(self.body)).encode()),
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
