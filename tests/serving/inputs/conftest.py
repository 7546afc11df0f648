from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.inputs import sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reader() -> Iterator[sources.Reader]:
    reader = sources.Reader()
    yield reader
    reader.close()
