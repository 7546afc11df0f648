"""Replacing the bundle: a new version is served between two requests, a bad one is refused."""

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
from serving.http import model_manager
from serving.http.forms import PredictOptions
from serving.http.model_manager import ModelManager
from serving.http.predict import predict_image, predict_images
from serving.http.telemetry import Telemetry
from serving.settings import Settings
from tests.support.live_server import client, get, live, post
from tests.support.tiny_bundle import altered, photo, tiny_bundle


class RecordingTelemetry(Telemetry):
    """Registers no metrics, because a process can register them only once."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def observe(self, phase, value) -> None: ...
    def count(self, outcome) -> None: ...
    def answered(self, answer) -> None: ...
    def retired(self, model, *_) -> None:
        self.events.append(f"retired {model}")

    def serving(self, model, *_) -> None:
        self.events.append(f"serving {model}")

    def refused(self) -> None:
        self.events.append("refused")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_manager, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(model_manager, "FIRST_RETRY_SECONDS", 0.05)
    manager = ModelManager(Settings(bundle=folder), RecordingTelemetry())
    manager.load()
    manager.start()
    yield manager
    manager.close()


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def version(folder: Path) -> str:
    return "tiny:" + storage.read(folder).manifest.version


def publish_wrong(folder: Path) -> None:
    """Publish a version whose graph does not give the stored golden probabilities."""
    other = tiny_bundle(folder.with_name("other"), seed=9)
    golden = [dict(item) for item in storage.read(other).manifest.golden]
    golden[1]["probabilities"] = {"fp32": [1.0, 0.0, 0.0]}
    manifest = altered(other, golden=tuple(golden))
    shutil.copytree(other / manifest.version, folder / manifest.version)
    storage.publish(manifest, folder)


def models_of(answers: list[httpx.Response]) -> set[str]:
    return {answer.json()["model"] for answer in list(answers)}


def test_a_new_version_under_load_loses_no_request(folder: Path, tmp_path: Path) -> None:
    names, answers, stop = [version(folder)], [], threading.Event()
    data = photo(1)
    with live(folder, tmp_path / "log") as server:

        def run_client() -> None:
            with client(server.url) as connection:
                while not stop.is_set():
                    answers.append(connection.post("/predict", content=data))

        clients = [threading.Thread(target=run_client) for _ in range(2)]
        for one in clients:
            one.start()
        wait_until(lambda: names[-1] in models_of(answers))
        for seed in (1, 2):
            tiny_bundle(folder, seed=seed)
            names.append(version(folder))
            wait_until(lambda: get(f"{server.url}/readyz").json()["model"] == names[-1])
            wait_until(lambda: names[-1] in models_of(answers))
        publish_wrong(folder)
        wait_until(lambda: "refused" in get(f"{server.url}/readyz").json())
        ready = get(f"{server.url}/readyz").json()
        assert ready["model"] == names[-1]
        assert "golden/1.jpg in fp32" in ready["refused"]
        assert str(folder) not in ready["refused"]
        assert get(f"{server.url}/model").json()["version"] == names[-1].removeprefix("tiny:")
        tiny_bundle(folder, seed=3)
        names.append(version(folder))
        wait_until(lambda: get(f"{server.url}/readyz").json()["model"] == names[-1])
        assert "refused" not in get(f"{server.url}/readyz").json()
        stop.set()
        for one in clients:
            one.join()
        metrics = get(f"{server.url}/metrics").text
        log = (tmp_path / "log").read_text()
        last = post(f"{server.url}/predict", data).json()
    assert {answer.status_code for answer in answers} == {200}
    models = models_of(answers)
    assert set(names[:3]) <= models <= set(names)
    by_model = {
        (one.json()["model"], one.json()["predictions"][0]["probability"]) for one in answers
    }
    assert len(by_model) == len(models)  # each version gives the same answer to the same photo
    assert last["model"] == names[-1]
    assert "fledge_bundles_refused_total 1.0" in metrics
    served = [line for line in metrics.splitlines() if line.startswith("fledge_model{")]
    assert [line for line in served if line.endswith(" 1.0")] == [
        line for line in served if names[-1] in line
    ]
    assert f"still serving {names[2]}: " in log


def test_a_bundle_that_is_still_being_copied_is_served_when_complete(
    served: ModelManager, tmp_path: Path
) -> None:
    folder = served.settings.bundle
    other = tiny_bundle(tmp_path / "other", seed=1)
    name = storage.read(other).manifest.version
    for part in (storage.MANIFEST, storage.CHECKSUM):  # the payload comes later
        shutil.copy(other / part, folder)
    wait_until(lambda: "can't be read" in served.refusal)
    old = served.model.predictor.model
    shutil.copytree(other / name, folder / name)
    wait_until(lambda: served.model.predictor.model != old)
    wait_until(lambda: served.refusal == "")
    expected = [f"retired {old}", f"serving tiny:{name}"]
    wait_until(lambda: served.telemetry.events[-2:] == expected)


def test_after_an_unexpected_error_the_next_bundle_is_served(
    served: ModelManager, monkeypatch
) -> None:
    folder, old = served.settings.bundle, served.model

    def broken(*_) -> None:
        raise TypeError("unexpected")

    with monkeypatch.context() as patch:
        patch.setattr(served, "_report", broken)
        tiny_bundle(folder, seed=1)
        wait_until(lambda: served.model is not old)
        time.sleep(0.1)
    middle = served.model
    tiny_bundle(folder, seed=2)
    wait_until(lambda: served.model is not middle)


def test_trusted_keys_apply_to_each_version(served: ModelManager, monkeypatch, tmp_path) -> None:
    folder, old = served.settings.bundle, served.model
    for name in ("ours", "theirs"):
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        generate = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(private)]
        subprocess.run(generate, check=True, capture_output=True)
        export = ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)]
        subprocess.run(export, check=True, capture_output=True)
    monkeypatch.setenv(signing.TRUSTED, str(tmp_path / "ours.pub"))
    other = tiny_bundle(tmp_path / "other", seed=1)
    manifest = storage.read(other, require_trusted=False).manifest
    shutil.copytree(other / manifest.version, folder / manifest.version)
    storage.publish(manifest, folder)
    wait_until(lambda: "it is not signed" in served.refusal)
    storage.publish(manifest, folder, signing.signer(tmp_path / "theirs.pem"))
    wait_until(lambda: "which is not in" in served.refusal)
    assert served.model is old
    storage.publish(manifest, folder, signing.signer(tmp_path / "ours.pem"))
    wait_until(lambda: served.model is not old)
    wait_until(lambda: served.refusal == "")


def test_a_refusal_is_logged_once(served: ModelManager) -> None:
    publish_wrong(served.settings.bundle)
    wait_until(lambda: bool(served.refusal))
    time.sleep(0.5)  # ten times the time until it is tried again
    assert served.telemetry.events.count("refused") == 1


def test_a_service_without_a_bundle_serves_the_first_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(model_manager, "WATCH_SECONDS", 0.01)
    folder = tmp_path / "bundle"
    manager = ModelManager(Settings(bundle=folder), RecordingTelemetry())
    manager.start()
    wait_until(lambda: "no bundle" in manager.refusal)
    with pytest.raises(NotReady):
        _ = manager.model
    tiny_bundle(folder)
    wait_until(lambda: manager.refusal == "")
    assert manager.model.predictor.model == version(folder)
    manager.close()


def test_an_image_in_flight_is_answered_by_the_version_that_took_it(served: ModelManager) -> None:
    folder, entered, go = served.settings.bundle, threading.Event(), threading.Event()
    old = served.model
    predict = old.predictor.predict

    def slow(prepared, *, low_latency):
        entered.set()
        assert go.wait(20)
        return predict(prepared, low_latency=low_latency)

    old.engine._predict = slow

    async def run():
        answers = asyncio.create_task(
            predict_images(served, [photo(1)] * 3, PredictOptions(), "id")
        )
        await asyncio.to_thread(entered.wait, 20)
        tiny_bundle(folder, seed=1)
        await asyncio.to_thread(wait_until, lambda: served.model is not old)
        new = await predict_image(served, photo(1), PredictOptions())
        go.set()
        return await answers, new

    answers, new = asyncio.run(run())
    assert [answer["model"] for answer in answers] == [old.predictor.model] * 3
    assert new["model"] == served.model.predictor.model
    wait_until(lambda: not any(thread.is_alive() for thread in old.engine._threads))


def test_a_version_with_a_failed_request_is_freed(served: ModelManager) -> None:
    folder, go, fail = served.settings.bundle, threading.Event(), threading.Event()
    first = served.model
    predict = first.predictor.predict

    def slow(prepared, *, low_latency):
        assert go.wait(20)
        return predict(prepared, low_latency=low_latency)

    def fails(prepared, *, low_latency):
        assert fail.wait(20)
        raise WorkError("out of memory")

    first.engine._predict = slow

    async def run() -> Callable[[], object]:
        answer = asyncio.create_task(predict_image(served, photo(1), PredictOptions()))
        tiny_bundle(folder, seed=1)
        await asyncio.to_thread(wait_until, lambda: served.model is not first)
        served.model.engine._predict = fails
        second = weakref.ref(served.model)
        failing = asyncio.create_task(predict_image(served, photo(1), PredictOptions()))
        await asyncio.sleep(0.05)
        go.set()  # the first is closed while a request is at the second
        await answer
        await asyncio.sleep(0.5)
        fail.set()
        with pytest.raises(WorkError):
            await failing
        return second

    second = asyncio.run(run())
    tiny_bundle(folder, seed=2)

    def freed() -> bool:
        gc.collect()
        return second() is None

    wait_until(freed)


def test_an_unchanged_manifest_with_a_new_time_changes_no_answer(served: ModelManager) -> None:
    path = served.settings.bundle / storage.MANIFEST
    old = served.model
    path.write_text(path.read_text())
    wait_until(lambda: served.model is not old)
    assert json.loads(served.model.manifest) == json.loads(old.manifest)
    assert "retired" not in " ".join(served.telemetry.events)
