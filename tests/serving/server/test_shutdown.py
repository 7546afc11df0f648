"""Shutdown under load, and the exit of worker processes."""

import os
import re
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.live_server import free_port, get, launch, live
from tests.support.load_clients import CLIENTS, REFUSED, outcomes_around
from tests.support.tiny_bundle import photo, tiny_bundle


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_accepted_connections_are_answered_and_later_ones_refused(
    tmp_path: Path, workers: int, sent: int
):
    slow = photo(7, (2000, 1500))  # to decode: every client has a request in flight at the stop
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", FLEDGE_WORKERS=str(workers)) as server:
        before, after = outcomes_around(
            server.port, slow, lambda: server.process.send_signal(sent), before=1.0
        )
        assert server.process.wait(30) == 0
    assert set(before) == {"200"}
    assert before["200"] > CLIENTS
    assert set(after) <= {"200", REFUSED}
    assert after[REFUSED] == CLIENTS
    assert not re.search(r"\[(ERROR|WARNING)\]|Traceback", (tmp_path / "log").read_text())


def test_a_killed_worker_ends_the_service(tmp_path: Path):
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", FLEDGE_WORKERS="2") as server:
        running = server.workers()
        assert len(running) == 2
        os.kill(running[0], signal.SIGKILL)
        assert server.process.wait(30) == 1
    assert f"fledge: worker {running[0]} ended with signal 9" in (tmp_path / "log").read_text()
    assert not any(map(psutil.pid_exists, running))
    assert not list(tmp_path.glob("fledge-*"))  # the scratch folder is removed


def test_a_single_worker_runs_in_the_main_process(tmp_path: Path):
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log") as server:
        assert psutil.Process(server.process.pid).children() == []
        metrics = get(f"{server.url}/metrics").text
        assert "\nprocess_resident_memory_bytes " in metrics
        assert "_created" not in metrics
        (scratch,) = tmp_path.glob("fledge-*")
        assert not [path for path in scratch.rglob("*") if path.is_file()]
        assert server.stop() == 0
    assert not scratch.exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("wait", [0.1, 0.4, 0.8])
def test_a_signal_during_the_start_ends_the_service_with_0(tmp_path: Path, sent: int, wait: float):
    folder, log = tiny_bundle(tmp_path / "bundle"), tmp_path / "log"
    process = launch(folder, free_port(), log)
    until = time.monotonic() + 60
    while "curl" not in log.read_text():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(sent)
    assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()
    assert not list(tmp_path.glob("fledge-*"))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_stops_the_service(tmp_path: Path, workers: str):
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", FLEDGE_WORKERS=workers) as server:
        assert server.stop(signal.SIGHUP) == 0
        with pytest.raises(httpx.ConnectError):
            get(f"{server.url}/livez")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_ignored_sighup_does_not_stop_the_service(tmp_path: Path, workers: str):
    folder = tiny_bundle(tmp_path / "bundle")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does; inherited
    try:
        with live(folder, tmp_path / "log", FLEDGE_WORKERS=workers) as server:
            server.process.send_signal(signal.SIGHUP)
            time.sleep(1)
            assert get(f"{server.url}/readyz").status_code == 200
            assert server.stop() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_crash_after_an_orderly_exit_is_noticed(tmp_path: Path):
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", FLEDGE_WORKERS="2") as server:
        first, second = server.workers()
        os.kill(first, signal.SIGTERM)
        until = time.monotonic() + 20
        while is_running(first):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert server.process.poll() is None
        os.kill(second, signal.SIGKILL)
        assert server.process.wait(30) == 1
    assert f"worker {second} ended with signal 9" in (tmp_path / "log").read_text()
