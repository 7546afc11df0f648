"""Laws of writing aside: whole or not at all, and nothing left over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.errors import OptionError
from serving.utils.files import check_file, check_folder, is_running, write_aside


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


def test_an_error_names_the_file_and_not_what_lies_aside(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught, write_aside(tmp_path / "no" / "x") as aside:
        aside.write_text("new")
    assert caught.value.filename == str(tmp_path / "no" / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, write_aside(tmp_path / "folder") as aside:
        aside.write_text("new")
    assert caught.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as caught, write_aside(tmp_path / "x"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")


def test_what_can_not_be_written_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    check_file(Path("x.csv"))
    check_folder(Path("a/b"))
    Path("file").write_text("mine")
    wrong = {
        "--csv none/x.csv: there is no folder none; make it first": (check_file, "none/x.csv"),
        "--csv .: a folder; name a file": (check_file, "."),
        f"--csv file/x: {tmp_path / 'file'} can't be written to; choose another": (
            check_folder,
            "file/x",
        ),
    }
    for message, (check, path) in wrong.items():
        with pytest.raises(OptionError) as caught:
            check(Path(path), "--csv")
        assert str(caught.value) == message
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    closed = f"{tmp_path} can't be written to; choose another"
    with pytest.raises(OptionError, match=f"^--out x.csv: {closed}$"):
        check_file(Path("x.csv"))
    with pytest.raises(OptionError, match=f"^a/b: {closed}$"):
        check_folder(Path("a/b"), "")


def test_who_is_running():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert is_running(os.getpid())
    assert is_running(os.getppid())
    assert not is_running(ended.pid)
    assert not is_running(2**64)
