"""A container from its start to its end: bundle checks, resources, stop, crash."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.server.bentoml_compat import WORKER_MODULE
from serving.utils.cpu import cores
from tests.support import container_engine
from tests.support.container_engine import (
    DOCKER,
    HARDENED,
    IMAGE,
    Container,
    make_readable,
    run,
    run_to_end,
)
from tests.support.live_server import free_port
from tests.support.load_clients import CLIENTS, REFUSED, outcomes_around
from tests.support.tiny_bundle import photo, tiny_bundle

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("build_seconds")]

STOP_SECONDS = 10.0  # the default of `docker stop`


def broken(folder: Path) -> Path:
    bundle = make_readable(tiny_bundle(folder))
    graph = next(bundle.rglob("model.onnx"))
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    return bundle


@contextmanager
def host_network_container(bundle: Path) -> Iterator[Container]:
    """A container on the host's network: no proxy of the engine can refuse connections."""
    container = Container(f"fledge-test-{uuid.uuid4().hex[:8]}", free_port())
    options = ("--detach", "--name", container.name, "--network", "host", *HARDENED)
    command = ("serve", "/bundle", "--port", str(container.port))
    begun = time.monotonic()
    run(DOCKER, "run", *options, "--volume", f"{bundle}:/bundle:ro", IMAGE, *command)
    try:
        yield container.wait_until_ready(begun)
    finally:
        container.remove()


def exit_status(container: Container, limit: float = 30) -> int:
    return int(run(DOCKER, "wait", container.name, limit=limit).stdout)


def test_a_container_without_a_bundle_exits_with_78_and_a_reason() -> None:
    ended = run_to_end(IMAGE)
    assert ended.returncode == 78, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "/bundle" in ended.stderr


def test_a_container_with_a_changed_bundle_exits_with_78_and_names_the_file(tmp_path: Path) -> None:
    ended = run_to_end("--volume", f"{broken(tmp_path / 'bundle')}:/bundle:ro", IMAGE)
    assert ended.returncode == 78, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "model.onnx" in ended.stderr


def test_a_bundle_in_the_image_is_served_and_owned_by_root(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "a bundle")
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)  # as umask 077 creates them
    image = f"{IMAGE}-with-bundle"
    container_engine.build(f"BUNDLE={bundle}", image=image)
    container = Container(f"fledge-test-{uuid.uuid4().hex[:8]}", free_port())
    publish = f"127.0.0.1:{container.port}:3000"
    options = ("--detach", "--name", container.name, "--publish", publish, *HARDENED)
    begun = time.monotonic()
    run(DOCKER, "run", *options, image)
    try:
        container.wait_until_ready(begun)
        assert container.post("/predict", photo(7))[0] == 200
        code = """
import os, pathlib
for path in (pathlib.Path("/bundle"), *pathlib.Path("/bundle").rglob("*")):
    if path.stat().st_uid != 0 or os.access(path, os.W_OK):
        print(path)
"""
        assert container.python(code) == ""
    finally:
        container.remove()
        run(DOCKER, "image", "rm", image, check=False)


def test_a_broken_bundle_stops_the_build(tmp_path: Path) -> None:
    image = f"{IMAGE}-with-broken-bundle"
    output = container_engine.build(
        f"BUNDLE={broken(tmp_path / 'bundle')}", image=image, check=False
    )
    assert "model.onnx was changed" in output
    leftover = run(DOCKER, "run", "--rm", *HARDENED, image, check=False)
    run(DOCKER, "image", "rm", image, check=False)
    assert leftover.returncode == 78, "the tag must not name an image with the broken bundle inside"


def test_the_threads_match_the_cpus_of_the_container(bundle: Path, container: Container) -> None:
    assert f", {cores()} threads, " in container.logs()
    limited = container_engine.start(bundle, options=["--cpus", "1"])
    try:
        assert ", 1 threads, " in limited.logs()
    finally:
        limited.remove()


@pytest.mark.parametrize(("cpus", "expected"), [("0.5", "1"), ("1", "1"), (None, str(cores()))])
def test_the_cores_are_those_of_the_container(cpus: str | None, expected: str) -> None:
    options = ["--cpus", cpus] if cpus else []
    code = "from serving.utils.cpu import cores; print(cores())"
    ended = run_to_end(*options, "--entrypoint", "python", IMAGE, "-c", code)
    assert ended.stdout.split() == [expected], ended.stderr


def test_stopping_a_container_under_load_loses_no_request(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with host_network_container(bundle) as container:
        seconds: list[float] = []

        def stop() -> None:
            begun = time.monotonic()
            run(DOCKER, "stop", "--time", str(int(STOP_SECONDS)), container.name)
            seconds.append(time.monotonic() - begun)

        before, after = outcomes_around(container.port, photo(7, (2000, 1500)), stop)
        assert exit_status(container) == 0
    with capsys.disabled():
        print(f"\nstopped {seconds[0]:.1f} s after docker stop; {before} before, {after} after")
    assert set(before) == {"200"}
    assert before["200"] > CLIENTS
    assert set(after) <= {"200", REFUSED}
    assert after[REFUSED] == CLIENTS
    assert seconds[0] < STOP_SECONDS


def run_in_threads(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("workers", "process", "status"),
    [("1", "fledge serve", 137), ("2", WORKER_MODULE, 1)],
)
def test_a_killed_worker_ends_the_container(
    bundle: Path, workers: str, process: str, status: int
) -> None:
    # A restart policy restarts the container; with one worker less it would still look healthy.
    container = container_engine.start(bundle, options=["--env", f"FLEDGE_WORKERS={workers}"])
    statuses: list[int] = []

    def kill() -> None:
        time.sleep(1)
        # From the host: inside a container its first process ignores SIGKILL.
        lines = run(DOCKER, "top", container.name, "-o", "pid,args").stdout.splitlines()
        run("kill", "-KILL", next(line.split()[0] for line in lines if process in line))

    try:
        # Waits from before the exit: --rm removes the container and its status.
        run_in_threads(lambda: statuses.append(exit_status(container)), kill)
    finally:
        container.remove()
    assert statuses == [status]
