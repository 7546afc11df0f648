"""The image that `make image` builds, run as `make run-image` does: contents and answers.

Without a container engine these tests are skipped, or fail if FLEDGE_REQUIRE_DOCKER=1.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import serving
from serving.inference.load import open_predictor
from tests.support.container_engine import DOCKER, IMAGE, Container, run, run_to_end
from tests.support.tiny_bundle import photo

pytestmark = pytest.mark.docker

MAX_OWN_MB = 215  # on top of the base image
MAX_IDLE_MB = 350  # of memory, with a tiny bundle
MAX_READY_SECONDS = 10.0  # less than 2 on an idle machine


def test_size_memory_and_start_time_are_within_their_limits(
    container: Container, build_seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    size = int(run(DOCKER, "image", "inspect", "--format", "{{.Size}}", IMAGE).stdout) / 1e6
    du = ("du", "--apparent-size", "--block-size=1", "-s", "/opt/venv", "/app")
    sizes = run(DOCKER, "exec", container.name, *du).stdout.splitlines()
    own = sum(int(line.split()[0]) for line in sizes) / 1e6
    resident = """
import pathlib
pages = 0
for stat in pathlib.Path("/proc").glob("[0-9]*/smaps_rollup"):
    try:
        lines = stat.read_text().splitlines()
    except OSError:  # the process has exited
        continue
    pages += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
print(pages * 1024)
"""
    memory = int(container.python(resident)) / 1e6
    with capsys.disabled():
        print(
            f"\nimage {size:.0f} MB, {own:.0f} MB of it on top of the base image; "
            f"built in {build_seconds:.0f} s; "
            f"ready {container.ready_after:.1f} s after docker run; {memory:.0f} MB idle"
        )
    assert 100 < own <= MAX_OWN_MB
    assert 50 < memory <= MAX_IDLE_MB
    assert container.ready_after <= MAX_READY_SECONDS


def test_a_photo_gets_the_answer_of_the_bundle(container: Container, bundle: Path) -> None:
    data = photo(7)
    status, _, answer = container.post("/predict?top_k=3", data)
    assert status == 200
    predictor = open_predictor(bundle, device="cpu")
    expected = predictor.answer(predictor.predict([predictor.prepare(data)])[0], 3)
    assert [p["label"] for p in answer["predictions"]] == [
        p["label"] for p in expected["predictions"]
    ]
    for actual, wanted in zip(answer["predictions"], expected["predictions"], strict=True):
        assert actual["probability"] == pytest.approx(wanted["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("data", "status"), [(b"no image at all", 415), (photo(8)[:400], 422), (b"", 400)]
)
def test_a_bad_photo_is_refused_and_the_service_goes_on(
    container: Container, data: bytes, status: int
) -> None:
    actual, media_type, problem = container.post("/predict", data)
    assert (actual, media_type) == (status, "application/problem+json")
    assert problem["code"]
    assert container.post("/predict", photo(7))[0] == 200


def test_the_container_runs_unprivileged(container: Container) -> None:
    status = container.python("print(open('/proc/1/status').read())")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert fields["Uid"].split() == ["10001"] * 4
    assert fields["Gid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"


def test_the_root_file_system_is_read_only(container: Container) -> None:
    code = """
for path in ("/app/x", "/opt/venv/x", "/bundle/x", "/x"):
    try:
        open(path, "w")
    except OSError as error:
        print(error.errno)
"""
    assert container.python(code).split() == ["30"] * 4  # EROFS


def test_no_build_or_install_tools_are_inside(container: Container) -> None:
    modules = "import importlib.util as u; print(*filter(u.find_spec, {!r}))"
    installers = ["pip", "ensurepip", "setuptools", "wheel"]
    unwanted = ["torch", "torchvision", "onnx", "training", "export", "pytest", *installers]
    assert container.python(modules.format(unwanted)) == ""
    base = container.python("import sys; print(sys._base_executable)")
    found = run(DOCKER, "exec", container.name, base, "-c", modules.format(installers)).stdout
    assert found.strip() == ""
    tools = ["gcc", "cc", "g++", "ld", "as", "make", "cmake", "pip", "pip3", "git", "curl"]
    which = f"import shutil; print(*filter(shutil.which, {tools!r}))"
    assert container.python(which) == ""


def test_every_module_has_its_bytecode(container: Container) -> None:
    code = """
import importlib.util, pathlib
roots = [pathlib.Path("/app"), *pathlib.Path("/opt/venv/lib").glob("python3*")]
for root in roots:
    for source in root.rglob("*.py"):
        if not pathlib.Path(importlib.util.cache_from_source(str(source))).exists():
            print(source)
"""
    assert container.python(code) == ""


def test_the_container_becomes_healthy(container: Container) -> None:
    """Checked each second here, each ten seconds by default."""
    default = json.loads(
        run(DOCKER, "image", "inspect", "--format", "{{json .Config.Healthcheck}}", IMAGE).stdout
    )
    assert default["Interval"] == 10e9
    end = time.monotonic() + 30
    status = ""
    while status != "healthy" and time.monotonic() < end:
        time.sleep(0.5)
        health = run(DOCKER, "inspect", "--format", "{{json .State.Health}}", container.name)
        status = json.loads(health.stdout)["Status"]
    assert status == "healthy"


def test_labels_name_version_and_licence(container: Container) -> None:
    text = run(DOCKER, "image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE).stdout
    labels = json.loads(text)
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert labels[f"{prefix}version"] == serving.__version__
    assert labels[f"{prefix}revision"]
    ended = run_to_end(IMAGE, "--version")
    assert ended.stdout == f"fledge {serving.__version__}\n", ended.stderr
    assert container.get("/model")["serving"]["fledge"] == serving.__version__
