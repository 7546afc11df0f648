"""A bundle in BentoML's store is found by BentoML's commands and can be served from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.bundle import storage
from serving.inference.load import verify
from tests.support.tiny_bundle import tiny_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bento(tmp_path):
    """Runs Python with a new store; returns its stdout."""
    env = {**os.environ, "BENTOML_HOME": str(tmp_path / "store"), "BENTOML_DO_NOT_TRACK": "True"}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_bundle_is_stored_found_and_read_and_can_be_stored_again(bento, tmp_path):
    folder = tiny_bundle(tmp_path / "bundle")
    manifest = storage.read(folder).manifest
    code = (
        "import pathlib, bentoml, export.bentoml_store as store\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "for _ in range(2): store.register(folder)\n"  # the second finds the first
        "print(bentoml.models.get('tiny:latest').path)"
    )
    first, second, path = bento("-c", code).splitlines()
    assert first == second
    assert f"tiny:{manifest.version}" in first
    assert path in first
    assert f"tiny:{manifest.version}" in bento("-m", "bentoml", "models", "list", "-o", "json")
    assert storage.read(Path(path)).manifest == manifest
    assert any(line.startswith("fp32 on CPUExecutionProvider") for line in verify(Path(path)))


@pytest.mark.parametrize(
    ("name", "tag"),
    [("Blüten 2026", "bl-ten-2026"), ("a/b", "a-b"), ("...", "model"), ("x" * 99, "x" * 63)],
)
def test_any_name_becomes_a_valid_bentoml_name(name, tag):
    from bentoml import Tag

    from export.bentoml_store import _name

    assert _name(name) == tag
    assert Tag(_name(name)).name == tag
