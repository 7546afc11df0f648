"""BentoML's pages and metrics cost little, however often they are asked for, and stay the same."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serving.http.bentoml_routes import BentomlRoutes
from serving.server import bentoml_compat
from tests.support.live_server import Live, client, get, live, post
from tests.support.tiny_bundle import photo

SCRIPT = "/static_content/swagger-ui-bundle.js"


def test_each_page_is_asked_for_once(server: Live):
    paths = [*bentoml_compat.STATIC_FILES, "/docs", "/docs.json", "/schema.json", "/livez"]
    for path in paths:
        first, again = get(f"{server.url}{path}"), get(f"{server.url}{path}")
        assert first.status_code == again.status_code == 200, path
        assert first.content == again.content
        assert first.headers["content-type"] == again.headers["content-type"]
    assert json.loads(get(f"{server.url}/docs.json").content)["openapi"]
    assert len(get(f"{server.url}{SCRIPT}").content) > 1_000_000
    assert "default-src 'none'" in get(f"{server.url}/docs").headers["content-security-policy"]


def test_a_page_does_not_depend_on_who_asked_first(folder: Path, tmp_path: Path):
    with live(folder, tmp_path / "log", FLEDGE_HOSTS="one.example") as server:
        headers = {"Host": "one.example", "Range": "bytes=0-9", "If-None-Match": "*"}
        with client(server.url) as caller:
            for path in ("/docs.json", SCRIPT):
                assert caller.get(path, headers=headers).status_code == 200
                assert b"one.example" not in caller.get(path).content
            assert len(caller.get(SCRIPT).content) > 1_000_000


def test_a_browser_that_has_a_file_gets_304(server: Live):
    with client(server.url) as caller:
        tag = caller.get(SCRIPT).headers["etag"]
        same = caller.get(SCRIPT, headers={"If-None-Match": tag})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
        assert caller.get(SCRIPT, headers={"If-None-Match": '"other"'}).status_code == 200
        head = caller.head(SCRIPT)
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 1_000_000


@pytest.mark.parametrize("path", ["/docs.json", SCRIPT, "/schema.json", "/livez"])
def test_a_page_costs_no_time_of_the_cpu(server: Live, path: str):
    process = psutil.Process(server.process.pid)
    with client(server.url) as caller:
        caller.get(path)
        before = sum(process.cpu_times()[:2])
        for _ in range(100):
            assert caller.get(path).status_code == 200
        taken = sum(process.cpu_times()[:2]) - before
    assert taken / 100 < 0.0025  # 2 to 6 ms before


def test_metrics_are_rendered_once_for_all_that_wait():
    rendered = 0

    async def inner(scope, receive, send):
        nonlocal rendered
        rendered += 1
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % rendered})

    async def ask(routes: BentomlRoutes) -> bytes:
        parts: list[bytes] = []

        async def send(message):
            parts.append(message.get("body", b""))

        await routes.answer({"path": "/metrics", "method": "GET", "headers": []}, send)
        return b"".join(parts)

    async def run() -> None:
        routes = BentomlRoutes(inner)
        assert set(await asyncio.gather(*(ask(routes) for _ in range(100)))) == {b"1"}
        started = time.monotonic()
        waits = asyncio.create_task(ask(routes))
        await asyncio.sleep(0)
        waits.cancel()  # the others don't depend on it
        assert set(await asyncio.gather(*(ask(routes) for _ in range(100)))) == {b"2"}
        assert time.monotonic() - started > 0.08  # at most a tenth of the time

    asyncio.run(run())


def test_metrics_are_of_the_moment(server: Live):
    def answered() -> float:
        lines = get(f"{server.url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('fledge_requests_total{outcome="ok"}')]
        return float(found[0].split()[1]) if found else 0.0

    before = answered()
    for number in range(3):
        assert post(f"{server.url}/predict", photo(1)).status_code == 200
        assert answered() == before + number + 1


@pytest.mark.process
@pytest.mark.parametrize("path", ["/docs.json", "/metrics", SCRIPT])
def test_many_requests_for_a_page_stop_nobody(server: Live, path: str):
    end = time.monotonic() + 4

    def attack() -> None:
        async def one(caller: httpx.AsyncClient) -> None:
            while time.monotonic() < end:
                with suppress(httpx.HTTPError):
                    await caller.get(path)

        async def run() -> None:
            limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
            options = {"limits": limits, "trust_env": False, "timeout": 20}
            async with httpx.AsyncClient(base_url=server.url, **options) as caller:
                await asyncio.gather(*(one(caller) for _ in range(100)))

        asyncio.run(run())

    thread = threading.Thread(target=attack)
    thread.start()
    slowest = 0.0
    with client(server.url) as caller:
        while time.monotonic() < end:
            started = time.monotonic()
            assert caller.post("/predict", content=photo(1)).status_code == 200
            assert caller.get("/readyz").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
    thread.join()
    assert slowest < 2
