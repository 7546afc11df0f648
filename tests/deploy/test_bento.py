"""`make bento` builds a Bento that gives the answers of the bundle in it."""

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
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bento")


@pytest.fixture(scope="module")
def env(workspace: Path) -> dict[str, str]:
    make_variables = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHONPATH")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in make_variables and not name.startswith("FLEDGE_")
    }
    return {**inherited, "BENTOML_HOME": str(workspace / "store"), "BENTOML_DO_NOT_TRACK": "True"}


@pytest.fixture(scope="module")
def bundle(workspace: Path) -> Path:
    return tiny_bundle(workspace / "bundle")


@pytest.fixture(scope="module")
def bento(env: dict[str, str], bundle: Path, workspace: Path) -> Path:
    """The folder of the Bento that the commands of `make bento` build."""
    commands = subprocess.run(
        ["make", "-n", "bento", f"BUNDLE={bundle}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # The same commands, with the Python of this test and in a separate folder.
    recipe = commands[commands.index(".venv/bin/fledge verify") :]
    folder = f"build/bento-{uuid.uuid4().hex[:8]}"
    for old, new in {
        ".venv/bin/fledge": f"{sys.executable} -m fledge",
        ".venv/bin/bentoml": f"{sys.executable} -m bentoml",
        "build/bento": folder,
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
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (workspace / "store" / "bentos" / "fledge").glob("*/bento.yaml")
    return found.parent


@pytest.fixture(scope="module")
def url(bento: Path, env: dict[str, str], workspace: Path) -> Iterator[str]:
    """`bentoml serve fledge:latest`, run in another folder: it must find no file of this tree."""
    port = free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "fledge:latest", "--port", str(port)]
    with (workspace / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=workspace, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, (workspace / "log").read_text()
            assert time.monotonic() < deadline, (workspace / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def test_the_bento_gives_the_answers_of_its_bundle(url: str, bento: Path, bundle: Path) -> None:
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


def test_the_requirements_of_the_bento_equal_the_lock_file(bento: Path) -> None:
    def pins(path: Path) -> set[str]:
        # BentoML reformats the markers, and adds a line for itself.
        return set(re.findall(r"^[\w.-]+==[^\s;]+|sha256:\w+", path.read_text(), re.MULTILINE))

    locked = pins(ROOT / "requirements" / "serving.txt")
    assert pins(bento / "env" / "python" / "requirements.txt") == locked
    assert any(pin.startswith("onnxruntime-gpu==") for pin in locked)
