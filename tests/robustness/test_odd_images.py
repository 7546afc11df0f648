"""Every file of the corpus in the library, the service and the scorer: the same results."""

import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serving.errors import FledgeError
from serving.imaging.decode import decode
from serving.imaging.formats import SUFFIXES
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from serving.scoring.options import ScoringOptions
from serving.scoring.score import score
from tests.robustness import corpus
from tests.robustness.scene import Item
from tests.support import live_server
from tests.support.live_server import ROOT, Live, live
from tests.support.tiny_bundle import tiny_bundle

ITEMS = corpus.items()
GOOD = [item for item in ITEMS if item.code is None]
# The client's media type must not matter, so the types do not match the files.
MEDIA_TYPES = ("image/jpeg", "image/png", "text/plain", "application/octet-stream", "image/tiff")
EXTENSIONS = sorted(SUFFIXES)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return open_predictor(bundle, device="cpu")


@pytest.fixture(scope="module")
def expected(predictor: Predictor) -> dict[str, Any]:
    """By name: the error code, or (applied, probabilities) of the file in a batch of its own."""
    answers = {}
    for item in GOOD:
        prediction = predictor.predict([predictor.prepare(item.data)])[0]
        answers[item.name] = result_of(predictor.answer(prediction))
    return answers | {item.name: item.code for item in ITEMS if item.code}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(bundle, tmp_path_factory.mktemp("server") / "log", FLEDGE_DEVICE="cpu") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with live_server.client(server.url) as client:
        yield client


@pytest.fixture(autouse=True)
def pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process; `decode` raises it for good, and the words of an error depend on it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000_000)


def result_of(answer: dict[str, Any]) -> tuple[Any, ...]:
    probabilities = {item["label"]: item["probability"] for item in answer["predictions"]}
    return tuple(answer["applied"]), pytest.approx(probabilities, abs=1e-9)


def outcome_of(answer: dict[str, Any]) -> Any:
    """The error code, or (applied, probabilities), of an answer or of an item of a batch."""
    if "predictions" not in answer:
        return answer.get("error", answer)["code"]
    probabilities = {item["label"]: item["probability"] for item in answer["predictions"]}
    return tuple(answer["applied"]), probabilities


def test_the_corpus_has_valid_files_and_files_with_every_error_code() -> None:
    names = [item.name for item in ITEMS]
    assert len(set(names)) == len(names) > 600
    assert len(GOOD) > 200
    codes = {"no-image", "not-an-image", "unsupported-format", "broken-image", "too-large"}
    assert {item.code for item in ITEMS} == {None, *codes}
    again = zip(corpus.items(), ITEMS, strict=True)
    # libavif writes the current time into animations.
    assert {one.name for one, other in again if one != other} <= {"avif-animated"}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_the_library_gives_the_expected_result(item: Item) -> None:
    if item.code:
        with pytest.raises(FledgeError) as caught:
            decode(item.data)
        assert caught.value.code == item.code
        assert "\n" not in str(caught.value)
        return
    decoded = decode(item.data)
    assert (decoded.applied, decoded.image.size) == (item.applied, item.size)
    assert decoded.image.mode == "RGB"
    width, height = item.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    for place, colour in zip(places, item.colours, strict=bool(item.colours)):
        found = decoded.image.getpixel(place)
        difference = max(abs(a - b) for a, b in zip(found, colour, strict=True))
        assert difference <= item.tolerance, f"{found} at {place}, {colour} expected"
    assert decode(item.data).image.tobytes() == decoded.image.tobytes()


@pytest.mark.parametrize("form", [False, True], ids=["body", "form"])
def test_the_service_gives_the_same_results_as_the_library(
    client: httpx.Client, expected: dict[str, Any], form: bool
) -> None:
    wrong = {}
    for item, media_type in zip(ITEMS, itertools.cycle(MEDIA_TYPES), strict=False):
        if form:
            files = {"image": ("no-image.txt", item.data, media_type)}
            response = client.post("/predict", files=files)
        else:
            headers = {"content-type": media_type}
            response = client.post("/predict", content=item.data, headers=headers)
        found = outcome_of(response.json())
        if not form and item.name == "text-json":
            assert found in ("bad-request", expected[item.name])  # by the type that is stated
            continue
        if found != expected[item.name] or (response.status_code == 200) != (item.code is None):
            wrong[item.name] = (response.status_code, found, expected[item.name])
    assert wrong == {}
    assert client.get("/readyz").status_code == 200


def test_a_batch_gives_the_same_results_in_order(
    client: httpx.Client, expected: dict[str, Any]
) -> None:
    wrong = {}
    # Every 13th item, so that each batch has valid and broken files.
    for start in range(0, 13):
        group = ITEMS[start::13]
        files = [("image", ("x", item.data)) for item in group]
        response = client.post("/predict/batch", files=files)
        assert response.status_code == 200
        for item, answer in zip(group, response.json(), strict=True):
            if outcome_of(answer) != expected[item.name]:
                wrong[item.name] = (outcome_of(answer), expected[item.name])
    assert wrong == {}


def score_by_command(source: Path, bundle: Path, out: Path) -> None:
    arguments = ["--bundle", str(bundle), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "fledge", "score", str(source), *arguments],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "FLEDGE_BUNDLE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def score_in_batches(source: Path, bundle: Path, out: Path) -> None:
    options = ScoringOptions(device="cpu", batch=7, workers=3)
    score([str(source)], bundle, out, options, log=lambda _: None)


@pytest.mark.parametrize("run", [score_by_command, score_in_batches])
def test_the_scorer_gives_the_same_results_in_order(
    bundle: Path, expected: dict[str, Any], tmp_path: Path, run: Callable[..., None]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "scores.csv"
    folder.mkdir()
    # Every 13th item, so that the batches have valid and broken files.
    mixed = [item for start in range(13) for item in ITEMS[start::13]]
    for number, (item, suffix) in enumerate(zip(mixed, itertools.cycle(EXTENSIONS), strict=False)):
        (folder / f"{number}{suffix}").write_bytes(item.data)
    run(folder, bundle, out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = {}
    for number, (item, row) in enumerate(zip(mixed, rows, strict=True)):
        assert Path(row["path"]).stem == str(number)
        if row["status"] == "ok":
            applied = tuple(filter(None, row["applied"].split(";")))
            actual: Any = applied, dict(json.loads(row["top_k"]))
            wanted = expected[item.name]
        else:
            actual, wanted = row["error"], error_text(item) if item.code else "an answer"
        if actual != wanted:
            wrong[item.name] = (actual, wanted)
    assert wrong == {}


def error_text(item: Item) -> str:
    """Code and message of the error of a broken file."""
    with pytest.raises(FledgeError) as caught:
        decode(item.data)
    # `fledge score` names its own option for the limit.
    message = str(caught.value).replace("(FLEDGE_MAX_PIXELS)", "(--max-pixels)")
    return f"{caught.value.code}: {message}"
