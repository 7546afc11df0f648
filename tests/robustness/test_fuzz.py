"""The fuzzer: a bounded run of it, and that it would notice."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.robustness import fuzz, requests
from tests.robustness.mutate import Mutator
from tests.robustness.oracle import Answer, complaint
from tests.robustness.requests import Case
from tests.support.tiny_bundle import photo


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Fuzz]:
    with fuzz.service() as server:
        yield fuzz.Fuzz(server, tmp_path_factory.mktemp("failures"))


def test_mutants_and_odd_requests_hurt_nobody(fuzzer: fuzz.Fuzz) -> None:
    report = fuzz.run(fuzzer, cases=1500, seed=1)
    assert report.faults == []
    assert report.cases >= 1500
    # It reached both sides of every door.
    for outcome in ("ok", "broken-image", "not-an-image", "too-large", "bad-request", "bad-option"):
        assert report.outcomes[outcome] > 0, report.outcomes
    assert report.outcomes["fault"] == 0
    if sys.platform == "linux":
        assert sum(fuzz.processes(fuzzer.server.process.pid).values()) > 10_000_000


def test_a_request_that_finds_a_fault_is_saved_as_it_was_sent(
    fuzzer: fuzz.Fuzz, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "complaint", lambda *rest: ("invented", []))
    monkeypatch.setattr(fuzzer, "report", fuzz.Report())
    case = requests.alone(photo(9))
    fuzzer.ask(case, "1-2-3")
    (fault,) = fuzzer.report.faults
    path, _, rest = fault.partition(": ")
    assert rest == "alone: invented"
    assert Path(path).read_bytes() == case.raw
    told = fuzz.replay(Path(path))
    assert told.startswith("200 application/json\n")
    assert "the service lives" in told


def test_the_same_number_makes_the_same_mutants() -> None:
    mutator, again = Mutator(), Mutator()
    one, other = random.Random("0-7"), random.Random("0-7")
    made = [mutator.image(one) for _ in range(200)]
    assert made == [again.image(other) for _ in range(200)]
    assert len(set(made)) > 150


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


def judged(case: Case, status: int, value: Any, media_type: str = "application/json") -> str | None:
    answer = Answer(status, media_type, json.dumps(value).encode())
    return complaint(case, answer, GOOD, 1_000_000)[0]


def test_the_judge_lets_right_answers_pass() -> None:
    batch = requests.batch((photo(1), b"hello"))
    assert judged(batch, 200, [*GOOD, {"error": PROBLEM}]) is None
    assert judged(requests.alone(photo(1)), 200, *GOOD) is None
    problem = "application/problem+json"
    assert judged(requests.alone(b"hello"), 415, PROBLEM, problem) is None
    assert judged(Case("form", b""), 415, PROBLEM, problem) is None


@pytest.mark.parametrize(
    ("status", "value", "words"),
    [
        (500, PROBLEM, "status 500"),
        (200, [*GOOD], "1 answers to 2"),
        (200, {}, "a list"),
        (200, [GOOD[0] | {"views": 2}, {"error": PROBLEM}], "a good neighbour"),
        (200, [*GOOD, *GOOD], "the service says ok, the library not-an-image"),
        (200, [*GOOD, {"error": PROBLEM | {"code": "internal"}}], "code internal"),
        (200, [*GOOD, {"error": PROBLEM | {"status": 422}}], "code not-an-image with status 422"),
        (200, [*GOOD, {"error": PROBLEM | {"trace": "x"}}], "a problem has"),
        (200, [*GOOD, {"error": PROBLEM | {"detail": "Traceback (most"}}], "Traceback"),
        (200, [*GOOD, {"predictions": []}], "an answer has"),
        (415, PROBLEM, "application/json"),
    ],
)
def test_the_judge_notices(status: int, value: Any, words: str) -> None:
    said = judged(requests.batch((photo(1), b"hello")), status, value)
    assert said is not None
    assert words in said


def test_the_judge_asks_the_library_about_a_picture_alone() -> None:
    said = judged(requests.alone(photo(1)), 415, PROBLEM, "application/problem+json")
    assert said == "the service says not-an-image, the library ok"
    said = judged(requests.batch((photo(1), b"")), 415, PROBLEM, "application/problem+json")
    assert said == "a whole batch is answered not-an-image"


def test_no_answer_is_a_fault_but_to_a_head() -> None:
    assert complaint(Case("form", b""), None, GOOD, 1)[0] == "no answer"
    assert complaint(Case("head", b""), None, GOOD, 1) == (None, ["no answer"])
