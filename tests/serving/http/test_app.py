"""Cases of `App` that a real server can't produce on demand: overload, deadlines, faults."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from serving.errors import Overloaded, WorkError
from serving.http.app import App
from serving.http.model_manager import LoadedModel, ModelManager
from serving.inference.admission import OverdueCount
from serving.inference.decoding import DecodingBudget
from serving.inference.load import open_predictor
from serving.inference.predictor import Prediction, Predictor
from serving.inference.scheduling import DynamicBatcher, build_engine
from serving.settings import Settings
from tests.support.tiny_bundle import photo, tiny_bundle


class RecordingTelemetry:
    """Records outcomes and log lines."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.lines: list[tuple] = []

    def observe(self, phase: str, value: float) -> None: ...

    def count(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def answered(self, answer: object) -> None:
        self.count("ok")

    def log(self, *line: object) -> None:
        self.lines.append(line)


class FakeEngine:
    share = 4
    overdue = OverdueCount(2, lambda *_: None)

    def __init__(self, work: Callable[[bytes], Awaitable[Prediction]]) -> None:
        self.work = work

    async def predict(self, data: bytes, tta: int = 0) -> Prediction:
        return await self.work(data)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return open_predictor(tiny_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


async def no_bentoml(scope, receive, send) -> None:
    raise AssertionError("passed on to BentoML")


def manager_of(predictor: Predictor, engine, **settings) -> ModelManager:
    model_manager = ModelManager(
        Settings(bundle=Path("secret-folder"), **settings), RecordingTelemetry()
    )
    if engine is not None:
        model_manager._model = LoadedModel(predictor, engine, b"{}")
    return model_manager


def run_client(
    model_manager: ModelManager, work: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app=App(no_bentoml, lambda: model_manager))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", trust_env=False
        ) as client:
            await asyncio.wait_for(work(client), 20)

    asyncio.run(run())


def engine_of(predictor: Predictor, cap: int, max_queue: int = 64):
    return build_engine(
        predictor,
        cap=cap,
        threads=2,
        max_queue=max_queue,
        max_pixels=10_000_000,
        budget=DecodingBudget.of(2**29),
        observe=lambda phase, value: None,
    )


def test_a_full_queue_is_429_with_retry_after(predictor: Predictor):
    engine = engine_of(predictor, 1, max_queue=2)
    model_manager = manager_of(predictor, engine)

    async def work(client: httpx.AsyncClient) -> None:
        responses = await asyncio.gather(
            *(client.post("/predict", content=photo(1, (900, 900))) for _ in range(12))
        )
        codes = [response.status_code for response in responses]
        assert codes.count(200) >= 2
        assert codes.count(429) == 12 - codes.count(200) > 0
        for response in responses:
            if response.status_code == 429:
                assert response.headers["retry-after"] == "1"
                assert response.json()["code"] == "overloaded"
        assert (await client.post("/predict", content=photo(1))).status_code == 200

    run_client(model_manager, work)
    engine.close()


def test_a_missed_deadline_is_504(predictor: Predictor):
    async def never(data: bytes) -> Prediction:
        await asyncio.sleep(60)
        raise AssertionError

    async def work(client: httpx.AsyncClient) -> None:
        response = await client.post("/predict", content=photo(1))
        assert (response.status_code, response.json()["code"]) == (504, "deadline-exceeded")

    model_manager = manager_of(predictor, FakeEngine(never), deadline=0.05)
    run_client(model_manager, work)
    assert model_manager.telemetry.outcomes == ["deadline-exceeded"]


@pytest.mark.parametrize("error", [KeyError("/a/secret/path"), WorkError("/a/secret/path")])
def test_faults_of_the_service_leak_no_details(
    predictor: Predictor, error: Exception, caplog: pytest.LogCaptureFixture
):
    async def fail(data: bytes) -> Prediction:
        raise error

    async def work(client: httpx.AsyncClient) -> None:
        response = await client.post("/predict", content=photo(1))
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.headers["x-request-id"] in response.json()["detail"]
        batch = await client.post("/predict/batch", files=[("image", b"a"), ("image", b"b")])
        assert [item["error"]["status"] for item in batch.json()] == [500, 500]
        assert "secret" not in batch.text

    with caplog.at_level(logging.ERROR):
        run_client(manager_of(predictor, FakeEngine(fail)), work)
    assert "secret" in caplog.text


def test_without_a_model_every_route_is_503(predictor: Predictor):
    async def work(client: httpx.AsyncClient) -> None:
        for method, path in (("POST", "/predict"), ("GET", "/model"), ("GET", "/readyz")):
            response = await client.request(method, path)
            assert (response.status_code, response.json()["code"]) == (503, "not-ready")
        assert "still being loaded" in response.text

    run_client(manager_of(predictor, None), work)


def test_a_refusal_does_not_contain_the_path_of_the_bundle(predictor: Predictor):
    async def work(client: httpx.AsyncClient) -> None:
        response = await client.get("/readyz")
        assert response.json()["detail"] == "the bundle/model.onnx was changed"

    model_manager = manager_of(predictor, None)
    model_manager.refusal = f"{model_manager.settings.bundle}/model.onnx was changed"
    run_client(model_manager, work)


def test_a_websocket_is_closed_at_once(predictor: Predictor):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message) -> None:
        sent.append(message)

    app = App(no_bentoml, lambda: manager_of(predictor, None))
    asyncio.run(app({"type": "websocket", "path": "/x", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1000}]


def test_a_hostile_form_does_not_block_other_requests(predictor: Predictor):
    hostile = b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\n" + b"\r\n--bx" * 400_000
    headers = {"content-type": "multipart/form-data; boundary=b"}

    async def work(client: httpx.AsyncClient) -> None:
        slow = asyncio.create_task(client.post("/predict", content=hostile, headers=headers))
        answered = 0
        while not slow.done():
            assert (await client.get("/readyz")).status_code == 503
            answered += 1
            await asyncio.sleep(0.01)
        assert (await slow).status_code == 400
        assert answered > 3

    run_client(manager_of(predictor, None), work)


def test_a_slow_body_is_408(predictor: Predictor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.http.app.READ_TIMEOUT", 0.05)

    async def drip():
        yield b"a"
        await asyncio.sleep(5)

    async def work(client: httpx.AsyncClient) -> None:
        response = await client.post("/predict", content=drip())
        assert (response.status_code, response.json()["code"]) == (408, "slow-request")

    run_client(manager_of(predictor, engine_of(predictor, 1)), work)


def test_a_client_that_disconnects_gets_no_response(predictor: Predictor):
    events = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
    sent = []

    async def receive():
        return events.pop(0)

    async def send(message) -> None:
        sent.append(message)

    model_manager = manager_of(predictor, engine_of(predictor, 1))
    app = App(no_bentoml, lambda: model_manager)
    asyncio.run(app({**scope, "headers": []}, receive, send))
    assert sent == []
    assert model_manager.telemetry.outcomes == []


def test_the_batching_engine_gives_the_answers_of_the_predictor(predictor: Predictor):
    engine = engine_of(predictor, 8)
    assert isinstance(engine, DynamicBatcher)

    async def work(client: httpx.AsyncClient) -> None:
        requests = [(photo(seed), seed % 4) for seed in range(16)] + [(b"text", 0)]
        responses = await asyncio.gather(
            *(client.post("/predict", params={"tta": n}, content=data) for data, n in requests)
        )
        assert responses.pop().status_code == 415
        for (data, tta), response in zip(requests, responses, strict=False):
            prediction = predictor.predict([predictor.prepare(data, tta)])[0]
            top = response.json()["predictions"][0]["probability"]
            assert top == pytest.approx(float(np.max(prediction.probabilities)), abs=1e-6)

    run_client(manager_of(predictor, engine), work)
    engine.close()


def test_a_batch_that_the_queue_has_no_room_for_is_429(predictor: Predictor):
    room = [0]

    async def work_of(data: bytes) -> Prediction:
        if room[0] <= 0:
            raise Overloaded("the queue is full")
        room[0] -= 1
        return predictor.predict([predictor.prepare(data, 0)])[0]

    async def work(client: httpx.AsyncClient) -> None:
        files = [("image", photo(seed)) for seed in range(3)]
        response = await client.post("/predict/batch", files=files)
        assert (response.status_code, response.json()["code"]) == (429, "overloaded")
        assert response.headers["retry-after"] == "1"
        room[0] = 2
        response = await client.post("/predict/batch", files=files)
        assert response.status_code == 200
        *answered, refused = response.json()
        assert all("predictions" in item for item in answered)
        assert (refused["error"]["code"], refused["error"]["retry_after"]) == ("overloaded", 1)

    run_client(manager_of(predictor, FakeEngine(work_of)), work)


def test_a_worker_with_wrong_settings_does_not_start(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
):
    """They were right when the launcher checked them."""
    monkeypatch.setattr("serving.http.app.bentoml_compat.running_uvicorn_server", object)
    monkeypatch.setattr("serving.http.app.log_queue.install", lambda: None)
    monkeypatch.setenv("FLEDGE_TLS_CERT", "/no/such/file")
    monkeypatch.setenv("FLEDGE_TLS_KEY", "/no/such/file")
    sent = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message) -> None:
        sent.append(message)

    app = App(no_bentoml, lambda: manager_of(predictor, None))
    asyncio.run(app({"type": "lifespan"}, receive, send))
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert "FLEDGE_TLS_CERT" in sent[0]["message"]
