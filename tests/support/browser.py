"""A real browser: headless Chromium, told what to do over its DevTools pipe."""

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
PATIENCE = 60
"""Seconds, for a machine under load."""

# Chromium reads from file 3 and writes to file 4.
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
    """Sends commands, gathers what Chromium tells meanwhile."""

    def __init__(self, process: subprocess.Popen[bytes], told: int, tell: int) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._told, self._tell = told, tell
        self._rest = b""
        self._last = 0

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._tell, data) :]
        while True:
            got = self._next()
            if got.get("id") != self._last:
                self.events.append(got)
            elif "error" in got:
                raise AssertionError(f"{method}: {got['error']['message']}")
            else:
                return got["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._told], [], [], max(0, until - time.monotonic()))
            chunk = os.read(self._told, 2**16) if ready else b""
            if not chunk:
                raise AssertionError("Chromium says nothing any more")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        got: dict[str, Any] = json.loads(line)
        return got

    @contextmanager
    def page(self, url: str, width: int = 1280, **media: str) -> Iterator[Page]:
        """`url` in a tab of its own; `media` such as prefers_color_scheme="dark"."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "DOM"):
            page.call(f"{domain}.enable")
        features = [
            {"name": name.replace("_", "-"), "value": value} for name, value in media.items()
        ]
        page.call("Emulation.setEmulatedMedia", features=features)
        phone = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **phone)
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
        """What JavaScript makes of `expression`."""
        asked = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        got = self.call("Runtime.evaluate", expression=expression, **asked)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until `condition` holds."""
        until = time.monotonic() + PATIENCE
        while not self.value(f"Boolean({condition})"):
            if time.monotonic() > until:
                raise AssertionError(f"never: {condition}\n{self.value('document.body.innerText')}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What a person reads there; nothing where it is hidden."""
        script = "((found) => found.checkVisibility() ? found.innerText : '')"
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

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Exceptions of scripts, and what the policy refused."""
        ours = [event for event in self.browser.events if event.get("sessionId") == self.session]
        thrown = [str(e["params"]) for e in ours if e["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in ours if e["method"] == "Log.entryAdded"]
        # A 4xx is an entry of the network's, and an answer of ours.
        logged = [e["text"] for e in entries if e["level"] == "error" and e["source"] != "network"]
        return thrown + logged


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start Chromium with its profile in `folder`, and end it."""
    assert CHROMIUM
    (theirs, tell), (told, back) = _pipe(), _pipe()
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    start = (sys.executable, "-I", "-S", "-c", _START, str(theirs), str(back), CHROMIUM)
    process = subprocess.Popen(
        [*start, *_OPTIONS, *root, f"--user-data-dir={folder}"],
        pass_fds=(theirs, back),
        env={**os.environ, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(back)
    browser = Browser(process, told, tell)
    try:
        yield browser
    finally:
        try:
            browser.call("Browser.close")
            process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        os.close(told)
        os.close(tell)


def _pipe() -> tuple[int, int]:
    """A pipe with both ends above 4: those up to it are overwritten at the start."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
