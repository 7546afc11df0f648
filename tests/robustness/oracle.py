"""Checks of the service's answers that hold for any request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from serving.errors import FledgeError
from serving.imaging.decode import decode
from tests.robustness.requests import Case

CODES = {
    **{"no-image": 400, "bad-option": 400, "bad-request": 400, "unauthorized": 401},
    **{"not-found": 404, "method-not-allowed": 405, "slow-request": 408, "too-large": 413},
    **{"cross-site": 403, "head-too-large": 431},
    **{"not-an-image": 415, "unsupported-format": 415, "broken-image": 422, "overloaded": 429},
    **{"not-ready": 503, "deadline-exceeded": 504},
}
"""Documented error codes and their status, without `failed` and `internal`, which are bugs."""

_PROBLEM = {"type", "title", "status", "detail", "code"}
_ANSWER = {"predictions", "model", "precision", "views", "confident", "applied"}


@dataclass(frozen=True)
class Answer:
    status: int
    media_type: str
    body: bytes


def check(
    case: Case, answer: Answer | None, good: tuple[Any, ...], max_pixels: int
) -> tuple[str | None, list[str]]:
    """The fault of an answer (None: no fault), and the outcome of each picture or of the request.

    good: The answers of the valid photos in a batch, when each is sent as a single request.
    """
    try:
        return None, _outcomes(case, answer, good, max_pixels)
    except AssertionError as error:
        return str(error), ["fault"]


def _outcomes(
    case: Case, answer: Answer | None, good: tuple[Any, ...], max_pixels: int
) -> list[str]:
    if answer is None:
        assert case.kind == "head", "no answer"
        return ["no answer"]
    assert answer.status < 500 or answer.status in (503, 504), f"status {answer.status}"
    if case.kind == "head" and not answer.media_type.startswith("application/"):
        # Errors of the HTTP server itself, pages, and answers without a body.
        known = (200, 400) if answer.media_type.startswith("text/") else (400, 404, 413)
        assert answer.status in known or case.method == "HEAD", f"status {answer.status}"
        return [f"plain {answer.status}"]
    if case.kind == "head" and not answer.body:
        assert case.method == "HEAD", "an empty answer"
        return [f"head {answer.status}"]
    value = json.loads(answer.body)
    if answer.status != 200:
        assert answer.media_type == "application/problem+json", answer.media_type
        code = _check_problem(value, answer.status)
        assert case.kind != "images" or code == "not-ready", f"the whole batch failed with {code}"
        if case.kind == "single":
            return [_check_picture(case.pictures[0], {"error": value}, max_pixels)]
        return [code]
    assert answer.media_type == "application/json", answer.media_type
    if case.kind == "images":
        return _check_batch(case, value, good, max_pixels)
    if case.kind == "single":
        return [_check_picture(case.pictures[0], value, max_pixels)]
    for item in value if isinstance(value, list) else [value]:
        if "error" in item:
            _check_problem(item["error"], None)
        elif "predictions" in item:
            _check_answer(item)
    return ["ok"]


def _check_batch(case: Case, value: Any, good: tuple[Any, ...], max_pixels: int) -> list[str]:
    assert isinstance(value, list), "the answer of a batch is not a list"
    assert len(value) == len(case.pictures), f"{len(value)} of {len(case.pictures)} answers"
    for number, item in enumerate(value[::2]):
        assert item == good[number % len(good)], f"a valid photo got the answer {item}"
    return [
        _check_picture(picture, item, max_pixels)
        for picture, item in zip(case.pictures[1::2], value[1::2], strict=True)
    ]


def _check_picture(picture: bytes, item: Any, max_pixels: int) -> str:
    """The outcome of a picture, which must be the same as the library's."""
    if "error" in item:
        outcome = _check_problem(item["error"], None)
    else:
        _check_answer(item)
        outcome = "ok"
    try:
        expected_applied = list(decode(picture, max_pixels=max_pixels).applied)
        expected = "ok"
    except FledgeError as error:
        expected = error.code
    except Exception as error:
        raise AssertionError(f"the library raises {error!r}") from error
    if outcome not in ("deadline-exceeded", "overloaded"):
        assert outcome == expected, f"{outcome} by the service, {expected} by the library"
        assert outcome != "ok" or item["applied"] == expected_applied, f"applied {item['applied']}"
    return outcome


def _check_problem(value: Any, status: int | None) -> str:
    assert isinstance(value, dict), f"the problem is {value!r}"
    assert value.keys() == _PROBLEM, f"the problem has the fields {list(value)}"
    code = str(value["code"])
    assert CODES.get(code) == value["status"], f"code {code} with status {value['status']}"
    assert status in (None, value["status"]), f"status {status} with {value['status']} in the body"
    assert value["type"] == f"urn:fledge:problem:{code}", value["type"]
    assert "Traceback" not in value["detail"], value["detail"]
    assert "\n" not in value["detail"], value["detail"]
    return code


def _check_answer(item: Any) -> None:
    assert item.keys() >= _ANSWER, f"the answer has the fields {list(item)}"
    values = [prediction["probability"] for prediction in item["predictions"]]
    assert values == sorted(values, reverse=True), f"probabilities {values}"
    assert 0 < sum(values) <= 1 + 1e-9, f"probabilities {values}"
