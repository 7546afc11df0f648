"""The image as an operator meets it: built by `make image`, run by `make run-image`.

Without a container engine these tests skip by name, or fail where FLEDGE_REQUIRE_DOCKER=1.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.opening import open_predictor
from tests.tiny import photo, tiny_bundle

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
DOCKER = os.environ.get("DOCKER", "docker")
IMAGE = "fledge:test"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 needs no proxy
# What the make that started these tests was told is not for the make that they start.
TOLD = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
ENV = {name: value for name, value in os.environ.items() if name not in TOLD}
GRACE = 10.0  # s, what `docker stop` gives by default
OURS_AT_MOST = 240  # MB on top of the base image


def run(*command: str, check: bool = True, limit: float = 60) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=limit, check=False
    )
    if check and done.returncode:
        pytest.fail(f"{shlex.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def make(target: str, *variables: str, limit: float = 60) -> subprocess.CompletedProcess[str]:
    return run("make", target, f"DOCKER={DOCKER}", f"IMAGE={IMAGE}", *variables, limit=limit)


def read_only_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A container that is expected to end by itself."""
    hardening = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
    return run(DOCKER, "run", "--rm", *hardening, *arguments, check=False)


@pytest.fixture(scope="module")
def engine() -> None:
    problem = f"no command {DOCKER!r}"
    if shutil.which(DOCKER):
        answer = run(DOCKER, "info", check=False)
        problem = answer.stderr.strip() if answer.returncode else ""
    if problem and os.environ.get("FLEDGE_REQUIRE_DOCKER") == "1":
        pytest.fail(f"FLEDGE_REQUIRE_DOCKER=1, but no container engine answers: {problem}")
    if problem:
        pytest.skip(f"no container engine answers: {problem}")


@pytest.fixture(scope="module")
def build_seconds(engine: None) -> float:
    start = time.monotonic()
    base = os.environ.get("BASE_IMAGE")
    make("image", *([f"BASE_IMAGE={base}"] if base else []), limit=900)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return readable(tiny_bundle(tmp_path_factory.mktemp("docker") / "bundle"))


def readable(bundle: Path) -> Path:
    """Let the container's user in, as an operator must."""
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return bundle


@dataclass
class Container:
    name: str
    address: str
    ready_after: float  # s, from `docker run` to the first yes of /readyz

    def python(self, code: str) -> str:
        return run(DOCKER, "exec", self.name, "python", "-c", code).stdout.strip()

    def post(self, path: str, data: bytes) -> tuple[int, str, dict]:
        request = urllib.request.Request(
            self.address + path, data=data, headers={"Content-Type": "image/jpeg"}
        )
        try:
            with DIRECT.open(request, timeout=30) as answer:
                return answer.status, answer.headers.get_content_type(), json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get_content_type(), json.load(error)


