"""All exceptions that Fledge raises, with their HTTP status and exit status.

FledgeError
├── RequestError          the request is wrong; the same request would fail again
│   ├── OptionError       an option, setting or recipe line is wrong
│   ├── DataError         a data folder, split file, list or weights file can't be used
│   └── Unauthorized      the API key is missing or wrong
├── ImageError            one image can't be used; other images of the request are not affected
│   ├── EmptyBody         no bytes
│   ├── NotAnImage        not an image that Pillow knows
│   ├── UnsupportedFormat an image of a format that is not served
│   ├── BrokenImage       truncated or corrupt
│   └── TooLarge          more bytes or pixels than allowed
├── ServiceError          the service can't answer now
│   ├── Overloaded        the queue is full
│   ├── NotReady          no verified bundle is loaded
│   └── DeadlineExceeded  the answer came too late
├── BundleError           the bundle is missing or can't be used
├── GateError             a result is below a required value
└── WorkError             the work failed
    └── Diverged          the loss is NaN or infinite; a resumed run would diverge again

The class attribute `code` is a stable string that appears in HTTP responses and score tables;
`exit_status` is the exit status of the command line. A message is one line: what is wrong, where,
and what to do. If a file has several errors, the message has one line for each error. Names in a
message may come from others; line breaks and control characters in them are escaped.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar

from serving.terminal import escape


def problem_document(code: str, status: int, detail: str) -> dict[str, Any]:
    """Return the problem document (RFC 9457) of an error: type, title, status, detail and code."""
    return {
        "type": f"urn:fledge:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }


class FledgeError(Exception):
    """Base class of all errors that Fledge raises deliberately.

    Attributes:
        details: Text after the message that callers of the HTTP service must not see, such as the
            text of a library's exception; "" if there is none.
    """

    def __init__(self, *lines: object, details: str = "") -> None:
        """Store the lines of the message, which is usually one."""
        super().__init__(*lines)
        self.details = details

    @property
    def public(self) -> str:
        """The message without `details`."""
        return "\n  ".join(escape(line) for line in self.args)

    def __str__(self) -> str:
        return f"{self.public}: {escape(self.details)}" if self.details else self.public

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1


class RequestError(FledgeError):
    """The request is wrong."""

    code = "bad-request"
    http_status = 400
    exit_status = 2


class OptionError(RequestError):
    """An option, setting or recipe line has a value that can't be used."""

    code = "bad-option"


class DataError(RequestError):
    """A data folder, split file, list or weights file can't be used."""

    code = "bad-data"


class Unauthorized(RequestError):
    """The request has no API key, or a key that is not in the key file."""

    code = "unauthorized"
    http_status = 401


class ImageError(FledgeError):
    """One image can't be used."""

    code = "bad-image"
    http_status = 422


class EmptyBody(ImageError):
    """The file is empty, or the request has no image."""

    code = "no-image"
    http_status = 400


class NotAnImage(ImageError):
    """The bytes are not an image."""

    code = "not-an-image"
    http_status = 415


class UnsupportedFormat(ImageError):
    """The image has a known format that Fledge does not decode."""

    code = "unsupported-format"
    http_status = 415


class BrokenImage(ImageError):
    """The image is truncated or corrupt."""

    code = "broken-image"


class TooLarge(ImageError):
    """The image has more bytes or more pixels than allowed."""

    code = "too-large"
    http_status = 413


class ServiceError(FledgeError):
    """The service can't answer now."""

    code = "unavailable"
    http_status = 503


class Overloaded(ServiceError):
    """The queue is full; the client may retry after `Retry-After` seconds."""

    code = "overloaded"
    http_status = 429


class NotReady(ServiceError):
    """No verified bundle is loaded."""

    code = "not-ready"


class DeadlineExceeded(ServiceError):
    """The answer would come after the request's deadline."""

    code = "deadline-exceeded"
    http_status = 504


class BundleError(FledgeError):
    """The bundle is missing, damaged, or must not be served."""

    code = "bad-bundle"
    http_status = 503
    exit_status = 78


class GateError(FledgeError):
    """A result, such as the accuracy, is below the value that an option or the export requires."""

    code = "gate"


class WorkError(FledgeError):
    """The work failed, for example on a NaN loss, a full disk or a failed export."""

    code = "failed"


class Diverged(WorkError):
    """The loss is NaN or infinite; a resumed run would diverge again."""

    code = "diverged"
