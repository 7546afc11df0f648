"""The tree of exceptions, and the codes and statuses of its classes."""

import serving.errors as errors
from serving.errors import FledgeError


def tree(root: type[FledgeError] = FledgeError, depth: int = 0) -> list[tuple[int, type]]:
    below = [item for child in root.__subclasses__() for item in tree(child, depth + 1)]
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
