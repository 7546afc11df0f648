"""Build images and start containers through the make targets, as an operator does."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.live_server import free_port

ROOT = Path(__file__).parents[2]
DOCKER = os.environ.get("DOCKER", "docker")
REQUIRED = os.environ.get("FLEDGE_REQUIRE_DOCKER") == "1"
IMAGE = "fledge:test"
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for 127.0.0.1
# Settings of the make that started these tests must not reach the make that they start.
MAKE_VARIABLES = ("ARGS", "BUNDLE", "TARGET", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
ENV = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}


def run(
    *command: str, check: bool = True, limit: float = 60, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=ENV | (env or {}),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"{shlex.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def make(
    target: str, *variables: str, image: str = IMAGE, check: bool = True, limit: float = 60
) -> subprocess.CompletedProcess[str]:
    command = ("make", target, f"DOCKER={DOCKER}", f"IMAGE={image}", *variables)
    return run(*command, check=check, limit=limit)


def build(*variables: str, image: str = IMAGE, check: bool = True) -> str:
    """Run `make image`; returns its output."""
    base = os.environ.get("BASE_IMAGE")
    variables = (*([f"BASE_IMAGE={base}"] if base else []), *variables)
    done = make("image", *variables, image=image, check=check, limit=900)
    return done.stdout + done.stderr


def run_to_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a container that exits by itself."""
    return run(DOCKER, "run", "--rm", *HARDENED, *arguments, check=False)


def skip_or_fail(problem: str) -> None:
    """Skip the test with the problem, if there is one; fail if FLEDGE_REQUIRE_DOCKER=1."""
    if problem and REQUIRED:
        pytest.fail(f"FLEDGE_REQUIRE_DOCKER=1, but {problem}")
    if problem:
        pytest.skip(problem)


def missing_engine() -> str:
    """The problem if no container engine answers, else an empty string."""
    if not shutil.which(DOCKER):
        return f"no container engine answers: no command {DOCKER!r}"
    answer = run(DOCKER, "info", check=False)
    return f"no container engine answers: {answer.stderr.strip()}" if answer.returncode else ""


def make_readable(bundle: Path) -> Path:
    """Make a bundle readable for the container's user, as an operator must."""
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return bundle


@dataclass
class Container:
    name: str
    port: int
    ready_after: float = 0.0  # seconds from `docker run` to the first 200 of /readyz

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def python(self, code: str) -> str:
        return run(DOCKER, "exec", self.name, "python", "-c", code).stdout.strip()

    def inspect(self, what: str) -> str:
        return run(DOCKER, "inspect", "--format", f"{{{{{what}}}}}", self.name).stdout.strip()

    def logs(self) -> str:
        done = run(DOCKER, "logs", self.name, check=False)
        return done.stdout + done.stderr

    def get(self, path: str) -> dict:
        with DIRECT.open(self.address + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, data: bytes) -> tuple[int, str, dict]:
        request = urllib.request.Request(
            self.address + path, data=data, headers={"Content-Type": "image/jpeg"}
        )
        try:
            with DIRECT.open(request, timeout=30) as answer:
                return answer.status, answer.headers.get_content_type(), json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get_content_type(), json.load(error)

    def wait_until_ready(self, begun: float, limit: float = 60) -> Container:
        while time.monotonic() - begun < limit:
            try:
                with DIRECT.open(f"{self.address}/readyz", timeout=2):
                    self.ready_after = time.monotonic() - begun
                    return self
            except OSError:
                time.sleep(0.02)
        logs = self.logs()
        self.remove()
        pytest.fail(f"not ready within {limit:.0f} s\n{logs}")

    def remove(self) -> None:
        run(DOCKER, "rm", "--force", self.name, check=False)


def start(
    bundle: Path,
    watch: Callable[[str], None] = lambda name: None,
    *,
    options: Sequence[str] = (),
    image: str = IMAGE,
) -> Container:
    """Run `make run-image` and wait until it is ready; `watch` gets the container's name first."""
    container = Container(f"fledge-test-{uuid.uuid4().hex[:8]}", free_port())
    arguments = shlex.join(["--detach", "--name", container.name, *options])
    begun = time.monotonic()
    make(
        "run-image",
        f"BUNDLE={bundle}",
        f"PORT={container.port}",
        f"DOCKER_RUN_ARGS={arguments}",
        image=image,
    )
    watch(container.name)
    return container.wait_until_ready(begun)
