"""Errors that occur only over HTTP, and problem documents (RFC 9457) for all errors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Final

from serving.errors import (
    BrokenImage,
    EmptyBody,
    FledgeError,
    NotAnImage,
    Overloaded,
    RequestError,
    problem_document,
)
from serving.imaging.not_images import describe

if TYPE_CHECKING:
    from serving.http.messages import Request

MEDIA_TYPE: Final = "application/problem+json"
_WEB_FORM: Final = b"application/x-www-form-urlencoded"
_STRIPPED: Final = re.compile(rb"[\0\r\n]")  # what curl removes from the file of `-d @FILE`
_LEAST_STRIPPED: Final = 1024  # bytes; a file of this length has one of these three bytes


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


def explain(
    error: FledgeError, data: bytes, request: Request, *, keys: bool = False
) -> FledgeError:
    """Return the error with what came and with the command that works; others as they are.

    Args:
        error: A new error replaces it, of the same class.
        data: The body, or one image of it.
        request: The request.
        keys: Whether the service needs a key.
    """
    text = str(error)
    if "curl " in text:
        return error
    if type(error) in (NotAnImage, BrokenImage) and _is_stripped(data, request.content_type):
        text = "the file lost its zeros and line breaks: `curl -d @FILE` removes them"
    elif type(error) is NotAnImage:
        what = describe(data)
        text = f"{text}: this is {what}" if what else text
    elif type(error) not in (EmptyBody, RequestError):
        return error
    return type(error)(f"{text}; send the file itself: {request.curl(keys=keys)}")


def _is_stripped(data: bytes, content_type: bytes) -> bool:
    """Return whether `curl -d @FILE` has sent an image file."""
    return (
        content_type[: len(_WEB_FORM)].lower() == _WEB_FORM
        and len(data) >= _LEAST_STRIPPED
        and data[:1] in (b"\xff", b"\x89", b"R", b"G", b"B", b"I", b"M")
        and not describe(data)
        and not _STRIPPED.search(data)
    )
