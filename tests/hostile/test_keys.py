"""Wrong keys are slowed by source; a key has a rate; overloaded batches say when to ask again."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from serving.errors import Unauthorized
from serving.http import keys as keys_module
from serving.http.keys import ApiKeys
from serving.http.messages import Request
from serving.http.problems import RateLimited
from tests.support.live_server import Live, client, free_port, get, launch, live
from tests.support.tiny_bundle import photo, tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = tmp_path_factory.mktemp("keys")
    (path / "keys").write_text("right\nother\n")
    with live(folder, path / "log", FLEDGE_API_KEYS_FILE=str(path / "keys")) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_guesses_are_slowed_and_counted_and_right_keys_pass(server: Live):
    with client(server.url) as caller:
        assert caller.get("/model", headers=bearer("right")).status_code == 200
        started = time.monotonic()
        for number in range(keys_module.FREE_FAILURES):
            assert caller.get("/model", headers=bearer(f"guess{number}")).status_code == 401
            if number == 5:  # remembered as a key of this source
                assert caller.get("/model", headers=bearer("right")).status_code == 200
        free = time.monotonic() - started
        started = time.monotonic()
        assert caller.get("/model", headers=bearer("late")).status_code == 401
        assert time.monotonic() - started > 0.7
        started = time.monotonic()
        assert caller.post("/predict", content=photo(1), headers=bearer("right")).status_code == 200
        assert time.monotonic() - started < 0.7
        assert free < 5
    outcome = r'fledge_requests_total{outcome="unauthorized"} ([0-9.]+)'
    found = re.search(outcome, get(f"{server.url}/metrics").text)
    assert float(found[1]) >= keys_module.FREE_FAILURES


@pytest.mark.process
def test_guesses_in_parallel_are_refused_without_a_look(server: Live):
    def guess(number: int) -> int:
        with client(server.url) as caller:
            headers = bearer("other" if number == 39 else f"guess{number}")
            answer = caller.get("/model", headers=headers)
            if answer.status_code == 429:
                assert answer.json()["code"] == "rate-limited"
                assert answer.headers["retry-after"] == "1"
            return answer.status_code

    with client(server.url) as caller:
        for number in range(keys_module.FREE_FAILURES):
            caller.get("/model", headers=bearer(f"first{number}"))
            if number > 2 and not keys_left(caller):
                break
    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(guess, range(40)))
    assert statuses.count(429) > 10
    assert 200 not in statuses[:39]
    with client(server.url) as caller:
        assert caller.get("/model", headers=bearer("right")).status_code == 200
        assert caller.get("/model", headers=bearer("other")).status_code == 200  # after a second


def keys_left(caller) -> bool:
    started = time.monotonic()
    caller.get("/model", headers=bearer("x"))
    return time.monotonic() - started < 0.7


def test_requests_without_a_key_are_not_slowed(folder: Path, tmp_path: Path):
    (tmp_path / "keys").write_text("right\n")
    options = {"FLEDGE_API_KEYS_FILE": str(tmp_path / "keys")}
    with live(folder, tmp_path / "log", **options) as server, client(server.url) as caller:
        started = time.monotonic()
        for _ in range(60):
            assert caller.get("/model").status_code == 401
        assert time.monotonic() - started < 5


def request(key: str, address: str = "192.0.2.1") -> Request:
    headers = {b"authorization": f"Bearer {key}".encode()}
    return Request("POST", "/predict", b"", headers, None, "1", address)


def keys_of(*keys: str, rate: float = 0.0) -> ApiKeys:
    return ApiKeys(frozenset(hashlib.sha256(key.encode()).digest() for key in keys), rate)


def outcome(keys: ApiKeys, one: Request, images: int = 1) -> str:
    try:
        asyncio.run(keys.authorise(one, images))
    except (Unauthorized, RateLimited) as error:
        return error.code
    return "ok"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(keys_module, "_now", lambda: now[0])
    return now


def test_each_key_has_its_own_rate(clock: list[float]):
    keys = keys_of("a", "b", rate=2.0)
    assert [outcome(keys, request("a")) for _ in range(4)] == ["ok", "ok", *["rate-limited"] * 2]
    assert outcome(keys, request("b")) == "ok"
    clock[0] += 0.5
    assert [outcome(keys, request("a")) for _ in range(2)] == ["ok", "rate-limited"]


def test_a_batch_counts_its_images(clock: list[float]):
    keys = keys_of("a", rate=1.0)
    assert outcome(keys, request("a")) == "ok"
    keys.count(request("a"), 63)
    clock[0] += 62
    with pytest.raises(RateLimited) as refused:
        asyncio.run(keys.authorise(request("a"), 1))
    assert refused.value.retry_after == 2
    clock[0] += 2
    assert outcome(keys, request("a")) == "ok"


def test_what_is_no_image_costs_no_rate(clock: list[float]):
    keys = keys_of("a", rate=1.0)
    assert [outcome(keys, request("a"), images=0) for _ in range(9)] == ["ok"] * 9


def test_the_memory_for_sources_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys_module, "MAX_SOURCES", 10)
    keys = keys_of("a")
    for number in range(50):
        assert outcome(keys, request("x", f"192.0.2.{number}")) == "unauthorized"
    assert len(keys._sources) == 10


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("not:an:address", "not:an:address", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:c000:201", "192.0.2.1", True),
        ("::1", "::2", True),
    ],
)
def test_a_network_of_ipv6_is_one_source(one: str, other: str, same: bool):
    assert (keys_module._source_of(one) == keys_module._source_of(other)) == same


def test_a_right_key_from_before_is_not_slowed_beside_guessers():
    keys = keys_of("right", "late")

    async def run() -> list[str]:
        await keys.authorise(request("right"), 1)  # before the first wrong key of this address
        for number in range(keys_module.FREE_FAILURES + 1):
            with suppress(Unauthorized):
                await keys.authorise(request(f"guess{number}"), 1)
        guesses = [asyncio.create_task(keys.authorise(request("x"), 1)) for _ in range(9)]
        await asyncio.sleep(0)
        found = []
        for key in ("right", "late"):
            started = time.monotonic()
            try:
                await keys.authorise(request(key), 1)
                found.append("at once" if time.monotonic() - started < 0.5 else "late")
            except RateLimited:
                found.append("refused")
        await asyncio.gather(*guesses, return_exceptions=True)
        return found

    assert asyncio.run(run()) == ["at once", "refused"]


def test_the_memory_for_right_keys_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys_module, "MAX_SOURCES", 10)
    keys = keys_of("a")
    for number in range(50):
        assert outcome(keys, request("a", f"192.0.2.{number}")) == "ok"
    assert len(keys._known) == 10


@pytest.mark.parametrize("value", ["-1", "nan", "1e9", "many", "1" * 9])
def test_a_wrong_rate_is_refused(folder: Path, tmp_path: Path, value: str):
    log = tmp_path / "log"
    assert launch(folder, free_port(), log, FLEDGE_KEY_RATE=value).wait(30) == 2
    assert "FLEDGE_KEY_RATE" in log.read_text()


def test_a_rate_without_keys_is_refused(folder: Path, tmp_path: Path):
    log = tmp_path / "log"
    assert launch(folder, free_port(), log, FLEDGE_KEY_RATE="5").wait(30) == 2
    assert "set FLEDGE_API_KEYS_FILE too" in log.read_text()


def test_a_rate_is_kept_by_the_service(folder: Path, tmp_path: Path):
    (tmp_path / "keys").write_text("right\n")
    options = {"FLEDGE_API_KEYS_FILE": str(tmp_path / "keys"), "FLEDGE_KEY_RATE": "0.1"}
    with live(folder, tmp_path / "log", **options) as server, client(server.url) as caller:
        assert caller.post("/predict", content=photo(1), headers=bearer("right")).status_code == 200
        answer = caller.post("/predict", content=photo(1), headers=bearer("right"))
        assert (answer.status_code, answer.json()["code"]) == (429, "rate-limited")
        assert 1 <= int(answer.headers["retry-after"]) <= 10
