"""The demo page of `GET /`: one answer, with its style and its script inside.

Both are named in the policy by their sha256, so nothing else runs, whatever a label may say; and
the page talks to nobody but this service. BentoML's page at `/docs` is held to the same.
"""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path
from string import Template
from typing import Final

from serving.http.messages import Message, Response, Send


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _named(text: str) -> str:
    """How a policy names a script or a style that stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_PAGE: Final = Template(_source("demo.html"))
_STYLE: Final = _source("demo.css")
_SCRIPT: Final = _source("demo.js")

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_named(_SCRIPT)}",
        f"style-src {_named(_STYLE)}",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""What the page may do; the browser holds it to that."""


DOCS_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
"""For BentoML's OpenAPI page: it would load a tracker from elsewhere, and nothing here shall."""


def guarded(send: Send, policy: str) -> Send:
    """`send` with a Content-Security-Policy in the answer's head."""

    async def guard(message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (b"content-security-policy", policy.encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return guard


def page(model: str = "") -> Response:
    """The page for `model`, as NAME:VERSION; without one it says so, and waits for one."""
    name, _, version = model.rpartition(":")
    filled = _PAGE.substitute(
        title=html.escape(f"{model} · Fledge" if model else "Fledge"),
        name=html.escape(name or "No model yet"),
        version=html.escape(version),
        style=_STYLE,
        script=_SCRIPT,
    )
    headers = [
        (b"content-security-policy", POLICY.encode()),
        (b"referrer-policy", b"no-referrer"),
    ]
    return Response(200, filled.encode(), "text/html; charset=utf-8", headers)
