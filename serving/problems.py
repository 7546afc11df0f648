"""Errors as HTTP tells them: `application/problem+json` bodies (RFC 9457) with a stable code."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from serving.errors import FledgeError, RequestError

MEDIA_TYPE: Final = "application/problem+json"


class NotFound(RequestError):
    """No such path. Only HTTP knows this one."""

    code = "not-found"
    http_status = 404


class MethodNotAllowed(RequestError):
    """The path is right and the method is not. Only HTTP knows this one."""

    code = "method-not-allowed"
    http_status = 405


class SlowRequest(RequestError):
    """The body took too long to come. Only HTTP knows this one."""

    code = "slow-request"
    http_status = 408


def problem(error: BaseException, request_id: str | None = None) -> dict[str, Any]:
    """The body for `error`: type, title, status, detail, code.

    What went wrong inside the service (status 500) is for its log; the caller gets an id to ask
    about, and nothing of paths, classes or tracebacks.
    """
    known = isinstance(error, FledgeError)
    status = error.http_status if isinstance(error, FledgeError) else 500
    code = error.code if isinstance(error, FledgeError) else "internal"
    detail = str(error)
    if not known or status == 500:
        about = f" (request {request_id})" if request_id else ""
        detail = f"the service failed on this request{about}; its log says why"
    return {
        "type": f"urn:fledge:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
