"""Refusals of requests that never reach the app, and the responses that tell the client."""

from __future__ import annotations

import json
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.errors import problem_document
from serving.server.connection_limits import HEAD_BYTES, HEAD_FIELDS

_CODES = {408: "slow-request", 431: "head-too-large", 429: "overloaded"}


class Refused(Exception):
    """Raised in a callback of the parser, to end the parsing at once.

    Attributes:
        reason: A label of `connection_limits.REASONS`.
        status: HTTP status of the response; 0: the connection is closed after earlier responses.
        detail: What the client is told.
    """

    def __init__(self, reason: str, status: int, detail: str) -> None:
        super().__init__(reason, status, detail)
        self.reason, self.status, self.detail = reason, status, detail

    def response(self) -> bytes:
        """Return the response with a problem document, after which the connection is closed."""
        name = _CODES.get(self.status, "bad-request")
        body = json.dumps(problem_document(name, self.status, self.detail)).encode()
        head = STATUS_LINE[HTTPStatus(self.status)]
        fields = b"content-type: application/problem+json\r\nconnection: close\r\n"
        if self.status == 429:
            fields += b"retry-after: 1\r\n"
        return b"%b%bcontent-length: %d\r\n\r\n%b" % (head, fields, len(body), body)


def invalid(error: Exception) -> Refused:
    """Return the refusal of what the parser can't read.

    Args:
        error: Raised by the parser; by a callback only for a URL.
    """
    is_url = isinstance(error, httptools.HttpParserCallbackError)
    reason = "its URL can't be parsed" if is_url else str(error)
    return Refused("invalid", 400, f"the request is not valid HTTP: {reason}")


def head_too_large() -> Refused:
    """Return the refusal of a head, or of trailers, beyond the limits."""
    detail = f"the head has more than {HEAD_BYTES} bytes or {HEAD_FIELDS} fields; send fewer"
    return Refused("head-size", 431, detail)


def small_chunks() -> Refused:
    """Return the refusal of a body with too many bytes around its chunks."""
    return Refused("body-framing", 400, "the chunks of the body are too small; send larger ones")


def too_many_heads() -> Refused:
    """Return the refusal of a head for which the memory of all heads has no room."""
    return Refused("head-memory", 429, "too many requests arrive; try again later")
