"""Checks before the start that run in this process."""

from pathlib import Path

import pytest

from serving.errors import BundleError, OptionError
from serving.inference.runtime import _why_not
from serving.server.preflight import check
from serving.settings import Settings
from tests.support.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def test_a_precision_that_the_bundle_lacks_is_refused(folder: Path):
    with pytest.raises(OptionError, match="int8"):
        check(Settings(bundle=folder, precision="int8"))


def test_a_missing_bundle_is_refused(folder: Path):
    with pytest.raises(BundleError):
        check(Settings(bundle=folder / "nothing"))


@pytest.mark.skipif(_why_not("cuda") is None, reason="this machine has a GPU")
def test_a_missing_gpu_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLEDGE_BUNDLE", str(folder))
    monkeypatch.setenv("FLEDGE_DEVICE", "cuda")
    with pytest.raises(OptionError, match="device = cuda"):
        check(Settings.from_env())
