"""TLS: the model's routes, handshakes within the limits, and files that can't be used."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.live_server import ROOT, free_port, launch
from tests.support.tiny_bundle import photo, tiny_bundle

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    certificate = tmp_path_factory.mktemp("tls") / "cert.pem"
    key = certificate.with_name("key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@contextmanager
def https(folder: Path, log: Path, pair: tuple[Path, Path], **env: str) -> Iterator[httpx.Client]:
    port = free_port()
    files = {"FLEDGE_TLS_CERT": str(pair[0]), "FLEDGE_TLS_KEY": str(pair[1])}
    process = launch(folder, port, log, **files, **env)
    try:
        with ready(port, pair[0], process, log) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@contextmanager
def ready(port: int, certificate: Path, process, log: Path) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=str(certificate))
    url = f"https://localhost:{port}"
    with httpx.Client(base_url=url, verify=context, trust_env=False, timeout=30) as client:
        until = time.monotonic() + 60
        while True:
            try:
                if client.get("/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(log.read_text())
        yield client


def check_routes(client: httpx.Client) -> None:
    data = photo(1, (700, 700))
    for _ in range(3):
        assert client.post("/predict", content=data).status_code == 200
    assert client.post("/predict", files=[("image", data)]).status_code == 200
    assert client.get("/model").status_code == 200
    assert client.get("/metrics").status_code == 200
    origin = {"Origin": f"https://localhost:{client.base_url.port}"}
    assert client.post("/predict", content=data, headers=origin).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{client.base_url.port}/readyz", trust_env=False)


def test_the_service_speaks_tls(folder: Path, tmp_path: Path, pair):
    log = tmp_path / "log"
    with https(folder, log, pair) as client:
        check_routes(client)
    assert f"https://127.0.0.1:{client.base_url.port}" in log.read_text()
    assert "Traceback" not in log.read_text()


REFUSED = 'fledge_connections_refused_total{reason="connection-limit"}'


def test_silent_handshakes_make_room(folder: Path, tmp_path: Path, pair):
    service = https(folder, tmp_path / "log", pair, FLEDGE_MAX_CONNECTIONS="20")
    with service as client, ExitStack() as stack:
        for number in range(60):
            one = socket.create_connection(("127.0.0.1", client.base_url.port))
            stack.enter_context(closing(one))
            if number % 2:
                one.sendall(b"\x16\x03\x01\x02\x00\x01")
        started = time.monotonic()
        assert client.get("/readyz").status_code == 200
        assert time.monotonic() - started < 2
        # Its connection was open before those that are silent, and may be answered before them.
        while REFUSED not in client.get("/metrics").text and time.monotonic() < started + 10:
            time.sleep(0.02)
        assert REFUSED in client.get("/metrics").text


@pytest.mark.process
def test_a_silent_handshake_is_ended_after_ten_seconds(folder: Path, tmp_path: Path, pair):
    with https(folder, tmp_path / "log", pair) as client:
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=30) as silent:
            assert silent.recv(100) == b""
        assert 8 < time.monotonic() - started < 14


@pytest.mark.process
def test_two_workers_speak_tls(folder: Path, tmp_path: Path, pair):
    with https(folder, tmp_path / "log", pair, FLEDGE_WORKERS="2") as client:
        check_routes(client)


@pytest.mark.process
def test_the_tls_of_bentoml_serve_is_in_effect_on_all_routes(folder: Path, tmp_path: Path, pair):
    certificate, key = pair
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:ImageClassifier"]
    options = f"services.ssl.enabled=true services.ssl.certfile={certificate}"
    env = {
        **os.environ,
        "FLEDGE_BUNDLE": str(folder),
        "BENTOML_HOME": str(tmp_path / "home"),
        "BENTOML_CONFIG_OPTIONS": f"{options} services.ssl.keyfile={key} services.ssl.ciphers=HIGH",
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--working-dir", str(ROOT)],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        with ready(port, certificate, process, log) as client:
            check_routes(client)
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(
    "kind", ["missing", "no certificate", "other key", "key alone", "encrypted"]
)
def test_files_that_cannot_be_used_are_one_line(folder: Path, tmp_path: Path, pair, kind: str):
    certificate, key = pair
    text = tmp_path / "text.pem"
    text.write_text("not a certificate")
    other = tmp_path / "other.pem"
    make = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    if kind == "encrypted":
        make += ["-aes256", "-pass", "pass:secret"]
    subprocess.run([*make, "-out", str(other)], check=True, capture_output=True)
    files = {
        "missing": (tmp_path / "missing.pem", key),
        "no certificate": (text, key),
        "other key": (certificate, other),
        "key alone": ("", key),
        "encrypted": (certificate, other),
    }[kind]
    log = tmp_path / "log"
    env = {"FLEDGE_TLS_CERT": str(files[0]), "FLEDGE_TLS_KEY": str(files[1])}
    assert launch(folder, free_port(), log, **env).wait(30) == 2
    output = log.read_text()
    assert output.count("\n") == 1
    assert "FLEDGE_TLS_CERT" in output
