"""A hostile bundle does not stop a running service, and the next good bundle is served."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from serving.bundle import storage
from tests.hostile.graphs import allocate, fifo, in_place_of, loop, with_graph
from tests.support.live_server import Live, free_port, get, launch, live, post
from tests.support.tiny_bundle import photo, tiny_bundle


def replace(folder: Path, other: Path, change: Callable[[Path], None] = lambda _: None) -> None:
    """Publish the bundle `other` in `folder`, as an export would, after a change of its payload."""
    manifest = storage.read(other).manifest
    change(other / manifest.version)
    in_place_of(folder, other, manifest)


def version(folder: Path) -> str:
    return f"tiny:{storage.read(folder).manifest.version}"


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Wait, and return the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.05)
    return time.monotonic() - started


def ready(server: Live) -> dict[str, str]:
    return dict(get(f"{server.url}/readyz").json())


def answers_within_a_second(server: Live, model: str) -> None:
    started = time.monotonic()
    answer = post(f"{server.url}/predict", photo(1))
    assert answer.status_code == 200
    assert answer.json()["model"] == model
    assert time.monotonic() - started < 1


@pytest.mark.process
def test_a_running_service_refuses_each_hostile_bundle_and_takes_the_next_good_one(
    tmp_path: Path,
) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    good = version(folder)
    with live(folder, tmp_path / "log", FLEDGE_LOAD_TIMEOUT="3") as server:
        answers_within_a_second(server, good)
        memory = psutil.Process(server.process.pid).memory_info().rss
        wrong: list[tuple[str, Callable[[], None]]] = [
            ("not loaded within 3 s", lambda: replace(folder, graph("loop", loop(2**62)))),
            ("can't be run", lambda: replace(folder, graph("many", allocate(2**31)))),
            ("regular file", lambda: replace(folder, plain("fifo"), graph_fifo)),
            ("regular file", lambda: fifo(folder / storage.MANIFEST)),
            ("regular file", lambda: link(folder / storage.MANIFEST)),
            ("larger than", lambda: (folder / storage.SIGNATURE).write_bytes(b"a" * 2**26)),
        ]

        def graph(name: str, change: Callable[[object], None]) -> Path:
            return with_graph(tmp_path / name, change, seed=20)

        def plain(name: str) -> Path:
            return tiny_bundle(tmp_path / name, seed=30)

        for number, (reason, publish) in enumerate(wrong):
            publish()
            if reason == "larger than":
                (folder / storage.MANIFEST).touch()
            took = wait_for(lambda reason=reason: reason in ready(server).get("refused", ""))
            assert took < 8, reason
            refusal = ready(server)["refused"]
            assert str(tmp_path) not in refusal
            assert "ONNXRuntime" not in refusal
            assert "\n" not in refusal
            answers_within_a_second(server, good)
            for name in (storage.MANIFEST, storage.CHECKSUM, storage.SIGNATURE):
                path = folder / name
                if path.is_symlink() or not path.is_file() or path.stat().st_size > 2**20:
                    path.unlink(missing_ok=True)
            in_place_of(folder, tiny_bundle(tmp_path / f"good{number}", seed=1 + number % 2))
            good = version(folder)
            assert wait_for(lambda: ready(server)["model"] == good) < 8, reason  # noqa: B023
            assert "refused" not in ready(server)
            answers_within_a_second(server, good)
        assert psutil.Process(server.process.pid).memory_info().rss < memory + 100e6
        assert not psutil.Process(server.process.pid).children()
        log = (tmp_path / "log").read_text()
        assert "ONNXRuntime" in log  # the log has what callers don't get
        assert "Traceback" not in log


def graph_fifo(payload: Path) -> None:
    fifo(payload / "model.onnx")


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.process
def test_a_service_that_starts_with_a_hostile_bundle_takes_the_next_good_one(
    tmp_path: Path,
) -> None:
    folder = with_graph(tmp_path / "bundle", loop(2**62))
    port = free_port()
    process = launch(folder, port, tmp_path / "log", FLEDGE_LOAD_TIMEOUT="300")
    server = Live(f"http://127.0.0.1:{port}", port, process, tmp_path / "log")
    try:

        def up() -> bool:
            try:
                return get(f"{server.url}/readyz").status_code == 503
            except httpx.TransportError:
                return False

        wait_for(up)
        time.sleep(6)  # the load is stopped for a newer bundle after 5 s
        in_place_of(folder, tiny_bundle(tmp_path / "good", seed=1))
        assert wait_for(lambda: get(f"{server.url}/readyz").status_code == 200) < 10
        answers_within_a_second(server, version(folder))
    finally:
        server.stop()


@pytest.mark.process
def test_a_service_that_is_stopped_while_it_loads_ends_the_child(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", FLEDGE_LOAD_TIMEOUT="300") as server:
        in_place_of(folder, with_graph(tmp_path / "loop", loop(2**62)))
        me = psutil.Process(server.process.pid)
        wait_for(lambda: bool(me.children()))
        (child,) = me.children()
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 10
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5)


@pytest.mark.process
def test_a_service_that_is_killed_while_it_loads_leaves_no_child(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", FLEDGE_LOAD_TIMEOUT="300") as server:
        in_place_of(folder, with_graph(tmp_path / "loop", loop(2**62)))
        me = psutil.Process(server.process.pid)
        wait_for(lambda: bool(me.children()))
        time.sleep(1)
        (child,) = me.children()
        me.kill()
        server.process.wait(10)
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5)
