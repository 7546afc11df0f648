"""The law of odd bodies, however the service is started, with keys and for pages of other sites."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support import live_server
from tests.support.fork_server import ROOT
from tests.support.live_server import free_port, live
from tests.support.tiny_bundle import photo, tiny_bundle

KEY = "secret-key"
ORIGIN = "https://app.example"
PHOTO = photo(1)
pytestmark = pytest.mark.process


@contextmanager
def fledge_serve(folder: Path, tmp_path: Path, **env: str) -> Iterator[str]:
    with live(folder, tmp_path / "log", **env) as server:
        yield server.url


@contextmanager
def bentoml_serve(folder: Path, tmp_path: Path, **env: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:ImageClassifier"]
    own = {"FLEDGE_BUNDLE": str(folder), "BENTOML_HOME": str(tmp_path / "home"), **env}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--working-dir", str(ROOT)],
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://localhost:{port}"
    try:
        for _ in range(900):
            with contextlib.suppress(httpx.TransportError):
                if live_server.get(f"{url}/readyz").status_code == 200:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize(
    ("start", "env"),
    [(fledge_serve, {"FLEDGE_WORKERS": "2"}), (bentoml_serve, {})],
    ids=["two workers", "bentoml serve"],
)
def test_odd_bodies_have_the_same_answers(start, env: dict[str, str], tmp_path: Path):
    folder = tiny_bundle(tmp_path / "bundle")
    (tmp_path / "keys").write_text(KEY)
    env |= {"FLEDGE_API_KEYS_FILE": str(tmp_path / "keys"), "FLEDGE_CORS_ORIGINS": ORIGIN}
    with start(folder, tmp_path, **env) as url, live_server.client(url) as client:
        own = {"authorization": f"Bearer {KEY}", "origin": ORIGIN}
        text = base64.b64encode(PHOTO).decode()
        assert client.post("/predict", json={"image": text}).status_code == 401
        for _ in range(6):  # of both workers
            raw = client.post("/predict", content=PHOTO, headers=own)
            told = client.post("/predict", json={"image": text}, headers=own)
            assert told.json() == raw.json()
            assert told.headers["access-control-allow-origin"] == ORIGIN
            both = client.post("/predict/batch", json={"images": [text] * 2}, headers=own)
            assert both.json() == [raw.json()] * 2

            page = client.post("/predict", content=b"<html></html>", headers=own)
            line = f"curl -H 'Authorization: Bearer KEY' --data-binary @photo.jpg {url}/predict"
            assert page.status_code == 415
            assert page.json()["detail"].endswith(
                f": this is a web page (HTML); send the file itself: {line}"
            )
            assert page.headers["access-control-allow-origin"] == ORIGIN
            assert KEY not in page.text

            coded = client.post(
                "/predict", content=b"x", headers={**own, "content-encoding": "gzip"}
            )
            assert coded.status_code == 415
            assert coded.headers["accept-encoding"] == "identity"
            assert coded.headers["access-control-allow-origin"] == ORIGIN

            head = b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\n"
            body = b"A preamble.\r\n" + head + PHOTO + b"\r\n--b--\r\nAn epilogue."
            form = {**own, "content-type": "multipart/form-data; boundary=b"}
            assert client.post("/predict", content=body, headers=form).json() == raw.json()
        preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
        allowed = client.options("/predict", headers=preflight)
        assert "content-type" in allowed.headers["access-control-allow-headers"]
    assert "Traceback" not in (tmp_path / "log").read_text()
