"""The demo page in a browser, and a server for it in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from serving.http.app import App
from serving.http.model_manager import ModelManager
from tests.support.browser import Browser, Page
from tests.support.live_server import free_port, post

LABELS = ("<img src=x onerror=alert(1)>", "rose & co", "זית", "tulip", "poppy", "lily", "iris")
# With these, photo 1 of tests.support.tiny_bundle is not confident and out of distribution, and
# photo 2 is confident and in distribution.
THRESHOLDS = {"confident": 0.8, "energy": -3.2}
NAME = "<b>tiny</b>"

ANSWERED = "!document.getElementById('answer').hidden && !document.querySelector('.busy')"
REFUSED = "!document.getElementById('error').hidden && !document.querySelector('.busy')"
_BARS = "[...document.querySelectorAll('#bars li')].map((li) => li.innerText.split('\\n'))"


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page; at the end it must have reported no errors to the browser."""
    with browser.page(url, **options) as page:
        yield page
        assert page.errors() == []


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def percent(probability: float) -> str:
    """As the page formats it."""
    if 0 < probability < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < probability < 1 else f"{100 * probability:.1f} %"


def check(page: Page, url: str, data: bytes, query: str = "") -> dict[str, Any]:
    """Check that the page shows the service's answer for `data`, and return the answer."""
    page.until(ANSWERED)
    answer: dict[str, Any] = post(f"{url}/predict{query}", data).json()
    bars = [[part for part in item if part] for item in page.value(_BARS)]
    assert bars == [[p["label"], percent(p["probability"])] for p in answer["predictions"]]
    texts = {None: "", True: "A confident answer.", False: "Not a confident answer; confident ones"}
    assert page.text("#confidence").startswith(texts[answer["confident"]])
    assert bool(page.text("#unfamiliar")) == answer["out_of_distribution"]
    return answer


class NoTelemetry:
    """Accepts and drops all values."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: None


async def no_bentoml(scope, receive, send) -> None:
    raise AssertionError("passed on to BentoML")


@contextmanager
def served(model_manager: ModelManager) -> Iterator[tuple[str, Callable[[], None]]]:
    """`App` over loopback: its URL, and a function that stops it."""
    port = free_port()
    options = {"lifespan": "off", "ws": "none", "log_config": None}
    server = uvicorn.Server(
        uvicorn.Config(App(no_bentoml, lambda: model_manager), port=port, **options)
    )
    thread = threading.Thread(target=server.run)

    def stop() -> None:
        server.should_exit = True
        thread.join(30)

    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}", stop
    finally:
        stop()
        model_manager.close()
