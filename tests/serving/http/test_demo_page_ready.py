"""The demo page without a model, without a key, and with late or missing responses."""

import asyncio
import hashlib
import threading
from pathlib import Path

import pytest

from serving.http.model_manager import ModelManager
from serving.inference.predictor import Prediction
from serving.settings import Settings
from tests.support.browser import CHROMIUM, NAMES, Browser
from tests.support.page_fixture import (
    ANSWERED,
    LABELS,
    NAME,
    REFUSED,
    THRESHOLDS,
    NoTelemetry,
    check,
    opened,
    served,
    written,
)
from tests.support.tiny_bundle import altered, photo, tiny_bundle

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_bundle(tmp_path_factory.mktemp("bundle"), classes=len(LABELS))
    altered(folder, labels=LABELS, name=NAME, thresholds=THRESHOLDS)
    return folder


def test_a_key_is_requested_and_used(browser: Browser, folder: Path, tmp_path: Path):
    keys = frozenset({hashlib.sha256("right-key-ß".encode()).digest()})
    model_manager = ModelManager(
        Settings(bundle=folder, device="cpu", api_keys=keys), NoTelemetry()
    )
    model_manager.load()
    with served(model_manager) as (url, _), opened(browser, url) as page:
        page.until("!document.getElementById('key-form').hidden")
        page.choose("#file", written(tmp_path / "photo.jpg", photo(1)))
        page.until(
            f"{REFUSED} && document.getElementById('error-title').innerText === 'A key is needed'"
        )
        assert "Bearer $KEY" in page.text("#curl")
        for key in ("wrong-key", "right-key-ß"):
            page.value("document.getElementById('key').select()")
            page.call("Input.insertText", text=key)
            page.press("Enter")
            if key == "wrong-key":
                page.until("document.getElementById('hint').innerText.includes('not know this')")
        page.until(ANSWERED)  # the photo is sent again with the key
        assert page.value("document.getElementById('key-form').hidden")
        assert "7 classes" in page.text("#about")
        assert page.value("localStorage.length + sessionStorage.length") == 0


def test_the_page_polls_until_there_is_a_model(browser: Browser, folder: Path, tmp_path: Path):
    model_manager = ModelManager(Settings(bundle=folder, device="cpu"), NoTelemetry())
    with served(model_manager) as (url, _), opened(browser, url) as page:
        page.until("!document.getElementById('waiting').hidden")
        assert page.text("#name") == "No model yet"
        assert "still being loaded" in page.text("#waiting")
        page.choose("#file", written(tmp_path / "photo.jpg", photo(1)))
        page.until(REFUSED)
        assert page.text("#error-title") == "No model is served just now"
        model_manager.load()
        page.until(ANSWERED)  # without user input
        assert page.text("#name") == NAME
        assert page.value("document.getElementById('waiting').hidden")


def test_a_late_response_does_not_replace_a_newer_one(
    browser: Browser, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model_manager = ModelManager(Settings(bundle=folder, device="cpu"), NoTelemetry())
    model_manager.load()
    slow, quick = photo(7), photo(8)
    entered = {data: threading.Event() for data in (slow, quick)}
    go = {data: threading.Event() for data in (slow, quick)}
    ended = threading.Event()
    predict = model_manager.model.engine.predict

    async def delayed(data: bytes, tta: int = 0) -> Prediction:
        entered[data].set()
        try:
            await asyncio.to_thread(go[data].wait, 60)
            return await predict(data, tta)
        finally:
            if data == slow:
                ended.set()

    monkeypatch.setattr(model_manager.model.engine, "predict", delayed)
    with served(model_manager) as (url, stop), opened(browser, url) as page:
        page.choose("#file", written(tmp_path / "slow.jpg", slow))
        assert entered[slow].wait(60)
        page.choose("#file", written(tmp_path / "quick.jpg", quick))
        assert entered[quick].wait(60)
        assert page.value("document.body.matches('.busy')")  # the cancelled request shows no error
        go[quick].set()
        page.until(ANSWERED)
        go[slow].set()
        assert ended.wait(60)
        page.value("new Promise((resolve) => setTimeout(resolve, 100))")
        check(page, url, quick)
        stop()
        page.choose("#file", written(tmp_path / "last.jpg", quick))
        page.until(REFUSED)
        assert page.text("#error-title") == "The service can\u2019t be reached"
        assert page.text("#retry") == "Try again"
