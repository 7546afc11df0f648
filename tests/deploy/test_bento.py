"""`make bento`: the Bento is built, and answers as the bundle in it does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import serving
from serving.inference.load import open_predictor
from tests.support.live_server import free_port, get, post
from tests.support.tiny_bundle import photo, tiny_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bento")


@pytest.fixture(scope="module")
def env(place: Path) -> dict[str, str]:
    told = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHONPATH")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in told and not name.startswith("FLEDGE_")
    }
    return {**kept, "BENTOML_HOME": str(place / "store"), "BENTOML_DO_NOT_TRACK": "True"}


@pytest.fixture(scope="module")
def bundle(place: Path) -> Path:
    return tiny_bundle(place / "bundle")


@pytest.fixture(scope="module")
def bento(env: dict[str, str], bundle: Path, place: Path) -> Path:
    """The folder of the Bento that the recipe of `make bento` builds."""
    told = subprocess.run(
        ["make", "-n", "bento", f"BUNDLE={bundle}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # The same commands, by the Python that runs this test and in a folder of its own.
    recipe = told[told.index(".venv/bin/fledge verify") :]
    aside = f"build/bento-{uuid.uuid4().hex[:8]}"
    for old, new in {
        ".venv/bin/fledge": f"{sys.executable} -m fledge",
        ".venv/bin/bentoml": f"{sys.executable} -m bentoml",
        "build/bento": aside,
    }.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    try:
        done = subprocess.run(
            ["sh", "-ec", recipe],
            cwd=ROOT,
            env=env | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(ROOT / aside, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (place / "store" / "bentos" / "fledge").glob("*/bento.yaml")
    return found.parent


@pytest.fixture(scope="module")
def url(bento: Path, env: dict[str, str], place: Path) -> Iterator[str]:
    """`bentoml serve fledge:latest`, from elsewhere, so that nothing of this tree is found."""
    port = free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "fledge:latest", "--port", str(port)]
    with (place / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=place, env=env, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                if get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, (place / "log").read_text()
            assert time.monotonic() < until, (place / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def test_it_answers_as_the_bundle_inside(url: str, bento: Path, bundle: Path) -> None:
    data = photo(7)
    predictor = open_predictor(bundle, device="cpu")
    expected = predictor.answer(predictor.predict([predictor.prepare(data)])[0])
    answer = post(f"{url}/predict", data).json()
    assert answer["model"] == expected["model"]
    assert answer["predictions"] == [
        {"label": one["label"], "probability": pytest.approx(one["probability"], abs=1e-5)}
        for one in expected["predictions"]
    ]
    assert get(f"{url}/model").json()["serving"]["fledge"] == serving.__version__
    assert post(f"{url}/predict", b"no image").status_code == 415
    assert (bento / "src" / "bundle" / "manifest.json").read_bytes() == (
        bundle / "manifest.json"
    ).read_bytes()
    assert not list(bento.rglob("training")) + list(bento.rglob("tests"))


def test_its_requirements_are_those_that_were_locked(bento: Path) -> None:
    def pins(path: Path) -> set[str]:
        # BentoML writes markers in its own style, and names itself once more.
        return set(re.findall(r"^[\w.-]+==[^\s;]+|sha256:\w+", path.read_text(), re.MULTILINE))

    locked = pins(ROOT / "requirements" / "serving.txt")
    assert pins(bento / "env" / "python" / "requirements.txt") == locked
    assert any(pin.startswith("onnxruntime-gpu==") for pin in locked)
