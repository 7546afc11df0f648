"""The demo page in a browser, and a front for it in this process."""

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
# Of the photos of tests.support.tiny_bundle 1 is neither confident nor familiar, and 2 is both.
THRESHOLDS = {"confident": 0.8, "energy": -3.2}
NAME = "<b>tiny</b>"

ANSWERED = "!document.getElementById('answer').hidden && !document.querySelector('.busy')"
REFUSED = "!document.getElementById('trouble').hidden && !document.querySelector('.busy')"
_BARS = "[...document.querySelectorAll('#bars li')].map((li) => li.innerText.split('\\n'))"


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, which must have nothing to complain about at its end."""
    with browser.page(url, **options) as page:
        yield page
        assert page.complaints() == []


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def percent(probability: float) -> str:
    """As the page writes it."""
    if 0 < probability < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < probability < 1 else f"{100 * probability:.1f} %"


def check(page: Page, url: str, data: bytes, query: str = "") -> dict[str, Any]:
    """The page says what the service says of `data`, and that is returned."""
    page.until(ANSWERED)
    answer: dict[str, Any] = post(f"{url}/predict{query}", data).json()
    bars = [[part for part in item if part] for item in page.value(_BARS)]
    assert bars == [[p["label"], percent(p["probability"])] for p in answer["predictions"]]
    sure = {None: "", True: "A confident answer.", False: "Not a confident answer; confident ones"}
    assert page.text("#sure").startswith(sure[answer["confident"]])
    assert bool(page.text("#strange")) == answer["out_of_distribution"]
    return answer


class Quiet:
    """Stands for the telemetry."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: None


async def no_bentoml(scope, receive, send) -> None:
    raise AssertionError("not for BentoML")


@contextmanager
def fronted(model_manager: ModelManager) -> Iterator[tuple[str, Callable[[], None]]]:
    """The front over loopback: where it is, and how to end it."""
    port = free_port()
    options = {"lifespan": "off", "ws": "none", "log_config": None}
    server = uvicorn.Server(
        uvicorn.Config(App(no_bentoml, lambda: model_manager), port=port, **options)
    )
    thread = threading.Thread(target=server.run)

    def end() -> None:
        server.should_exit = True
        thread.join(30)

    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}", end
    finally:
        end()
        model_manager.close()
