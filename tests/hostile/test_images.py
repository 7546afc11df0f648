"""Pictures that are cheap to send and expensive to decode, against a service with little memory.

`BUDGET` is what a container of 1 GiB leaves for requests.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from serving.imaging import cost
from tests.hostile.images import (
    WORST,
    png,
    png_with_profile,
    profile_of_shared_elements,
    progressive_jpeg,
    saved,
)
from tests.support.live_server import Live, client, get, live
from tests.support.tiny_bundle import photo, tiny_bundle

BUDGET = 512 * 2**20
ONE_IMAGE = BUDGET * 3 // 8
SLACK = 100 * 2**20
HONEST = photo(1)
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("hostile")
    tiny_bundle(folder / "bundle")
    env = {"FLEDGE_MAX_MEMORY": str(BUDGET)}
    with live(folder / "bundle", folder / "log", **env) as server:
        for _ in range(20):
            assert post(server, HONEST).status_code == 200
        post(server, progressive_jpeg(4000, 4000))  # starts the decoder process
        yield server


def post(server: Live, data: bytes, path: str = "/predict", **options: Any) -> httpx.Response:
    url = f"{server.url}{path}"
    return httpx.post(url, content=data, timeout=90, trust_env=False, **options)


def form(images: list[bytes]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a batch request."""
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    body = b"".join(head + image + b"\r\n" for image in images) + b"--b--\r\n"
    return body, {"content-type": "multipart/form-data; boundary=b"}


@dataclass
class Watched:
    """What happened to a service during an attack.

    Attributes:
        memory: Largest growth of resident memory in bytes, all processes together.
        statuses: Status of each answer that an honest caller got.
        slowest: Longest time in seconds that an honest caller waited.
    """

    memory: int = 0
    statuses: list[int] = field(default_factory=list)
    slowest: float = 0.0


@contextmanager
def watched(server: Live) -> Iterator[Watched]:
    found, stop = Watched(), threading.Event()
    before = resident(server)

    def watch() -> None:
        while not stop.wait(0.01):
            found.memory = max(found.memory, resident(server) - before)

    def call() -> None:
        with client(server.url) as connection:
            while not stop.wait(0.02):
                start = time.monotonic()
                found.statuses.append(connection.post("/predict", content=HONEST).status_code)
                found.slowest = max(found.slowest, time.monotonic() - start)

    threads = [threading.Thread(target=watch), threading.Thread(target=call)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def resident(server: Live) -> int:
    """Resident memory of the service and its child processes."""
    service = psutil.Process(server.process.pid)
    total = 0
    for process in (service, *service.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has ended
            continue
    return total


def survived(server: Live, found: Watched) -> None:
    assert server.process.poll() is None, server.log.read_text()[-2000:]
    assert get(f"{server.url}/readyz").status_code == 200
    assert set(found.statuses) <= {200}
    assert found.slowest < 2  # on a machine that runs other tests too
    assert found.memory < ONE_IMAGE + SLACK


def largest(name: str, limit: int = ONE_IMAGE) -> bytes:
    """The largest square picture that the budget allows; three of them must fit as bodies."""
    side, data = 512, WORST[name](512, 512)
    while side < 6500:
        larger = WORST[name](side + 512, side + 512)
        if cost.estimate(larger).bytes > limit or len(larger) > 12_000_000:
            break
        side, data = side + 512, larger
    return data


SMALL = {
    "icc-stages": png_with_profile(profile_of_shared_elements(20_000)),
    "icc-table": png_with_profile(
        profile_of_shared_elements(
            20_000, b"clut\0\0\0\0" + struct.pack(">HH16B", 3, 3, 9, 9, 9, *bytes(13)) + bytes(8748)
        )
    ),
    "jpeg-100-mp": progressive_jpeg(10_000, 10_000),
    "jpeg-49-mp-99-scans": progressive_jpeg(7000, 7000, scans=94),
    "webp-49-mp": saved("RGB", "WEBP", lossless=True)(7000, 7000),
    "png-49-mp-rgba-16-bit": png(7000, 7000, 16, 6),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_picture_that_costs_too_much_is_refused_and_others_are_answered(
    server: Live, name: str
) -> None:
    with watched(server) as found:
        answers = [post(server, SMALL[name]) for _ in range(3)]
    survived(server, found)
    for answer in answers:
        if name.startswith("icc"):
            assert answer.json()["applied"] == ["icc-ignored"]
        else:
            assert (answer.status_code, answer.json()["code"]) == (413, "too-large")


@pytest.mark.parametrize("name", WORST)
def test_three_of_the_largest_pictures_at_once(server: Live, name: str) -> None:
    data, answers = largest(name), []
    with watched(server) as found:
        threads = [
            threading.Thread(target=lambda: answers.append(post(server, data))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    survived(server, found)
    assert {answer.status_code for answer in answers} <= {200, 504}
    assert 200 in {answer.status_code for answer in answers}


@pytest.mark.parametrize("name", ["jpeg-99-scans", "png-rgba-16-bit", "webp-lossless"])
def test_a_batch_of_the_largest_pictures_ends_at_its_deadline(server: Live, name: str) -> None:
    body, headers = form([largest(name, 40 * 2**20)] * 64)
    start = time.monotonic()
    with watched(server) as found:
        answers = post(server, body, "/predict/batch?tta=10", headers=headers).json()
    assert time.monotonic() - start < 14  # the deadline is 10 s
    survived(server, found)
    assert len(answers) == 64
    codes = {answer.get("error", {}).get("code") for answer in answers}
    assert codes <= {None, "deadline-exceeded", "overloaded"}


def test_memory_comes_back_after_the_attacks(server: Live) -> None:
    before = resident(server)
    with watched(server) as found:
        for name in ("jpeg-99-scans", "webp-lossless"):
            post(server, largest(name))
    time.sleep(0.5)
    assert resident(server) < before + 60 * 2**20
    survived(server, found)


def test_an_expensive_picture_is_logged_when_it_is_taken(server: Live) -> None:
    post(server, largest("jpeg-progressive"), headers={"x-request-id": "the-expensive-one"})
    answered, end = '"request": "the-expensive-one"', time.monotonic() + 10
    while answered not in server.log.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    before, found, _ = server.log.read_text().partition(answered)
    assert found
    assert "request the-expensive-one from 127.0.0.1: " in before
    assert "are decoded in a process of their own" in before
