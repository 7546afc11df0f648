"""What an answer of the service must look like, whatever was asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from serving.errors import FledgeError
from serving.imaging import decode as images
from tests.robustness.requests import Case

CODES = {
    **{"no-image": 400, "bad-option": 400, "bad-request": 400, "unauthorized": 401},
    **{"not-found": 404, "method-not-allowed": 405, "slow-request": 408, "too-large": 413},
    **{"not-an-image": 415, "unsupported-format": 415, "broken-image": 422, "overloaded": 429},
    **{"not-ready": 503, "deadline-exceeded": 504},
}
"""Those of README's table that may be; `failed` and `internal` are faults of ours."""

_PROBLEM = {"type", "title", "status", "detail", "code"}
_ANSWER = {"predictions", "model", "precision", "views", "confident", "applied"}


@dataclass(frozen=True)
class Answer:
    status: int
    media_type: str
    body: bytes


def complaint(
    case: Case, answer: Answer | None, good: tuple[Any, ...], max_pixels: int
) -> tuple[str | None, list[str]]:
    """What is wrong, or None, and the outcome of each picture or of the request.

    good: of each good photo beside the pictures, the answer that it has alone.
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
        # What the HTTP server says itself, a page, and what has no body.
        known = (200, 400) if answer.media_type.startswith("text/") else (400, 404, 413)
        assert answer.status in known or case.method == "HEAD", f"status {answer.status}"
        return [f"plain {answer.status}"]
    if case.kind == "head" and not answer.body:
        assert case.method == "HEAD", "an answer of nothing"
        return [f"head {answer.status}"]
    value = json.loads(answer.body)
    if answer.status != 200:
        assert answer.media_type == "application/problem+json", answer.media_type
        code = _problem(value, answer.status)
        assert case.kind != "images" or code == "not-ready", f"a whole batch is answered {code}"
        if case.kind == "alone":
            return [_alone(case.pictures[0], {"error": value}, max_pixels)]
        return [code]
    assert answer.media_type == "application/json", answer.media_type
    if case.kind == "images":
        return _batch(case, value, good, max_pixels)
    if case.kind == "alone":
        return [_alone(case.pictures[0], value, max_pixels)]
    for item in value if isinstance(value, list) else [value]:
        if "error" in item:
            _problem(item["error"], None)
        elif "predictions" in item:
            _answer(item)
    return ["ok"]


def _batch(case: Case, value: Any, good: tuple[Any, ...], max_pixels: int) -> list[str]:
    assert isinstance(value, list), "a batch is answered by a list"
    assert len(value) == len(case.pictures), f"{len(value)} answers to {len(case.pictures)}"
    for number, item in enumerate(value[::2]):
        assert item == good[number % len(good)], f"a good neighbour was answered {item}"
    return [
        _alone(picture, item, max_pixels)
        for picture, item in zip(case.pictures[1::2], value[1::2], strict=True)
    ]


def _alone(picture: bytes, item: Any, max_pixels: int) -> str:
    """The outcome, which has to be the library's own."""
    if "error" in item:
        outcome = _problem(item["error"], None)
    else:
        _answer(item)
        outcome = "ok"
    try:
        applied = list(images.decode(picture, max_pixels=max_pixels).applied)
        own = "ok"
    except FledgeError as error:
        own = error.code
    except Exception as error:
        raise AssertionError(f"the library raises {error!r}") from error
    if outcome not in ("deadline-exceeded", "overloaded"):
        assert outcome == own, f"the service says {outcome}, the library {own}"
        assert outcome != "ok" or item["applied"] == applied, f"applied {item['applied']}"
    return outcome


def _problem(value: Any, status: int | None) -> str:
    assert isinstance(value, dict), f"a problem is {value!r}"
    assert value.keys() == _PROBLEM, f"a problem has {list(value)}"
    code = str(value["code"])
    assert CODES.get(code) == value["status"], f"code {code} with status {value['status']}"
    assert status in (None, value["status"]), f"status {status} of {value['status']}"
    assert value["type"] == f"urn:fledge:problem:{code}", value["type"]
    assert "Traceback" not in value["detail"], value["detail"]
    assert "\n" not in value["detail"], value["detail"]
    return code


def _answer(item: Any) -> None:
    assert item.keys() >= _ANSWER, f"an answer has {list(item)}"
    shares = [known["probability"] for known in item["predictions"]]
    assert shares == sorted(shares, reverse=True), f"probabilities {shares}"
    assert 0 < sum(shares) <= 1 + 1e-9, f"probabilities {shares}"