def start(bundle: Path, watch: Callable[[str], None] = lambda name: None) -> Container:
    """Run it and wait until it is ready; `watch` is told its name before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = f"fledge-test-{uuid.uuid4().hex[:8]}"
    begun = time.monotonic()
    make("run-image", f"BUNDLE={bundle}", f"PORT={port}", f"DOCKER_RUN_ARGS=--detach --name {name}")
    watch(name)
    address = f"http://127.0.0.1:{port}"
    while time.monotonic() - begun < 60:
        try:
            with DIRECT.open(f"{address}/readyz", timeout=2):
                return Container(name, address, time.monotonic() - begun)
        except OSError:
            time.sleep(0.05)
    logs = run(DOCKER, "logs", name, check=False)
    run(DOCKER, "rm", "--force", name, check=False)
    pytest.fail(f"not ready within 60 s\n{logs.stdout}{logs.stderr}")


@pytest.fixture(scope="module")
def container(build_seconds: float, bundle: Path) -> Iterator[Container]:
    started = start(bundle)
    yield started
    run(DOCKER, "rm", "--force", started.name, check=False)


def test_size_and_time_to_ready(
    container: Container, build_seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    size = int(run(DOCKER, "image", "inspect", "--format", "{{.Size}}", IMAGE).stdout) / 1e6
    ours = sum(
        int(line.split()[0])
        for line in run(
            DOCKER,
            "exec",
            container.name,
            "du",
            "--apparent-size",
            "--block-size=MB",
            "-s",
            "/opt/venv",
            "/app",
        )
        .stdout.replace("MB", "")
        .splitlines()
    )
    with capsys.disabled():
        print(
            f"\nimage {size:.0f} MB, {ours} MB of it ours; built in {build_seconds:.0f} s, "
            f"ready {container.ready_after:.1f} s after docker run"
        )
    assert ours <= OURS_AT_MOST


def test_a_good_photo_gets_the_answer_of_the_bundle(container: Container, bundle: Path) -> None:
    data = photo(7)
    status, _, answer = container.post("/predict?top_k=3", data)
    assert status == 200
    predictor = open_predictor(bundle, device="cpu")
    expected = predictor.answer(predictor.predict([predictor.prepare(data)])[0], 3)
    assert [p["label"] for p in answer["predictions"]] == [
        p["label"] for p in expected["predictions"]
    ]
    for got, want in zip(answer["predictions"], expected["predictions"], strict=True):
        assert got["probability"] == pytest.approx(want["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("data", "status"), [(b"no image at all", 415), (photo(8)[:400], 422), (b"", 400)]
)
def test_a_bad_photo_is_refused_and_the_service_lives(
    container: Container, data: bytes, status: int
) -> None:
    got, media_type, problem = container.post("/predict", data)
    assert (got, media_type) == (status, "application/problem+json")
    assert problem["code"]
    assert container.post("/predict", photo(7))[0] == 200


def test_it_runs_unprivileged(container: Container) -> None:
    status = container.python("print(open('/proc/1/status').read())")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert fields["Uid"].split() == ["10001"] * 4
    assert fields["Gid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"


def test_its_root_is_read_only(container: Container) -> None:
    code = """
for path in ("/app/x", "/opt/venv/x", "/bundle/x", "/x"):
    try:
        open(path, "w")
    except OSError as error:
        print(error.errno)
"""
    assert container.python(code).split() == ["30"] * 4  # EROFS


def test_nothing_to_build_or_install_with_is_inside(container: Container) -> None:
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


def test_its_health_is_told(container: Container) -> None:
    end = time.monotonic() + 30
    status = ""
    while status != "healthy" and time.monotonic() < end:
        time.sleep(0.5)
        health = run(DOCKER, "inspect", "--format", "{{json .State.Health}}", container.name)
        status = json.loads(health.stdout)["Status"]
    assert status == "healthy"


def test_labels_name_version_and_licence(build_seconds: float) -> None:
    text = run(DOCKER, "image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE).stdout
    labels = json.loads(text)
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert f'version = "{labels[f"{prefix}version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert labels[f"{prefix}revision"]
    told = read_only_run(IMAGE, "--version")
    assert told.stdout == f"fledge {labels[f'{prefix}version']}\n", told.stderr


def test_without_a_bundle_it_says_why_and_exits_78(build_seconds: float) -> None:
    ended = read_only_run(IMAGE)
    assert ended.returncode == 78, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "/bundle" in ended.stderr


def test_with_a_changed_byte_it_says_which_file_and_exits_78(
    build_seconds: float, tmp_path: Path
) -> None:
    broken = readable(tiny_bundle(tmp_path / "bundle"))
    graph = next(broken.rglob("model.onnx"))
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    ended = read_only_run("--volume", f"{broken}:/bundle:ro", IMAGE)
    assert ended.returncode == 78, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "model.onnx" in ended.stderr


def test_stop_ends_it_within_the_grace_period(
    build_seconds: float, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits: list[str] = []
    waiters: list[threading.Thread] = []

    def wait(name: str) -> None:
        exits.append(run(DOCKER, "wait", name, limit=180).stdout.strip())

    def watch(name: str) -> None:
        # Long before the stop: of a container that --rm has removed nobody learns the status.
        waiters.append(threading.Thread(target=wait, args=(name,)))
        waiters[0].start()

    started = start(bundle, watch)
    begun = time.monotonic()
    run(DOCKER, "stop", "--time", str(int(GRACE)), started.name)
    seconds = time.monotonic() - begun
    waiters[0].join()
    with capsys.disabled():
        print(f"\nstopped {seconds:.1f} s after docker stop")
    assert seconds < GRACE
    assert exits == ["0"]
