"""`fledge serve`: refusals before the start, addresses, start, answers and stop."""

import atexit
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import pytest

from serving.bundle import storage
from serving.errors import OptionError
from serving.inference.runtime import _why_not
from serving.server.launch import (
    SCRATCH,
    bind,
    client_url,
    make_paths_absolute,
    remove_scratch_at_exit,
    serve,
)
from tests.support.live_server import ROOT, free_port, get, launch, live, post
from tests.support.tiny_bundle import photo, tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def refused(folder: Path, tmp_path: Path, port: int | None = None, **env: str) -> tuple[int, str]:
    log = tmp_path / "log"
    status = launch(folder, port or free_port(), log, **env).wait(60)
    return status, log.read_text()


def test_a_missing_bundle_is_one_line_and_status_78(tmp_path: Path):
    status, output = refused(tmp_path / "nothing", tmp_path)
    assert status == 78
    assert output.count("\n") == 1
    assert "manifest.json is missing" in output


def test_a_changed_byte_in_the_bundle_is_status_78(tmp_path: Path):
    folder = tiny_bundle(tmp_path / "bundle")
    graph = storage.read(folder).graph("fp32")
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    status, output = refused(folder, tmp_path)
    assert status == 78
    assert "model.onnx was changed" in output


def test_a_port_in_use_is_reported(folder: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, output = refused(folder, tmp_path, port)
    assert status == 2
    assert f"--port {port}" in output
    assert output.count("\n") == 1


def test_wrong_settings_are_reported_together(folder: Path, tmp_path: Path):
    status, output = refused(folder, tmp_path, FLEDGE_DEVICE="tpu", FLEDGE_DEADLINE="soon")
    assert status == 2
    assert "FLEDGE_DEVICE" in output
    assert "FLEDGE_DEADLINE" in output


@pytest.mark.parametrize(("env", "status"), [({}, 78), ({"FLEDGE_MAX_QUEUE": "x"}, 2)])
def test_bentoml_serve_refuses_what_fledge_serve_refuses(
    tmp_path: Path, env: dict[str, str], status: int
):
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:ImageClassifier"]
    done = subprocess.run(
        [*command, "--port", str(free_port()), "--working-dir", str(ROOT)],
        cwd=ROOT,
        env={
            "FLEDGE_BUNDLE": str(tmp_path / "no"),
            "BENTOML_HOME": str(tmp_path / "home"),
            "BENTOML_DO_NOT_TRACK": "True",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "fledge: " in done.stderr


@pytest.mark.skipif(_why_not("cuda") is None, reason="this machine has a GPU")
def test_a_missing_gpu_is_reported_before_the_address(folder: Path, tmp_path: Path):
    status, output = refused(folder, tmp_path, FLEDGE_DEVICE="cuda")
    assert status == 2
    assert output.startswith("device = cuda: ")
    assert output.count("\n") == 1


def test_unsupported_torchscript_settings_are_refused(folder: Path, tmp_path: Path):
    status, output = refused(
        folder, tmp_path, FLEDGE_RUNTIME="torchscript", FLEDGE_DEVICE="tensorrt"
    )
    assert (status, output.count("\n")) == (2, 1)
    assert "answers in fp32, on cpu or cuda" in output
    status, output = refused(folder, tmp_path, FLEDGE_RUNTIME="torchscript")
    assert (status, output.count("\n")) == (78, 1)
    assert "has no TorchScript graph" in output


def test_an_unknown_runtime_is_refused(folder: Path, tmp_path: Path):
    status, output = refused(folder, tmp_path, FLEDGE_RUNTIME="tflite")
    assert status == 2
    assert "FLEDGE_RUNTIME = 'tflite': use onnx, torchscript" in output


def test_only_the_scratch_folder_of_this_process_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    registered: list[object] = []
    monkeypatch.setattr(atexit, "register", lambda *call, **_: registered.append(call[1]))
    for foreign in ("", str(tmp_path), f"{os.getpid() + 1}:{tmp_path}", f":{tmp_path}"):
        remove_scratch_at_exit({SCRATCH: foreign})
    assert registered == []
    remove_scratch_at_exit({SCRATCH: f"{os.getpid()}:{tmp_path}"})
    assert registered == [str(tmp_path)]


def test_several_workers_replace_this_process_by_bentomls_launcher(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Replaced(Exception):
        pass

    def execve(*arguments: object) -> None:
        raise Replaced(*arguments)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(SCRATCH, f"{os.getpid()}:/home")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(Replaced) as caught:
        serve(Path(folder.name), port=free_port(), workers=2)
    _, command, env = caught.value.args
    assert command[1] == "-P"  # modules must not come from the current folder
    assert env["FLEDGE_BUNDLE"] == str(folder)
    pid, _, scratch = env[SCRATCH].partition(":")
    assert pid == str(os.getpid())
    assert Path(scratch).parent == tmp_path


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    env = {"FLEDGE_BUNDLE": "b", "FLEDGE_API_KEYS_FILE": "keys"}
    make_paths_absolute(env)
    assert env == {
        "FLEDGE_BUNDLE": str(tmp_path / "b"),
        "FLEDGE_API_KEYS_FILE": str(tmp_path / "keys"),
    }


def test_bind_listens_on_the_given_host_and_port_or_names_the_wrong_option():
    port = free_port()
    for host, address in (("localhost", ("127.0.0.1", "::1")), ("0.0.0.0", ("0.0.0.0",))):
        with bind(host, port) as listener:
            assert listener.getsockname()[0] in address
    with pytest.raises(OptionError, match="no address of this machine"):
        bind("192.0.2.1", port)
    for host, wrong in (("no.such.host.invalid", port), ("127.0.0.1", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(OptionError, match=r"--(host|port)"):
            bind(host, wrong)
    with bind("::", port) as listener:  # IPv4 too, if that is the default of the system
        with socket.socket(socket.AF_INET6) as plain:
            usual = plain.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == usual


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("10.1.2.3", "http://10.1.2.3:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fd00::5", "http://[fd00::5]:80"),
    ],
)
def test_the_printed_url_answers(address: str, url: str):
    assert client_url(address, 80) == url


def test_a_bundle_with_wrong_golden_answers_is_not_served(tmp_path: Path):
    folder = tiny_bundle(tmp_path / "bundle")
    golden = [dict(item) for item in storage.read(folder).manifest.golden]
    golden[0]["probabilities"] = {"fp32": [0.2, 0.3, 0.5]}
    manifest = storage.read(folder).manifest.model_copy(update={"golden": tuple(golden)})
    storage.publish(manifest, folder)
    port = free_port()
    process = launch(folder, port, tmp_path / "log")
    try:
        ready = _first(port, "/readyz", "off by")
        assert ready.status_code == 503
        assert ready.json()["code"] == "not-ready"
        assert str(tmp_path) not in ready.text
        end = time.monotonic() + 10  # a thread writes the log
        while str(tmp_path) not in (tmp_path / "log").read_text() and time.monotonic() < end:
            time.sleep(0.02)
        assert str(tmp_path) in (tmp_path / "log").read_text()
        refused = post(f"http://127.0.0.1:{port}/predict", photo(1))
        assert refused.status_code == 503
        assert get(f"http://127.0.0.1:{port}/livez").status_code == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0


def _first(port: int, path: str, text: str) -> httpx.Response:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            response = get(f"http://127.0.0.1:{port}{path}")
        except httpx.TransportError:
            pass
        else:
            if text in response.text:
                return response
        time.sleep(0.05)
    raise AssertionError(f"{path} never answered {text!r}")


def test_a_key_is_required_where_keys_are_set(folder: Path, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    with live(folder, tmp_path / "log", FLEDGE_API_KEYS_FILE=str(keys)) as server:
        url = f"{server.url}/predict"
        for header in (None, "Bearer wrong", "Basic first-key", "Bearer", "first-key"):
            headers = {"authorization": header} if header is not None else {}
            response = post(url, photo(1), headers)
            assert response.status_code == 401, header
            assert response.json()["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("first-key", "second-key"):
            headers = {"authorization": f"Bearer {key}"}
            assert post(url, photo(1), headers).status_code == 200
        assert get(f"{server.url}/model").status_code == 401
        assert get(f"{server.url}/livez").status_code == 200
        # A body far beyond the limit: the client still receives the response.
        assert post_large(url, 30_000_000, {}) == (401, "unauthorized")
        assert post_large(url, 30_000_000, {"Authorization": "Bearer first-key"}) == (
            413,
            "too-large",
        )
    output = (tmp_path / "log").read_text()
    assert re.search(rf"curl .* -H .Authorization: Bearer KEY. {server.url}/predict", output)


def post_large(url: str, size: int, headers: dict[str, str]) -> tuple[int, str]:
    """Status and code that a client gets that sends the whole body before it reads."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data=bytes(size), headers=headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(request, timeout=60)
    return caught.value.code, json.loads(caught.value.read())["code"]
