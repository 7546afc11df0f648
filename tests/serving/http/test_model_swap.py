"""A bundle that is replaced is served between two requests; a bad one never is."""

import asyncio
import gc
import json
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serving.bundle import signing, storage
from serving.errors import NotReady, WorkError
from serving.http import model_manager as model_manager
from serving.http.forms import PredictOptions
from serving.http.model_manager import ModelManager
from serving.http.telemetry import Telemetry
from serving.settings import Settings
from tests.support.live_server import get, live, post
from tests.support.tiny_bundle import altered, photo, tiny_bundle


class Silent(Telemetry):
    """Metrics can be registered once a process only."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def observe(self, phase, value) -> None: ...
    def count(self, outcome) -> None: ...
    def answered(self, answer) -> None: ...
    def retired(self, model, *_) -> None:
        self.said.append(f"retired {model}")

    def serving(self, model, *_) -> None:
        self.said.append(f"serving {model}")

    def refused(self) -> None:
        self.said.append("refused")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_manager, "WATCH", 0.01)
    monkeypatch.setattr(model_manager, "RETRY", 0.05)
    made = ModelManager(Settings(bundle=folder), Silent())
    made.load()
    made.start()
    yield made
    made.close()


def until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def version(folder: Path) -> str:
    return "tiny:" + storage.read(folder).manifest.version


def spoil(folder: Path) -> None:
    """Publish a version whose golden answers are not what it gives."""
    aside = tiny_bundle(folder.with_name("aside"), seed=9)
    golden = [dict(item) for item in storage.read(aside).manifest.golden]
    golden[1]["probabilities"] = {"fp32": [1.0, 0.0, 0.0]}
    manifest = altered(aside, golden=tuple(golden))
    shutil.copytree(aside / manifest.version, folder / manifest.version)
    storage.publish(manifest, folder)


def test_callers_never_notice_but_by_the_version(folder: Path, tmp_path: Path) -> None:
    names, answers, stop = [version(folder)], [], threading.Event()
    data = photo(1)
    with live(folder, tmp_path / "log") as server:

        def call() -> None:
            with httpx.Client(trust_env=False, timeout=60) as client:
                while not stop.is_set():
                    answers.append(client.post(f"{server.url}/predict", content=data))

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for seed in (1, 2):
            tiny_bundle(folder, seed=seed)
            names.append(version(folder))
            until(lambda: get(f"{server.url}/readyz").json()["model"] == names[-1])
        spoil(folder)
        until(lambda: "refused" in get(f"{server.url}/readyz").json())
        ready = get(f"{server.url}/readyz").json()
        assert ready["model"] == names[-1]
        assert "golden/1.jpg in fp32" in ready["refused"]
        assert str(folder) not in ready["refused"]
        assert get(f"{server.url}/model").json()["version"] == names[-1].removeprefix("tiny:")
        tiny_bundle(folder, seed=3)
        names.append(version(folder))
        until(lambda: get(f"{server.url}/readyz").json()["model"] == names[-1])
        assert "refused" not in get(f"{server.url}/readyz").json()
        stop.set()
        for caller in callers:
            caller.join()
        metrics = get(f"{server.url}/metrics").text
        log = (tmp_path / "log").read_text()
        last = post(f"{server.url}/predict", data).json()
    assert {answer.status_code for answer in answers} == {200}
    told = {answer.json()["model"] for answer in answers}
    assert told <= set(names)
    assert {names[0], names[2]} <= told
    by_model = {
        (one.json()["model"], one.json()["predictions"][0]["probability"]) for one in answers
    }
    assert len(by_model) == len(told)  # each version gives one answer to one photo
    assert last["model"] == names[-1]
    assert "fledge_bundles_refused_total 1.0" in metrics
    served = [line for line in metrics.splitlines() if line.startswith("fledge_model{")]
    assert [line for line in served if line.endswith(" 1.0")] == [
        line for line in served if names[-1] in line
    ]
    assert f"{names[2]} goes on: " in log


def test_what_comes_bit_by_bit_is_served_once_it_is_whole(
    served: ModelManager, tmp_path: Path
) -> None:
    folder = served.settings.bundle
    other = tiny_bundle(tmp_path / "other", seed=1)
    name = storage.read(other).manifest.version
    for part in (storage.MANIFEST, storage.CHECKSUM):  # the payload is still on its way
        shutil.copy(other / part, folder)
    until(lambda: "can't be read" in served.refusal)
    old = served.model.predictor.model
    shutil.copytree(other / name, folder / name)
    until(lambda: served.model.predictor.model != old)
    until(lambda: served.refusal == "")
    expected = [f"retired {old}", f"serving tiny:{name}"]
    until(lambda: served.telemetry.said[-2:] == expected)


def test_whatever_goes_wrong_the_next_bundle_is_seen(served: ModelManager, monkeypatch) -> None:
    folder, old = served.settings.bundle, served.model

    def broken(*_) -> None:
        raise TypeError("not foreseen")

    with monkeypatch.context() as patch:
        patch.setattr(served, "_tell", broken)
        tiny_bundle(folder, seed=1)
        until(lambda: served.model is not old)
        time.sleep(0.1)
    middle = served.model
    tiny_bundle(folder, seed=2)
    until(lambda: served.model is not middle)


def test_trusted_keys_are_asked_for_at_each_version(
    served: ModelManager, monkeypatch, tmp_path
) -> None:
    folder, old = served.settings.bundle, served.model
    for name in ("ours", "theirs"):
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        made = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(private)]
        subprocess.run(made, check=True, capture_output=True)
        told = ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)]
        subprocess.run(told, check=True, capture_output=True)
    monkeypatch.setenv(signing.TRUSTED, str(tmp_path / "ours.pub"))
    aside = tiny_bundle(tmp_path / "aside", seed=1)
    manifest = storage.read(aside, whoever=True).manifest
    shutil.copytree(aside / manifest.version, folder / manifest.version)
    storage.publish(manifest, folder)
    until(lambda: "nobody signed it" in served.refusal)
    storage.publish(manifest, folder, signing.signer(tmp_path / "theirs.pem"))
    until(lambda: "which is none of" in served.refusal)
    assert served.model is old
    storage.publish(manifest, folder, signing.signer(tmp_path / "ours.pem"))
    until(lambda: served.model is not old)
    until(lambda: served.refusal == "")


def test_a_refusal_is_told_once(served: ModelManager) -> None:
    spoil(served.settings.bundle)
    until(lambda: bool(served.refusal))
    time.sleep(0.5)  # ten times as long as until it is tried again
    assert served.telemetry.said.count("refused") == 1


def test_a_start_without_a_model_ends_when_one_comes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(model_manager, "WATCH", 0.01)
    folder = tmp_path / "bundle"
    made = ModelManager(Settings(bundle=folder), Silent())
    made.start()
    until(lambda: "no bundle" in made.refusal)
    with pytest.raises(NotReady):
        _ = made.model
    tiny_bundle(folder)
    until(lambda: made.refusal == "")
    assert made.model.predictor.model == version(folder)
    made.close()


def test_an_image_in_flight_is_answered_by_the_version_that_took_it(served: ModelManager) -> None:
    folder, entered, go = served.settings.bundle, threading.Event(), threading.Event()
    old = served.model
    whole = old.predictor.predict

    def slow(prepared, *, alone):
        entered.set()
        assert go.wait(20)
        return whole(prepared, alone=alone)

    old.engine._predict = slow

    async def ask():
        answers = asyncio.create_task(served.answer_each([photo(1)] * 3, PredictOptions(), "id"))
        await asyncio.to_thread(entered.wait, 20)
        tiny_bundle(folder, seed=1)
        await asyncio.to_thread(until, lambda: served.model is not old)
        new = await served.answer(photo(1), PredictOptions())
        go.set()
        return await answers, new

    answers, new = asyncio.run(ask())
    assert [answer["model"] for answer in answers] == [old.predictor.model] * 3
    assert new["model"] == served.model.predictor.model
    until(lambda: not any(thread.is_alive() for thread in old.engine._threads))


def test_a_version_is_let_go_that_failed_while_it_took_over(served: ModelManager) -> None:
    folder, go, fail = served.settings.bundle, threading.Event(), threading.Event()
    first = served.model
    whole = first.predictor.predict

    def slow(prepared, *, alone):
        assert go.wait(20)
        return whole(prepared, alone=alone)

    def fails(prepared, *, alone):
        assert fail.wait(20)
        raise WorkError("out of memory")

    first.engine._predict = slow

    async def ask() -> Callable[[], object]:
        answer = asyncio.create_task(served.answer(photo(1), PredictOptions()))
        tiny_bundle(folder, seed=1)
        await asyncio.to_thread(until, lambda: served.model is not first)
        served.model.engine._predict = fails
        second = weakref.ref(served.model)
        failing = asyncio.create_task(served.answer(photo(1), PredictOptions()))
        await asyncio.sleep(0.05)
        go.set()  # now the first is closed, with a request at the second
        await answer
        await asyncio.sleep(0.5)
        fail.set()
        with pytest.raises(WorkError):
            await failing
        return second

    second = asyncio.run(ask())
    tiny_bundle(folder, seed=2)

    def gone() -> bool:
        gc.collect()
        return second() is None

    until(gone)


def test_a_touched_manifest_changes_nothing_for_callers(served: ModelManager) -> None:
    path = served.settings.bundle / storage.MANIFEST
    old = served.model
    path.write_text(path.read_text())
    until(lambda: served.model is not old)
    assert json.loads(served.model.manifest) == json.loads(old.manifest)
    assert "retired" not in " ".join(served.telemetry.said)
