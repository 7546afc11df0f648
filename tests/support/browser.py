"""Headless Chromium, controlled over its DevTools pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
TIMEOUT = 60
"""Seconds; long enough for a machine under load."""

# Chromium reads commands from file descriptor 3 and writes to 4.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
    "os.execv(sys.argv[3], sys.argv[3:])"
)
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
)


class Browser:
    """Sends commands; collects the events that arrive in between."""

    def __init__(self, process: subprocess.Popen[bytes], read_fd: int, write_fd: int) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._read_fd, self._write_fd = read_fd, write_fd
        self._rest = b""
        self._last = 0

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._write_fd, data) :]
        while True:
            answer = self._next()
            if answer.get("id") != self._last:
                self.events.append(answer)
            elif "error" in answer:
                raise AssertionError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._rest:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self._read_fd], [], [], left)
            chunk = os.read(self._read_fd, 2**16) if ready else b""
            if not chunk:
                raise AssertionError("no answer from Chromium")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    @contextmanager
    def page(self, url: str, width: int = 1280, **media: str) -> Iterator[Page]:
        """Open `url` in a new tab; `media`: features such as prefers_color_scheme="dark"."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "DOM"):
            page.call(f"{domain}.enable")
        features = [
            {"name": name.replace("_", "-"), "value": value} for name, value in media.items()
        ]
        page.call("Emulation.setEmulatedMedia", features=features)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **screen)
        page.call("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        try:
            page.call("Page.navigate", url=url)
            page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self.session, **params)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + TIMEOUT
        while not self.value(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                text = self.value("document.body.innerText")
                raise AssertionError(f"not within {TIMEOUT} s: {condition}\n{text}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """The visible text of an element; empty if it is hidden."""
        script = "((element) => element.checkVisibility() ? element.innerText : '')"
        return str(self.value(f"{script}(document.querySelector({selector!r}))"))

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39}
            text = {"Enter": "\r", " ": " "}.get(key, "") if kind == "keyDown" else ""
            more = {"windowsVirtualKeyCode": codes[key], "text": text}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key.strip(), **more)

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """Uncaught exceptions of scripts, and errors such as violations of the CSP."""
        ours = [event for event in self.browser.events if event.get("sessionId") == self.session]
        thrown = [str(e["params"]) for e in ours if e["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in ours if e["method"] == "Log.entryAdded"]
        # Answers with a status 4xx are logged by source `network`; tests provoke them.
        logged = [e["text"] for e in entries if e["level"] == "error" and e["source"] != "network"]
        return thrown + logged


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Run Chromium with its profile in `folder`."""
    assert CHROMIUM
    (command_read, command_write), (event_read, event_write) = _pipe(), _pipe()
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    pipes = (str(command_read), str(event_write))
    start = (sys.executable, "-I", "-S", "-c", _START, *pipes, CHROMIUM)
    process = subprocess.Popen(
        [*start, *_OPTIONS, *root, f"--user-data-dir={folder}"],
        pass_fds=(command_read, event_write),
        env={**os.environ, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(event_write)
    browser = Browser(process, event_read, command_write)
    try:
        yield browser
    finally:
        try:
            browser.call("Browser.close")
            process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        os.close(event_read)
        os.close(command_write)


def _pipe() -> tuple[int, int]:
    """A pipe with both descriptors above 4, since 3 and 4 are overwritten by _START."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
