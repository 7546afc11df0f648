"""deploy/nginx.conf in front of two real services, as in compose.yaml."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from serving.bundle import storage
from tests.support.deploy_tools import find_program, output_of
from tests.support.live_server import Live, free_port, get, launch, live, post
from tests.support.tiny_bundle import photo, tiny_bundle

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"


def local_config(tmp_path: Path, port: int, servers: list[int]) -> Path:
    """The configuration with local paths and ports, and a list in place of the engine's DNS."""
    listed = "".join(f"server 127.0.0.1:{one} max_fails=0; " for one in servers)
    changes = {
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "http://fledge:3000;": "http://fledge;",
        "http {\n": f"http {{\n  upstream fledge {{ {listed}}}\n",
    }
    text = CONFIG.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = tmp_path / "nginx.conf"
    file.write_text(text.replace("/tmp/", f"{tmp_path}/"))
    return file


@contextmanager
def nginx(tmp_path: Path, servers: list[int]) -> Iterator[str]:
    port = free_port()
    file = local_config(tmp_path, port, servers)
    command = [find_program("nginx"), "-c", str(file), "-e", "stderr"]
    command += ["-g", "daemon off; user root;"]
    with (tmp_path / "nginx.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                get(f"http://127.0.0.1:{port}/livez")
                break
            except httpx.TransportError:
                assert process.poll() is None, (tmp_path / "nginx.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Live]]:
    folder = tiny_bundle(tmp_path / "bundle")
    with ExitStack() as stack:
        yield [stack.enter_context(live(folder, tmp_path / f"log-{i}")) for i in range(2)]


def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "nginx.conf"
    file.write_text(CONFIG.read_text().replace("/tmp/", f"{tmp_path}/"))
    output = output_of(find_program("nginx"), "-t", "-c", str(file), "-e", "stderr")
    assert "test is successful" in output


def test_requests_are_spread_and_survive_a_killed_replica(
    replicas: list[Live], tmp_path: Path
) -> None:
    def wait_for_shares(total: int) -> list[int]:
        """Requests per replica, once all are logged; a line is written after its answer."""
        deadline = time.monotonic() + 30
        while True:
            line = '"path": "/predict", "status": 200'
            shares = [one.log.read_text().count(line) for one in replicas]
            if sum(shares) >= total or time.monotonic() > deadline:
                return shares
            time.sleep(0.02)

    with nginx(tmp_path, [one.port for one in replicas]) as url:
        for seed in range(10):
            assert post(f"{url}/predict", photo(seed)).status_code == 200
        # Each process of nginx takes turns by itself, so the shares are not fixed.
        shares = wait_for_shares(10)
        assert sum(shares) == 10
        assert min(shares) > 0
        (worker,) = replicas[0].workers()
        os.kill(worker, signal.SIGKILL)
        for seed in range(10):
            assert post(f"{url}/predict", photo(seed)).status_code == 200
        assert wait_for_shares(20) == [shares[0], shares[1] + 10]


def test_answers_pass_unchanged(replicas: list[Live], tmp_path: Path) -> None:
    with nginx(tmp_path, [replicas[0].port]) as url:
        response = post(f"{url}/predict", photo(1), {"x-request-id": "mine-1"})
        assert response.json() == post(f"{replicas[0].url}/predict", photo(1)).json()
        assert response.headers["x-request-id"] == "mine-1"
        assert len(post(f"{url}/predict", photo(1)).headers["x-request-id"]) == 32
        for data, code in ((b"no image", "not-an-image"), (bytes(21_000_000), "too-large")):
            refused = post(f"{url}/predict", data)
            assert refused.headers["content-type"] == "application/problem+json"
            assert refused.json()["code"] == code
        assert get(f"{url}/metrics").status_code == 404
        assert get(f"{url}/readyz").status_code == 200
        assert get(f"{url}/").headers["content-type"].startswith("text/html")


def test_a_replica_that_is_down_or_not_ready_gets_no_requests(
    replicas: list[Live], tmp_path: Path
) -> None:
    folder = tiny_bundle(tmp_path / "wrong")
    golden = [dict(item) for item in storage.read(folder).manifest.golden]
    golden[0]["probabilities"] = {"fp32": [0.2, 0.3, 0.5]}  # so it is never ready
    manifest = storage.read(folder).manifest.model_copy(update={"golden": tuple(golden)})
    storage.publish(manifest, folder)
    port = free_port()
    process = launch(folder, port, tmp_path / "wrong.log")
    try:
        deadline = time.monotonic() + 60
        while "off by" not in (tmp_path / "wrong.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert post(f"http://127.0.0.1:{port}/predict", photo(1)).status_code == 503
        for other in (port, free_port()):
            with nginx(tmp_path, [other, replicas[0].port]) as url:
                for seed in range(6):
                    assert post(f"{url}/predict", photo(seed)).status_code == 200
    finally:
        process.terminate()
        process.wait(30)
