"""Every error that Fledge raises on purpose, in one small tree.

FledgeError
├── RequestError          the request was wrong; asking again the same way won't help
│   ├── OptionError       an option, setting or recipe line
│   ├── DataError         a folder, split, list or weights file
│   └── Unauthorized      no key, or a wrong one
├── ImageError            one image is at fault, its neighbours are not
│   ├── EmptyBody         no bytes at all
│   ├── NotAnImage        the bytes are no image that Pillow knows
│   ├── UnsupportedFormat an image, but of a format that is not served
│   ├── BrokenImage       truncated or corrupt
│   └── TooLarge          more bytes or pixels than allowed
├── ServiceError          the service can't answer now
│   ├── Overloaded        the queue is full
│   ├── NotReady          no verified bundle is loaded
│   └── DeadlineExceeded  the answer came too late
├── BundleError           no usable bundle
├── GateError             the work was done and fell short of a gate
└── WorkError             the work failed
    └── Diverged          a loss is no number; going on would find it again

Each class carries the stable `code` that HTTP answers and score tables show, the HTTP status, and
the exit status of the command line. A message is one line: what is wrong, where, what to do.
Several mistakes of one file are a line each.
"""

from __future__ import annotations

from typing import ClassVar


class FledgeError(Exception):
    """The root: catch this to catch everything that Fledge raises on purpose."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1


class RequestError(FledgeError):
    """The request was wrong."""

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
    """No API key, or one that is not on the list."""

    code = "unauthorized"
    http_status = 401


class ImageError(FledgeError):
    """One image is at fault."""

    code = "bad-image"
    http_status = 422


class EmptyBody(ImageError):
    """There are no bytes: an empty file, or a request without an image."""

    code = "no-image"
    http_status = 400


class NotAnImage(ImageError):
    """The bytes are no image."""

    code = "not-an-image"
    http_status = 415


class UnsupportedFormat(ImageError):
    """An image of a format that is not served."""

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
    """The queue is full; ask again after `Retry-After` seconds."""

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
    """There is no bundle here, or one that must not be served."""

    code = "bad-bundle"
    http_status = 503
    exit_status = 78


class GateError(FledgeError):
    """The work was done, and fell short of a gate."""

    code = "gate"


class WorkError(FledgeError):
    """The work failed: a NaN loss, a full disk, an operator that can't be exported."""

    code = "failed"


class Diverged(WorkError):
    """A loss is no number any more; a run that is resumed would find it again."""

    code = "diverged"
