"""`make bento`: the Bento is built, and answers as the bundle in it does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

import serving
from serving.predictor import open_predictor
from tests.serving.live import free_port, get, post
from tests.tiny import photo, tiny_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    told = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHONPATH")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in told and not name.startswith("FLEDGE_")
    }
    return {**kept, "BENTOML_HOME": str(tmp_path / "store"), "BENTOML_DO_NOT_TRACK": "True"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def bento(env: dict[str, str], bundle: Path, tmp_path: Path) -> Path:
    """The folder of the Bento that the recipe of `make bento` builds."""
    lines = subprocess.run(
        ["make", "-n", "bento", f"BUNDLE={bundle}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # The same commands, by the Python that runs this test and in a folder of its own.
    recipe = lines[lines.index(".venv/bin/fledge verify") :]
    recipe = recipe.replace(".venv/bin/fledge", f"{sys.executable} -m fledge")
    recipe = recipe.replace(".venv/bin/bentoml", f"{sys.executable} -m bentoml")
    recipe = recipe.replace("build/bento", str(tmp_path / "build"))
    done = subprocess.run(
        ["sh", "-ec", recipe],
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (tmp_path / "store" / "bentos" / "fledge").glob("*/bento.yaml")
    return found.parent


@pytest.fixture
def url(bento: Path, env: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """`bentoml serve fledge:latest`, from elsewhere, so that nothing of this tree is found."""
    port = free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "fledge:latest", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                if get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, (tmp_path / "log").read_text()
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
    locked = (ROOT / "requirements" / "serving.txt").read_text()
    assert (bento / "env" / "python" / "requirements.txt").read_text().strip() == locked.strip()
    assert re.search(r"^onnxruntime-gpu==\S+ ; platform_machine == 'x86_64'", locked, re.MULTILINE)
    python = yaml.safe_load((bento / "bento.yaml").read_text())["python"]
    assert not python.get("packages")
