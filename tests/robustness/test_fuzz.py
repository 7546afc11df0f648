"""A bounded run of the fuzzer, and tests that its checks find faults."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.robustness import fuzz, requests
from tests.robustness.mutate import Mutator
from tests.robustness.oracle import Answer, check
from tests.robustness.requests import Case
from tests.support.tiny_bundle import photo

PROCESS = pytest.mark.process


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Fuzzer]:
    with fuzz.service() as server:
        yield fuzz.Fuzzer(server, tmp_path_factory.mktemp("failures"))


@pytest.mark.parametrize(("seed", "cases"), [(1, 720), pytest.param(2, 3000, marks=PROCESS)])
def test_the_service_handles_mutated_images_and_malformed_requests(
    fuzzer: fuzz.Fuzzer, monkeypatch: pytest.MonkeyPatch, seed: int, cases: int
) -> None:
    monkeypatch.setattr(fuzzer, "report", fuzz.Report())
    report = fuzz.run(fuzzer, cases, seed)
    assert report.faults == []
    assert report.cases >= cases
    # All of these outcomes occurred.
    for outcome in ("ok", "broken-image", "not-an-image", "too-large", "bad-request", "bad-option"):
        assert report.outcomes[outcome] > 0, report.outcomes
    assert report.outcomes["fault"] == 0
    if sys.platform == "linux":
        assert sum(fuzz.processes(fuzzer.server.process.pid).values()) > 10_000_000


def test_a_request_that_reveals_a_fault_is_saved_and_can_be_replayed(
    fuzzer: fuzz.Fuzzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "check", lambda *rest: ("invented", []))
    monkeypatch.setattr(fuzzer, "report", fuzz.Report())
    case = requests.single(photo(9))
    fuzzer.send(case, "1-2-3")
    (fault,) = fuzzer.report.faults
    path, _, rest = fault.partition(": ")
    assert rest == "single: invented"
    assert Path(path).read_bytes() == case.raw
    text = fuzz.replay(Path(path))
    assert text.startswith("200 application/json\n")
    assert "the service is running" in text


def test_the_same_random_numbers_make_the_same_mutants() -> None:
    mutator, again = Mutator(), Mutator()
    one, other = random.Random("0-7"), random.Random("0-7")
    mutants = [mutator.image(one) for _ in range(200)]
    assert mutants == [again.image(other) for _ in range(200)]
    assert len(set(mutants)) > 150


GOOD: tuple[Any, ...] = (
    {
        "predictions": [
            {"label": "rose", "probability": 0.7},
            {"label": "lily", "probability": 0.2},
        ],
        "model": "tiny:1",
        "precision": "fp32",
        "views": 1,
        "confident": None,
        "applied": [],
    },
)
PROBLEM = {
    "type": "urn:fledge:problem:not-an-image",
    "title": "Unsupported Media Type",
    "status": 415,
    "detail": "no image",
    "code": "not-an-image",
}


def fault_of(
    case: Case, status: int, value: Any, media_type: str = "application/json"
) -> str | None:
    answer = Answer(status, media_type, json.dumps(value).encode())
    return check(case, answer, GOOD, 1_000_000)[0]


def test_valid_answers_have_no_fault() -> None:
    batch = requests.batch((photo(1), b"hello"))
    assert fault_of(batch, 200, [*GOOD, {"error": PROBLEM}]) is None
    assert fault_of(requests.single(photo(1)), 200, *GOOD) is None
    problem = "application/problem+json"
    assert fault_of(requests.single(b"hello"), 415, PROBLEM, problem) is None
    assert fault_of(Case("form", b""), 415, PROBLEM, problem) is None


@pytest.mark.parametrize(
    ("status", "value", "words"),
    [
        (500, PROBLEM, "status 500"),
        (200, [*GOOD], "1 of 2 answers"),
        (200, {}, "not a list"),
        (200, [GOOD[0] | {"views": 2}, {"error": PROBLEM}], "a valid photo got"),
        (200, [*GOOD, *GOOD], "ok by the service, not-an-image by the library"),
        (200, [*GOOD, {"error": PROBLEM | {"code": "internal"}}], "code internal"),
        (200, [*GOOD, {"error": PROBLEM | {"status": 422}}], "code not-an-image with status 422"),
        (200, [*GOOD, {"error": PROBLEM | {"trace": "x"}}], "the problem has"),
        (200, [*GOOD, {"error": PROBLEM | {"detail": "Traceback (most"}}], "Traceback"),
        (200, [*GOOD, {"predictions": []}], "the answer has"),
        (415, PROBLEM, "application/json"),
    ],
)
def test_invalid_answers_to_a_batch_are_faults(status: int, value: Any, words: str) -> None:
    fault = fault_of(requests.batch((photo(1), b"hello")), status, value)
    assert fault is not None
    assert words in fault


def test_a_result_that_differs_from_the_library_is_a_fault() -> None:
    fault = fault_of(requests.single(photo(1)), 415, PROBLEM, "application/problem+json")
    assert fault == "not-an-image by the service, ok by the library"
    fault = fault_of(requests.batch((photo(1), b"")), 415, PROBLEM, "application/problem+json")
    assert fault == "the whole batch failed with not-an-image"


def test_no_answer_is_a_fault_except_for_a_malformed_head() -> None:
    assert check(Case("form", b""), None, GOOD, 1)[0] == "no answer"
    assert check(Case("head", b""), None, GOOD, 1) == (None, ["no answer"])
