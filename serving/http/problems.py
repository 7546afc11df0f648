"""Errors that occur only over HTTP, and problem documents (RFC 9457) for all errors."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from serving.errors import FledgeError, Overloaded, problem_document

MEDIA_TYPE: Final = "application/problem+json"


class HttpError(Exception):
    """Base class of the errors that occur only over HTTP.

    Errors that can also occur without HTTP, such as a broken image, are subclasses of
    `FledgeError`.

    Attributes:
        code: Stable error code of the problem document.
        http_status: HTTP status of the response.
    """

    code: ClassVar[str]
    http_status: ClassVar[int]


class NotFound(HttpError):
    """The path does not exist."""

    code = "not-found"
    http_status = 404


class MethodNotAllowed(HttpError):
    """The path exists, but does not support the method of the request."""

    code = "method-not-allowed"
    http_status = 405


class BadHost(HttpError):
    """The header Host is missing, doubled, or names a host that is not served."""

    code = "bad-request"
    http_status = 400


class CrossSite(HttpError):
    """A web page of another site sent the request, and CORS does not allow that site."""

    code = "cross-site"
    http_status = 403


class HeadTooLarge(HttpError):
    """The head has too many bytes or fields. `LimitedHttpProtocol` sends it, not `App`."""

    code = "head-too-large"
    http_status = 431


class UnsupportedCoding(HttpError):
    """The body has a Content-Encoding, such as gzip. The response lists those that are accepted."""

    code = "unsupported-coding"
    http_status = 415


class SlowRequest(HttpError):
    """The client took too long to send the body."""

    code = "slow-request"
    http_status = 408


class RateLimited(HttpError):
    """A key has sent too many images, or an address too many wrong keys.

    Attributes:
        retry_after: Seconds after which the request may be sent again.
    """

    code = "rate-limited"
    http_status = 429

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(f"{message}; try again in {retry_after} s")
        self.retry_after = retry_after


OVERLOADED_SECONDS: Final = 1
"""Seconds after which a request that the queue had no room for may be sent again."""


def retry_after(error: Exception) -> int | None:
    """Return the seconds after which to send a request again, None if that would not help."""
    if isinstance(error, RateLimited):
        return error.retry_after
    return OVERLOADED_SECONDS if isinstance(error, Overloaded) else None


def is_fault(error: Exception) -> bool:
    """Return whether an error is a fault of the service, not of the request.

    The log gets the traceback of a fault, and the client gets no details.
    """
    return not isinstance(error, (FledgeError, HttpError)) or error.http_status == 500


def code_of(error: Exception) -> str:
    """Return the stable code of an error; "internal" for an unexpected exception."""
    return error.code if isinstance(error, (FledgeError, HttpError)) else "internal"


def problem(error: Exception, request_id: str) -> dict[str, Any]:
    """Return the problem document of an error: type, title, status, detail and code.

    For a fault of the service, `detail` contains only the id of the request. The exception's text
    could contain paths or class names.
    """
    status = error.http_status if isinstance(error, (FledgeError, HttpError)) else 500
    detail = str(error)
    if is_fault(error):
        detail = f"the service failed on this request (request {request_id}); its log says why"
    return problem_document(code_of(error), status, detail)
