"""Containers with a limit of memory: the worst pictures don't end one, too little is refused."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.imaging import cost
from tests.hostile.images import WORST
from tests.support import container_engine
from tests.support.container_engine import DOCKER, IMAGE, Container, make_readable, run, run_to_end
from tests.support.tiny_bundle import photo, tiny_bundle

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("build_seconds")]

LIMIT = 2**30
ONE_IMAGE = 190 * 2**20  # what one picture may take there, roughly


@pytest.fixture(scope="module")
def small(image_with_extras: str, bundle: Path) -> Iterator[Container]:
    """A container with the limits of compose.yaml; swap would hide that memory ran out."""
    options = ["--memory", "1g", "--memory-swap", "1g", "--cpus", "2"]
    started = container_engine.start(bundle, options=options, image=image_with_extras)
    yield started
    started.remove()


def largest(name: str) -> bytes:
    """The largest of some square pictures that one image may cost."""
    found = b""
    for side in (1500, 2500, 3500, 4500, 6000):
        data = WORST[name](side, side)
        if cost.estimate(data).bytes > ONE_IMAGE or len(data) > 19_000_000:
            break
        found = data
    return found


def test_the_worst_pictures_three_at_once_do_not_end_a_container_of_one_gibibyte(
    small: Container, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []
    honest: list[float] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.wait(0.1):
            start = time.monotonic()
            assert small.post("/predict", photo(1))[0] == 200
            honest.append(time.monotonic() - start)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        with ThreadPoolExecutor(9) as threads:
            pictures = [data for name in WORST for data in [largest(name)] * 3]
            pictures += [WORST["jpeg-progressive"](10_000, 10_000), WORST["png-rgb"](7000, 7000)]
            statuses += threads.map(lambda data: small.post("/predict?tta=10", data)[0], pictures)
    finally:
        stop.set()
        caller.join()
    peak = int(small.python(PEAK))
    with capsys.disabled():
        print(
            f"\n{dict(Counter(statuses))}; at most {peak >> 20} MB of 1024; "
            f"{len(honest)} honest answers, the slowest after {max(honest):.1f} s"
        )
    assert set(statuses) <= {200, 413, 429, 504}
    assert statuses.count(200) > len(WORST)
    assert len(honest) > 20
    assert small.inspect(".State.OOMKilled") == "false"
    assert small.inspect(".RestartCount") == "0"
    assert small.inspect(".State.Running") == "true"
    assert peak < LIMIT


PEAK = """
from pathlib import Path
for name in ("memory.peak", "memory/memory.max_usage_in_bytes"):
    file = Path("/sys/fs/cgroup", name)
    if file.exists():
        print(file.read_text())
        break
else:
    print(0)
"""


def test_a_container_with_too_little_memory_exits_with_2_and_says_how_much_it_takes(
    bundle: Path,
) -> None:
    volume = f"{bundle}:/bundle:ro"
    ended = run_to_end("--memory", "200m", "--volume", volume, IMAGE)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "this container has 200 MB" in ended.stderr
    assert "--memory" in ended.stderr


def test_the_health_check_speaks_https_where_the_service_does(tmp_path: Path) -> None:
    folder = make_readable(tiny_bundle(tmp_path / "bundle"))
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "key.pem").chmod(0o644)
    name = f"fledge-test-tls-{tmp_path.name[-12:]}"
    options = (
        "--env",
        "FLEDGE_TLS_CERT=/bundle/cert.pem",
        "--env",
        "FLEDGE_TLS_KEY=/bundle/key.pem",
    )
    volume = f"{folder}:/bundle:ro"
    run(DOCKER, "run", "--detach", "--name", name, *options, "--volume", volume, IMAGE)
    try:
        check = (DOCKER, "exec", name, "python", "/app/healthcheck.py")
        deadline = time.monotonic() + 30
        while run(*check, check=False).returncode:
            assert time.monotonic() < deadline, run(DOCKER, "logs", name).stderr
            time.sleep(0.5)
    finally:
        run(DOCKER, "rm", "--force", name)
