"""The tree of exceptions, and the codes and statuses of its classes."""

import serving.errors as errors
from serving.errors import FledgeError


def tree(root: type[FledgeError] = FledgeError, depth: int = 0) -> list[tuple[int, type]]:
    # Other modules have narrower classes, which have the code of the class above.
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    below = [item for child in children for item in tree(child, depth + 1)]
    return [(depth, root), *below]


def test_the_tree_in_the_docstring_equals_the_class_hierarchy() -> None:
    drawn = []
    for line in (errors.__doc__ or "").splitlines():
        stem = line.replace("├── ", "│   ").replace("└── ", "│   ")
        name = stem.replace("│", " ").split()[:1]
        if name and hasattr(errors, name[0]):
            drawn.append((stem.index(name[0]) // 4, name[0]))
    assert drawn == [(depth, kind.__name__) for depth, kind in tree()]


def test_codes_are_unique_and_readable() -> None:
    codes = [kind.code for _, kind in tree()]
    assert len(set(codes)) == len(codes)
    assert all(code == code.lower() and " " not in code and ":" not in code for code in codes)


def test_request_and_image_errors_have_a_4xx_status_and_others_5xx() -> None:
    for _, kind in tree():
        if issubclass(kind, errors.RequestError | errors.ImageError):
            assert 400 <= kind.http_status < 500, kind
        elif kind is not errors.Overloaded:
            assert kind.http_status >= 500, kind


def test_exit_statuses_of_the_command_line() -> None:
    assert {kind: kind.exit_status for _, kind in tree() if kind.exit_status != 1} == {
        errors.RequestError: 2,
        errors.OptionError: 2,
        errors.DataError: 2,
        errors.Unauthorized: 2,
        errors.BundleError: 78,
    }


def test_codes_and_statuses_are_those_that_clients_and_scripts_rely_on() -> None:
    """Code, HTTP status and exit status of every class; docs/http.md has those that HTTP shows."""
    assert {
        kind.__name__: (kind.code, kind.http_status, kind.exit_status) for _, kind in tree()
    } == {
        "FledgeError": ("error", 500, 1),
        "RequestError": ("bad-request", 400, 2),
        "OptionError": ("bad-option", 400, 2),
        "DataError": ("bad-data", 400, 2),
        "Unauthorized": ("unauthorized", 401, 2),
        "ImageError": ("bad-image", 422, 1),
        "EmptyBody": ("no-image", 400, 1),
        "NotAnImage": ("not-an-image", 415, 1),
        "UnsupportedFormat": ("unsupported-format", 415, 1),
        "BrokenImage": ("broken-image", 422, 1),
        "TooLarge": ("too-large", 413, 1),
        "ServiceError": ("unavailable", 503, 1),
        "Overloaded": ("overloaded", 429, 1),
        "NotReady": ("not-ready", 503, 1),
        "DeadlineExceeded": ("deadline-exceeded", 504, 1),
        "BundleError": ("bad-bundle", 503, 78),
        "GateError": ("gate", 500, 1),
        "WorkError": ("failed", 500, 1),
        "Diverged": ("diverged", 500, 1),
    }
