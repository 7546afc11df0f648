"""Shutdown under load, at each step of the start, and the exit of worker processes."""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from serving.server import shutdown
from serving.server.bentoml_compat import WORKER_MODULE
from tests.support.fork_server import STOP_SIGNALS, Signals
from tests.support.live_server import Live, free_port, get, launch, live, post
from tests.support.load_clients import CLIENTS, REFUSED, outcomes_around
from tests.support.tiny_bundle import photo, tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_stop_under_load(server: Live, sent: int) -> None:
    """Stop the service; what it has accepted is answered, and later connections are refused."""
    slow = photo(7, (1200, 900))  # to decode: the clients have requests in flight at the stop
    data = photo(1)
    expected = post(f"{server.url}/predict", data).content
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        interim = b""
        while b"\r\n\r\n" not in interim:  # a worker has the head and waits for the body
            interim += client.recv(1)
        assert interim.startswith(b"HTTP/1.1 100")
        before, after = outcomes_around(server.port, slow, lambda: server.process.send_signal(sent))
        assert server.process.poll() is None  # it waits for the upload
        client.sendall(data)
        response = b"".join(iter(lambda: client.recv(65536), b""))
    assert response.startswith(b"HTTP/1.1 200")
    assert response.endswith(expected)
    assert server.process.wait(30) == 0
    assert set(before) == {"200"}
    assert before["200"] > CLIENTS
    assert set(after) <= {"200", REFUSED}
    assert after[REFUSED] == CLIENTS
    output = server.log.read_text()
    assert re.search(rf"curl .*{server.url}/predict", output)
    assert not re.search(r"\[(ERROR|WARNING)\]|Traceback", output)
    # The scratch folder is removed.
    assert [path.name for path in server.log.parent.iterdir()] == [server.log.name]


@pytest.mark.parametrize("sent", STOP_SIGNALS, ids=lambda sent: sent.name)
def test_accepted_connections_are_answered_and_later_ones_refused(
    folder: Path, tmp_path: Path, sent: int
):
    with live(folder, tmp_path / "log") as server:
        check_stop_under_load(server, sent)


@pytest.mark.process
def test_a_worker_in_a_new_interpreter_stops_as_a_forked_one(folder: Path, tmp_path: Path):
    with live(folder, tmp_path / "log", new_interpreter=True) as server:
        check_stop_under_load(server, signal.SIGTERM)


@pytest.mark.process
@pytest.mark.parametrize("sent", STOP_SIGNALS, ids=lambda sent: sent.name)
def test_two_workers_stop_as_one(folder: Path, tmp_path: Path, sent: int):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (tmp_path / "run").mkdir()
    ignored = None if sent == signal.SIGHUP else signal.SIGHUP  # as under `nohup`
    env = {"FLEDGE_WORKERS": "2", "FLEDGE_SCRATCH": str(foreign)}
    with live(folder, tmp_path / "run/log", signals=Signals(ignored), **env) as server:
        # Once one worker is ready, all are: a worker loads before it accepts.
        assert {get(f"{server.url}/readyz").status_code for _ in range(20)} == {200}
        if ignored:
            server.process.send_signal(ignored)
        check_stop_under_load(server, sent)
    assert foreign.is_dir()


@pytest.mark.process
@pytest.mark.parametrize("orderly", [0, 1])
def test_a_killed_worker_ends_the_service(folder: Path, tmp_path: Path, orderly: int):
    """Also after the orderly exit of another worker, which ends nothing."""
    with live(folder, tmp_path / "log", FLEDGE_WORKERS="2") as server:
        running = server.workers()
        assert len(running) == 2
        for pid in running[:orderly]:
            os.kill(pid, signal.SIGTERM)
            until = time.monotonic() + 20
            while is_running(pid):
                assert time.monotonic() < until
                time.sleep(0.05)
            assert server.process.poll() is None
        os.kill(running[orderly], signal.SIGKILL)
        assert server.process.wait(30) == 1
    output = (tmp_path / "log").read_text()
    assert f"fledge: worker {running[orderly]} ended with signal 9" in output
    assert not any(map(psutil.pid_exists, running))
    assert not list(tmp_path.glob("fledge-*"))  # the scratch folder is removed


