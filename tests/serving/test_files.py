"""Laws of writing aside: whole or not at all, and nothing left over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.files import is_running, write_aside


@pytest.mark.parametrize("older", [None, "old"])
@pytest.mark.parametrize("fault", [None, RuntimeError, KeyboardInterrupt])
def test_a_file_is_new_and_whole_or_as_it_was(
    tmp_path: Path, older: str | None, fault: type[BaseException] | None
):
    path = tmp_path / "file"
    if older:
        path.write_text(older)
    (tmp_path / ".file.partial").write_text("longer, and left by a write that was killed")

    def write() -> None:
        with write_aside(path) as aside:
            aside.write_text("new")
            assert (path.read_text() if path.exists() else None) == older
            if fault:
                raise fault

    if fault:
        with pytest.raises(fault):
            write()
    else:
        write()
    expected = older if fault else "new"
    assert [p.read_text() for p in tmp_path.iterdir()] == ([expected] if expected else [])


def test_who_is_running():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert is_running(os.getpid())
    assert is_running(os.getppid())
    assert not is_running(ended.pid)
    assert not is_running(2**64)
