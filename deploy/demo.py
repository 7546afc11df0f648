"""The last step of `make demo`: serve a bundle, classify one photo, print the answer, stop.

    python deploy/demo.py BUNDLE [PHOTO]

Without PHOTO, it uses a photo of the embedded data set, which needs the package `training`. All
else needs only the standard library.
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY_SECONDS = 90.0
STOP_SECONDS = 15.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 needs no proxy


def main(arguments: list[str]) -> int:
    """Run the demonstration; return the exit status."""
    if not 1 <= len(arguments) <= 2:
        print("usage: demo.py BUNDLE [PHOTO]", file=sys.stderr)
        return 2
    bundle = arguments[0]
    photo = Path(arguments[1]) if len(arguments) == 2 else sample_photo()
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("fledge")),
        *("serve", bundle, "--host", "127.0.0.1", "--port", str(port)),
    ]
    print(f"$ {shlex.join(['fledge', *command[1:]])}", flush=True)
    try:
        with running(command) as service:
            address = f"http://127.0.0.1:{port}"
            seconds = wait_until_ready(service, address)
            print(f"ready after {seconds:.1f} s\n")
            data = shlex.quote(f"@{photo}")
            print(f"$ curl --data-binary {data} -H 'Content-Type: image/jpeg' {address}/predict")
            print_answer(predict(address, photo))
    except (DemoError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


class DemoError(Exception):
    """The service did not start or did not answer."""


def sample_photo() -> Path:
    """Return the middle photo of the embedded data set."""
    from training.data.sample import cached_sample

    photos = sorted(cached_sample().rglob("*.jpg"))
    return photos[len(photos) // 2]


def free_port() -> int:
    """Return a TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` during the block, and stop it at the end, also after an error."""
    service = subprocess.Popen(command)
    try:
        yield service
    finally:
        if service.poll() is None:
            service.terminate()
            try:
                service.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()


def wait_until_ready(service: subprocess.Popen[bytes], address: str) -> float:
    """Return the seconds until `/readyz` answered 200.

    Raises:
        DemoError: The service ended, or took longer than `READY_SECONDS`.
    """
    start = time.monotonic()
    while (waited := time.monotonic() - start) < READY_SECONDS:
        if service.poll() is not None:
            raise DemoError(
                f"the service ended with status {service.returncode} before it was ready"
            )
        try:
            with DIRECT.open(f"{address}/readyz", timeout=2):
                return waited
        except OSError:
            time.sleep(0.1)
    raise DemoError(f"the service was not ready within {READY_SECONDS:.0f} s")


def predict(address: str, photo: Path) -> dict[str, object]:
    """Return the service's answer to one photo.

    Raises:
        DemoError: The service answered with an error.
    """
    request = urllib.request.Request(
        f"{address}/predict", data=photo.read_bytes(), headers={"Content-Type": "image/jpeg"}
    )
    try:
        with DIRECT.open(request, timeout=30) as response:
            answer: dict[str, object] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise DemoError(f"/predict answered {error.code}: {error.read().decode()}") from error


def print_answer(answer: dict[str, object]) -> None:
    """Print the answer as JSON, one prediction per line."""

    def to_text(value: object) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        return json.dumps(value)

    print("{", ",\n".join(f'  "{key}": {to_text(answer[key])}' for key in answer), "}", sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