@pytest.mark.parametrize(
    ("code", "sent", "how"),
    [
        ("", signal.SIGKILL, "signal 9"),
        ("", signal.SIGSEGV, "signal 11"),
        ("raise SystemExit(3)", None, "exit status 3"),
        ("", signal.SIGTERM, None),
        ("", signal.SIGINT, None),
        ("raise SystemExit", None, None),
    ],
)
def test_only_a_crash_of_a_worker_stops_the_launcher(
    code: str,
    sent: int | None,
    how: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    kill, killed = os.kill, []
    monkeypatch.setattr(os, "kill", lambda *call: killed.append(call))
    default = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); print(1)"
    code = f"{default}; {code or 'time.sleep(60)'}"
    command = [sys.executable, "-S", "-u", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        worker.stdout.read(1)
        if sent is not None:
            kill(worker.pid, sent)
        failed = threading.Event()
        shutdown._wait_for_exit(worker.pid, failed)
        assert failed.is_set() == bool(how)
        assert killed == ([(os.getpid(), signal.SIGTERM)] if how else [])
        told = f"fledge: worker {worker.pid} ended with {how}; stopping the service\n"
        assert capsys.readouterr().err == (told if how else "")
        shutdown._wait_for_exit(worker.pid, failed)  # told once
        assert len(killed) == bool(how)


def test_the_watch_waits_for_each_worker_among_the_children_once(monkeypatch: pytest.MonkeyPatch):
    class End(Exception):
        pass

    found: queue.Queue[int] = queue.Queue()
    workers_now, scans = shutdown._workers, []

    def workers() -> list[int]:
        scans.append(1)
        if len(scans) > 3:
            raise End
        return list(workers_now())

    monkeypatch.setattr(shutdown, "_SCAN_SECONDS", 0.01)
    monkeypatch.setattr(shutdown, "_workers", workers)
    monkeypatch.setattr(shutdown, "_wait_for_exit", lambda pid, failed: found.put(pid))
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    children = [
        subprocess.Popen([*sleep, *more]) for more in ([WORKER_MODULE], [], [WORKER_MODULE])
    ]
    try:
        pids = {children[0].pid, children[2].pid}
        end = time.monotonic() + 20
        while set(workers_now()) != pids:  # until `exec` has given them their command lines
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(End):
            shutdown._watch(threading.Event())
        assert {found.get(timeout=20) for _ in pids} == pids
        assert found.empty()
    finally:
        for process in children:
            process.kill()
            process.wait()


@pytest.mark.parametrize("new_interpreter", [False, pytest.param(True, marks=pytest.mark.process)])
def test_a_single_worker_runs_in_the_main_process(
    folder: Path, tmp_path: Path, new_interpreter: bool
):
    with live(folder, tmp_path / "log", new_interpreter=new_interpreter) as server:
        assert psutil.Process(server.process.pid).children() == []
        metrics = get(f"{server.url}/metrics").text
        assert "\nprocess_resident_memory_bytes " in metrics
        assert "_created" not in metrics
        (scratch,) = tmp_path.glob("fledge-*")
        assert not [path for path in scratch.rglob("*") if path.is_file()]
        assert server.stop() == 0
    assert not scratch.exists()


PLACES = (
    "serving.server.single_process:_run_worker",
    "serving.server.bentoml_compat:run_worker",
    "serving.service",
    "uvicorn:Server.serve",
    "uvicorn:Server._serve",
    "uvicorn.lifespan.on:LifespanOn.startup",
    "serving.http.model_manager:ModelManager.start",
    "serving.http.model_manager:ModelManager.load",
    "serving.server.shutdown:GracefulShutdown.install",
    "uvicorn:Server.startup",
    "uvicorn:Server.main_loop",
)


@pytest.mark.parametrize("sent", STOP_SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize("at", PLACES)
def test_a_signal_at_any_step_of_the_start_ends_the_service_with_0(
    folder: Path, tmp_path: Path, sent: int, at: str
):
    process = launch(folder, free_port(), tmp_path / "log", signals=Signals(sent=sent, at=at))
    assert process.wait(30) == 0
    output = (tmp_path / "log").read_text()
    assert "curl" in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("fledge-*"))


@pytest.mark.parametrize("sent", STOP_SIGNALS, ids=lambda sent: sent.name)
def test_a_signal_during_the_imports_ends_the_service_with_0(
    folder: Path, tmp_path: Path, sent: int
):
    signals = Signals(sent=sent, at="bentoml._internal.configuration.containers")
    process = launch(folder, free_port(), tmp_path / "log", signals=signals, new_interpreter=True)
    assert process.wait(30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not list(tmp_path.glob("fledge-*"))


def test_an_ignored_sighup_does_not_stop_the_service(folder: Path, tmp_path: Path):
    with live(folder, tmp_path / "log", signals=Signals(ignored=signal.SIGHUP)) as server:
        status = Path(f"/proc/{server.process.pid}/status")
        if status.exists():
            (mask,) = re.findall(r"SigIgn:\t(\w+)", status.read_text())
            assert int(mask, 16) & (1 << (signal.SIGHUP - 1))
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert get(f"{server.url}/readyz").status_code == 200
        assert server.stop() == 0
        with pytest.raises(httpx.ConnectError):
            get(f"{server.url}/livez")
