"""Errors as HTTP tells them: `application/problem+json` bodies (RFC 9457) with a stable code."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar, Final

from serving.errors import FledgeError

MEDIA_TYPE: Final = "application/problem+json"


class HttpError(Exception):
    """What only HTTP knows, and neither the scorer nor the command line: so not a FledgeError."""

    code: ClassVar[str]
    http_status: ClassVar[int]


class NotFound(HttpError):
    """No such path."""

    code = "not-found"
    http_status = 404


class MethodNotAllowed(HttpError):
    """The path is right and the method is not."""

    code = "method-not-allowed"
    http_status = 405


class SlowRequest(HttpError):
    """The body took too long to come."""

    code = "slow-request"
    http_status = 408


def is_fault(error: Exception) -> bool:
    """Whether the service is to blame: then the log gets the traceback and the caller no detail."""
    return not isinstance(error, (FledgeError, HttpError)) or error.http_status == 500


def code_of(error: Exception) -> str:
    """The stable code; `internal` for what nobody raised on purpose."""
    return error.code if isinstance(error, (FledgeError, HttpError)) else "internal"


def problem(error: Exception, request_id: str) -> dict[str, Any]:
    """The body for `error`: type, title, status, detail, code.

    Of a fault of ours the caller gets an id to ask about, and nothing of paths or classes.
    """
    status = error.http_status if isinstance(error, (FledgeError, HttpError)) else 500
    detail = str(error)
    if is_fault(error):
        detail = f"the service failed on this request (request {request_id}); its log says why"
    return {
        "type": f"urn:fledge:problem:{code_of(error)}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code_of(error),
    }
