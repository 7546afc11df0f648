"""Fixtures: one image for all tests here, and one container for tests that don't change it.

Processes of pytest-xdist build the image one after the other; all but the first find it built.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import container_engine
from tests.support.container_engine import Container
from tests.support.tiny_bundle import tiny_bundle

WITH_EXTRAS = "fledge:test-extras"


def build_once(factory: pytest.TempPathFactory, image: str, *variables: str) -> float:
    """Build an image, unless another process has; the seconds that it took."""
    container_engine.skip_or_fail(container_engine.missing_engine())
    shared = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    seconds = shared / f"{image.replace(':', '-')}-seconds"
    with (shared / "build-lock").open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        if not seconds.exists():
            begun = time.monotonic()
            container_engine.build(*variables, image=image)
            seconds.write_text(str(time.monotonic() - begun))
    return float(seconds.read_text())


@pytest.fixture(scope="session")
def build_seconds(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Build the image; the seconds that it took."""
    return build_once(tmp_path_factory, container_engine.IMAGE)


@pytest.fixture(scope="session")
def image_with_extras(build_seconds: float, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build the image that reads HEIC and JPEG XL; its name."""
    build_once(tmp_path_factory, WITH_EXTRAS, "EXTRAS=heif,jxl")
    return WITH_EXTRAS


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return container_engine.make_readable(tiny_bundle(tmp_path_factory.mktemp("docker") / "bundle"))


@pytest.fixture(scope="session")
def container(build_seconds: float, bundle: Path) -> Iterator[Container]:
    started = container_engine.start(bundle, options=["--health-interval", "1s"])
    yield started
    started.remove()
