"""The image with the extras that read HEIC and JPEG XL, and the answers of the one without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness.plugin_formats import heic, jpeg_xl
from tests.robustness.scene import scene
from tests.support import container_engine
from tests.support.container_engine import Container

pytestmark = pytest.mark.docker

MAX_MORE_MB = 45


@pytest.fixture(scope="module")
def with_extras(image_with_extras: str, bundle: Path) -> Iterator[Container]:
    started = container_engine.start(bundle, image=image_with_extras)
    yield started
    started.remove()


def own_bytes(container: Container) -> int:
    code = """
from pathlib import Path
print(sum(path.lstat().st_size for path in Path("/opt/venv").rglob("*")))
"""
    return int(container.python(code))


def test_the_image_with_the_extras_reads_both_formats(
    container: Container, with_extras: Container
) -> None:
    for data in (heic(scene()), jpeg_xl(scene())):
        status, _, answer = with_extras.post("/predict", data)
        assert (status, answer["applied"]) == (200, [])
        status, _, problem = container.post("/predict", data)
        assert (status, problem["code"]) == (415, "unsupported-format")
        assert "make image EXTRAS=" in problem["detail"]
    more = own_bytes(with_extras) - own_bytes(container)
    assert 10e6 < more <= MAX_MORE_MB * 1e6


def test_an_unknown_extra_fails_the_build_in_one_line(build_seconds: float) -> None:
    done = container_engine.make(
        "image", "EXTRAS=heic", image="fledge:test-wrong", check=False, limit=300
    )
    assert done.returncode != 0
    assert "EXTRAS=heic: use heif, jxl, or heif,jxl" in done.stdout + done.stderr
