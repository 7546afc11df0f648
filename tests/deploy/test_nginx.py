"""deploy/nginx.conf in front of two real services, as in compose.yaml."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
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


class Replica:
    """A stand-in for a replica: reads each request, then answers with `status`, or ends at 0.

    Attributes:
        requests: Number of requests that were read to the end of the body.
    """

    def __init__(self, status: int) -> None:
        self.status, self.requests = status, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            head = list(iter(lines.readline, b"\r\n"))
            lengths = [line for line in head if line.lower().startswith(b"content-length:")]
            lines.read(int(lengths[0].split()[1]) if lengths else 0)
            if head[0].startswith(b"GET"):  # `nginx` waits until it answers
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                return
            self.requests += 1
            if self.status:
                reply = f"HTTP/1.1 {self.status} X\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno"
                connection.sendall(reply.encode())


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
        replicas[0].process.wait(30)  # a POST that a replica has received is not repeated
        for seed in range(10):
            assert post(f"{url}/predict", photo(seed)).status_code == 200
        assert wait_for_shares(20) == [shares[0], shares[1] + 10]


def test_answers_pass_unchanged(replicas: list[Live], tmp_path: Path) -> None:
    with nginx(tmp_path, [replicas[0].port]) as url:
        response = post(f"{url}/predict", photo(1), {"x-request-id": "mine-1"})
        assert response.json() == post(f"{replicas[0].url}/predict", photo(1)).json()
        assert response.headers["x-request-id"] == "mine-1"
        assert len(post(f"{url}/predict", photo(1)).headers["x-request-id"]) == 32
        cases = [(b"no image", "not-an-image"), (bytes(21_000_000), "too-large")]
        for data, code in [*cases, (bytes(23_000_000), "too-large")]:  # the last by nginx itself
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


@pytest.mark.parametrize("size", [1000, 200_000])
def test_a_post_that_ended_a_replica_is_not_repeated(tmp_path: Path, size: int) -> None:
    dying = [Replica(0), Replica(0)]
    with nginx(tmp_path, [one.port for one in dying]) as url:
        assert post(f"{url}/predict", bytes(size)).status_code == 502
    assert sum(one.requests for one in dying) == 1


@pytest.mark.parametrize("size", [1000, 200_000])
@pytest.mark.parametrize("status", [429, 503])
def test_a_post_that_was_refused_for_want_of_room_is_sent_to_another_replica(
    tmp_path: Path, status: int, size: int
) -> None:
    full, other = Replica(status), Replica(200)
    with nginx(tmp_path, [full.port, other.port]) as url:
        assert {post(f"{url}/predict", bytes(size)).status_code for _ in range(6)} == {200}
        other.status = status
        refused = post(f"{url}/predict", bytes(size))
        assert (refused.status_code, refused.headers["retry-after"]) == (status, "7")


def test_a_replica_that_refuses_connections_is_passed_over(tmp_path: Path) -> None:
    other = Replica(200)
    with nginx(tmp_path, [free_port(), other.port]) as url:
        for size in (1000, 200_000):
            assert {post(f"{url}/predict", bytes(size)).status_code for _ in range(4)} == {200}


def test_too_many_requests_of_one_address_are_refused(tmp_path: Path) -> None:
    with nginx(tmp_path, [Replica(200).port]) as url, ThreadPoolExecutor(8) as threads:
        statuses = Counter(
            threads.map(lambda _: post(f"{url}/predict", b"x").status_code, range(400))
        )
        assert set(statuses) == {200, 429}
        assert statuses[200] >= 100
        while (refused := post(f"{url}/predict", b"x")).status_code == 200:
            pass
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["code"] == "rate-limited"


@pytest.mark.process
def test_uploads_of_one_address_do_not_take_the_connections_of_others(tmp_path: Path) -> None:
    """More slow large bodies than one address may begin; each takes two connections of nginx."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n"
    with nginx(tmp_path, [Replica(200).port]) as url, ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(300)
        ]
        for one in slow:
            one.sendall(head + b"x")
        time.sleep(1)
        open_still = 0
        for one in slow:
            one.setblocking(False)
            try:
                answer = one.recv(100)
                assert not answer or b" 429 " in answer.splitlines()[0]
            except BlockingIOError:
                open_still += 1
        # 40 at once, and 10 for each of the seconds that this took.
        assert 40 <= open_still < 150
        assert httpx.get(f"{url}/readyz", headers={"Host": "localhost"}).status_code == 200


def test_the_access_log_has_addresses_and_the_replicas_get_them(
    replicas: list[Live], tmp_path: Path
) -> None:
    with nginx(tmp_path, [replicas[0].port]) as url:
        post(f"{url}/predict", photo(1), {"x-request-id": "mine-2", "x-forwarded-for": "6.6.6.6"})
    lines = [json.loads(line) for line in (tmp_path / "nginx.log").read_text().splitlines()]
    (line,) = [line for line in lines if line["request_id"] == "mine-2"]
    assert (line["client"], line["status"], line["path"]) == ("127.0.0.1", 200, "/predict")
    assert "6.6.6.6" not in replicas[0].log.read_text()


def buffered_bodies(tmp_path: Path) -> list[int]:
    """Sizes of the files, already without a name, in which nginx keeps bodies."""
    master = psutil.Process(int((tmp_path / "nginx.pid").read_text()))
    opened = [
        file
        for worker in master.children()
        for file in Path(f"/proc/{worker.pid}/fd").iterdir()
        if os.readlink(file).startswith(f"{tmp_path}/body/")
    ]
    return [file.stat().st_size for file in opened]


@pytest.mark.process
def test_slow_uploads_stop_nobody_and_fill_nothing(replicas: list[Live], tmp_path: Path) -> None:
    """More slow uploads of the largest size than nginx buffers, and honest callers beside them."""
    honest, large = photo(1), photo(2, (4000, 3000))
    assert len(large) > 100_000
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n"
    stop = threading.Event()

    def send(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(head + bytes(5_000_000))
            while not stop.wait(0.5):
                try:
                    slow.sendall(b"x")
                except OSError:  # closed by the service
                    return

    with nginx(tmp_path, [one.port for one in replicas]) as url:
        port = int(url.rpartition(":")[2])
        uploads = [threading.Thread(target=send, args=(port,)) for _ in range(12)]
        for upload in uploads:
            upload.start()
        try:
            time.sleep(2)
            for data in (honest, large) * 4:
                start = time.monotonic()
                assert post(f"{url}/predict", data).status_code == 200
                assert time.monotonic() - start < 3
            assert len(buffered := buffered_bodies(tmp_path)) == 4
            assert sum(buffered) > 10_000_000
        finally:
            stop.set()
            for upload in uploads:
                upload.join()
