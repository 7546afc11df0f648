"""The demo page at `GET /`: one HTML document with inline style and inline script.

The Content-Security-Policy header allows only this style and this script, by their sha256, and no
other host. A script in a label or in the model's name therefore does not run. This module also has
the policy of BentoML's OpenAPI page at `/docs`.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined

from serving.http.messages import Response


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """Return the Content-Security-Policy source that allows the inline script or style `text`."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_TEMPLATE: Final = Environment(
    autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
).from_string(_read("demo.html"))
_STYLE: Final = _read("demo.css")
_SCRIPT: Final = _read("demo.js")

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_csp_hash(_SCRIPT)}",
        f"style-src {_csp_hash(_STYLE)}",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Content-Security-Policy of the demo page."""


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
"""Content-Security-Policy of BentoML's OpenAPI page. Without the policy, the page would load a
tracker from another host."""


def render(model: str = "") -> Response:
    """Return the response with the demo page.

    Args:
        model: The served model as NAME:VERSION; "" if no model is loaded yet.
    """
    name, _, version = model.rpartition(":")
    text = _TEMPLATE.render(
        title=f"{model} · Fledge" if model else "Fledge",
        name=name or "No model yet",
        version=version,
        style=_STYLE,
        script=_SCRIPT,
    )
    headers = [
        (b"content-security-policy", POLICY.encode()),
        (b"referrer-policy", b"no-referrer"),
    ]
    return Response(200, text.encode(), "text/html; charset=utf-8", headers)
