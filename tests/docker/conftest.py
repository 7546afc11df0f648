"""Fixtures: one image for all tests here, and one container for tests that don't change it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import container_engine
from tests.support.container_engine import Container
from tests.support.tiny_bundle import tiny_bundle


@pytest.fixture(scope="session")
def build_seconds() -> float:
    """Build the image; the seconds that it took."""
    container_engine.skip_or_fail(container_engine.missing_engine())
    begun = time.monotonic()
    container_engine.build()
    return time.monotonic() - begun


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return container_engine.make_readable(tiny_bundle(tmp_path_factory.mktemp("docker") / "bundle"))


@pytest.fixture(scope="session")
def container(build_seconds: float, bundle: Path) -> Iterator[Container]:
    started = container_engine.start(bundle)
    yield started
    started.remove()
