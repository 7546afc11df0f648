"""BentoML's routes, answered without BentoML's work for each request.

Its API documents and the files of its page are always the same, so each is asked for once and kept.
Its metrics are rendered once for all callers that wait, and rendering takes at most a tenth of the
time. BentoML needs 2 to 6 ms for each of these, on the threads and the event loop that answer
predictions, and it answers them before any key is asked for.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, NamedTuple

from serving.http.demo_page import DOCS_POLICY
from serving.http.messages import ASGIApp, Message, Send
from serving.server import bentoml_compat

PAGE: Final = "/docs"
"""Path of BentoML's OpenAPI page."""

_METRICS: Final = "/metrics"
_SHARE: Final = 10
_PIECE: Final = 65_536
# Of the response to the first caller, not to others; `server` is uvicorn's.
_LEFT_OUT: Final = (b"date", b"server", b"accept-ranges")


class _Captured(NamedTuple):
    """A response of BentoML's app."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class BentomlRoutes:
    """Answers requests for BentoML's routes."""

    def __init__(self, inner: ASGIApp) -> None:
        """Remember BentoML's ASGI app."""
        self._inner = inner
        self._kept: dict[str, _Captured] = {}
        self._asked: dict[str, asyncio.Task[_Captured]] = {}
        self._render_at = 0.0

    @staticmethod
    def has(path: str) -> bool:
        """Return whether a path is one of BentoML's."""
        return path == PAGE or path in bentoml_compat.ROUTES or path in bentoml_compat.STATIC_FILES

    async def answer(self, scope: Message, send: Send) -> None:
        """Answer a request with the method GET or HEAD for a path of BentoML's.

        Args:
            scope: The ASGI scope of the request; its body is not read.
            send: ASGI callable that sends the response.
        """
        path = scope["path"]
        captured = self._kept.get(path)
        if captured is None:
            if path not in self._asked:
                self._asked[path] = asyncio.create_task(self._ask(scope, path))
            captured = await asyncio.shield(self._asked[path])
        status, headers, body = captured
        if status == 200 and _is_same(scope, headers):
            status, body = 304, b""
            headers = [one for one in headers if one[0] not in (b"content-length", b"content-type")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if scope["method"] == "HEAD":
            body = b""
        # In pieces, so that no more waits for a client that does not read.
        for start in range(0, len(body) - _PIECE, _PIECE):
            piece = body[start : start + _PIECE]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        rest = max(0, len(body) - 1) // _PIECE * _PIECE
        await send({"type": "http.response.body", "body": body[rest:]})

    async def _ask(self, scope: Message, path: str) -> _Captured:
        loop = asyncio.get_running_loop()
        try:
            if path == _METRICS:
                await asyncio.sleep(self._render_at - loop.time())
            started = loop.time()
            captured = await self._capture(scope, path)
            if path == _METRICS:
                ended = loop.time()
                self._render_at = ended + min(1.0, (_SHARE - 1) * (ended - started))
            elif captured.status == 200:
                self._kept[path] = captured
            return captured
        finally:
            del self._asked[path]

    async def _capture(self, scope: Message, path: str) -> _Captured:
        inner = bentoml_compat.OPENAPI_PAGE if path == PAGE else path
        request = {  # with nothing of this caller's: others get the response too
            **{"method": "GET", "path": inner, "raw_path": inner.encode()},
            **{"query_string": b"", "headers": [(b"host", b"localhost")]},
        }
        status, headers, pieces = 500, list[tuple[bytes, bytes]](), list[bytes]()

        received = False

        async def receive() -> Message:
            nonlocal received
            if received:  # nobody disconnects
                await asyncio.get_running_loop().create_future()
            received = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def collect(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message.get("headers", ()))
            else:
                pieces.append(message.get("body", b""))

        await self._inner({**scope, **request}, receive, collect)
        body = b"".join(pieces)
        headers = [one for one in headers if one[0].lower() not in (*_LEFT_OUT, b"content-length")]
        headers.append((b"content-length", b"%d" % len(body)))
        if path == PAGE:
            headers.append((b"content-security-policy", DOCS_POLICY.encode()))
        return _Captured(status, headers, body)


def _is_same(scope: Message, headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether the caller has the response already, by its ETag."""
    stated: dict[bytes, Any] = dict(scope["headers"])
    tags = [value for name, value in headers if name == b"etag"]
    wanted = stated.get(b"if-none-match")
    return wanted is not None and wanted in tags
