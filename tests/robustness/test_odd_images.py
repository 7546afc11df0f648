"""Every odd file through the library, the service and the scorer: everybody says the same."""

import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.errors import FledgeError
from serving.imaging import decode as images
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from tests.robustness import corpus
from tests.robustness.scene import Item
from tests.support.live_server import ROOT, Live, live
from tests.support.tiny_bundle import tiny_bundle

ITEMS = corpus.items()
GOOD = [item for item in ITEMS if item.code is None]
# What a client says of a file decides nothing, so it is always another thing.
MEDIA_TYPES = ("image/jpeg", "image/png", "text/plain", "application/octet-stream", "image/tiff")
SUFFIXES = sorted(images.SUFFIXES)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return open_predictor(bundle, device="cpu")


@pytest.fixture(scope="module")
def expected(predictor: Predictor) -> dict[str, Any]:
    """By name: an error's code, or what was applied and the probabilities, of the file alone."""
    answers = {}
    for item in GOOD:
        prediction = predictor.predict([predictor.prepare(item.data)])[0]
        answers[item.name] = told(predictor.answer(prediction))
    return answers | {item.name: item.code for item in ITEMS if item.code}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(bundle, tmp_path_factory.mktemp("server") / "log", FLEDGE_DEVICE="cpu") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def told(answer: dict[str, Any]) -> tuple[Any, ...]:
    known = {item["label"]: item["probability"] for item in answer["predictions"]}
    return tuple(answer["applied"]), pytest.approx(known, abs=1e-9)


def verdict(answer: dict[str, Any]) -> Any:
    """Of an answer, or of an item of a batch."""
    if "predictions" not in answer:
        return answer.get("error", answer)["code"]
    known = {item["label"]: item["probability"] for item in answer["predictions"]}
    return tuple(answer["applied"]), known


def test_the_corpus_is_large_and_has_both_sides() -> None:
    names = [item.name for item in ITEMS]
    assert len(set(names)) == len(names) > 600
    assert len(GOOD) > 200
    codes = {"no-image", "not-an-image", "unsupported-format", "broken-image", "too-large"}
    assert {item.code for item in ITEMS} == {None, *codes}
    again = zip(corpus.items(), ITEMS, strict=True)
    # libavif writes the time into a film.
    assert {one.name for one, other in again if one != other} <= {"avif-animated"}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_the_library_gives_the_verdict(item: Item) -> None:
    if item.code:
        with pytest.raises(FledgeError) as caught:
            images.decode(item.data)
        assert caught.value.code == item.code
        assert "\n" not in str(caught.value)
        return
    decoded = images.decode(item.data)
    assert (decoded.applied, decoded.image.size) == (item.applied, item.size)
    assert decoded.image.mode == "RGB"
    width, height = item.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    for place, colour in zip(places, item.colours, strict=bool(item.colours)):
        found = decoded.image.getpixel(place)
        off = max(abs(a - b) for a, b in zip(found, colour, strict=True))
        assert off <= item.tolerance, f"{found} at {place}, where {colour} should be"
    assert images.decode(item.data).image.tobytes() == decoded.image.tobytes()


@pytest.mark.parametrize("form", [False, True], ids=["body", "form"])
def test_the_service_gives_the_same_verdict(
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
        found = verdict(response.json())
        if found != expected[item.name] or (response.status_code == 200) != (item.code is None):
            wrong[item.name] = (response.status_code, found, expected[item.name])
    assert wrong == {}
    assert client.get("/readyz").status_code == 200


def test_a_batch_gives_the_same_verdicts_in_order(
    client: httpx.Client, expected: dict[str, Any]
) -> None:
    wrong = {}
    # Far ones side by side, so that good and bad ones are neighbours.
    for start in range(0, 13):
        group = ITEMS[start::13]
        files = [("image", ("x", item.data)) for item in group]
        response = client.post("/predict/batch", files=files)
        assert response.status_code == 200
        for item, answer in zip(group, response.json(), strict=True):
            if verdict(answer) != expected[item.name]:
                wrong[item.name] = (verdict(answer), expected[item.name])
    assert wrong == {}


@pytest.mark.parametrize("options", ["", "--batch 7 --workers 3"])
def test_the_scorer_gives_the_same_verdicts_in_order(
    bundle: Path, expected: dict[str, Any], tmp_path: Path, options: str
) -> None:
    folder, out = tmp_path / "in", tmp_path / "scores.csv"
    folder.mkdir()
    # Far ones side by side, so that good and bad ones meet in a batch.
    mixed = [item for start in range(13) for item in ITEMS[start::13]]
    for number, (item, suffix) in enumerate(zip(mixed, itertools.cycle(SUFFIXES), strict=False)):
        (folder / f"{number}{suffix}").write_bytes(item.data)
    words = ["score", str(folder), "--bundle", str(bundle), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "fledge", *words, *options.split()],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "FLEDGE_BUNDLE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = {}
    for number, (item, row) in enumerate(zip(mixed, rows, strict=True)):
        assert Path(row["path"]).stem == str(number)
        if row["status"] == "ok":
            applied = tuple(filter(None, row["applied"].split(";")))
            found: Any = applied, dict(json.loads(row["top_k"]))
            wanted = expected[item.name]
        else:
            found, wanted = row["error"], reason(item) if item.code else "an answer"
        if found != wanted:
            wrong[item.name] = (found, wanted)
    assert wrong == {}


def reason(item: Item) -> str:
    """Code and message of a broken one."""
    with pytest.raises(FledgeError) as caught:
        images.decode(item.data)
    return f"{caught.value.code}: {caught.value}"
