"""Atomic writes: the complete new file or the old one, and no temporary files left."""

import os
from pathlib import Path

import pytest

from serving.errors import OptionError
from serving.utils import files
from serving.utils.files import (
    atomic_folder,
    atomic_write,
    check_file,
    check_folder,
    exchange,
    files_below,
)


@pytest.mark.parametrize("older", [None, "old"])
@pytest.mark.parametrize("fault", [None, RuntimeError, KeyboardInterrupt])
def test_a_file_is_complete_or_unchanged(
    tmp_path: Path, older: str | None, fault: type[BaseException] | None
):
    path = tmp_path / "file"
    if older:
        path.write_text(older)
    (tmp_path / ".file.partial").write_text("longer, and left by a killed process")

    def write() -> None:
        with atomic_write(path) as partial:
            partial.write_text("new")
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


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "no" / "x") as partial:
        partial.write_text("new")
    assert caught.value.filename == str(tmp_path / "no" / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_write(tmp_path / "folder") as partial:
        partial.write_text("new")
    assert caught.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "x"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")


def test_an_output_that_can_not_be_written_is_refused_before_the_work(
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


def test_the_files_of_a_folder_that_can_not_be_read_are_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b", "a/c"):
        (tmp_path / name).touch()
    assert files_below(tmp_path) == [tmp_path / "a" / "c", tmp_path / "b"]
    scandir = os.scandir

    def closed(path: str) -> object:
        if Path(path).name == "a":  # root may read every folder
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError):
        files_below(tmp_path)


def test_two_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "a", tmp_path / "b"):  # tmpfs, ext4, xfs, btrfs, APFS
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError) as caught:
        exchange(tmp_path / "none", tmp_path / "b")
    assert caught.value.filename == str(tmp_path / "b")


@pytest.mark.parametrize("exchanges", [False, True])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("fault", [None, RuntimeError, KeyboardInterrupt])
def test_a_folder_is_complete_or_unchanged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exchanges: bool,
    older: bool,
    fault: type[BaseException] | None,
):
    if not exchanges:  # such as NFS
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    path = tmp_path / "folder"
    for name in (".folder.partial", ".folder.older", *(["folder"] if older else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()

    def write() -> None:
        with atomic_folder(path) as partial:
            (partial / "new").touch()
            if fault:
                raise fault

    if fault:
        with pytest.raises(fault):
            write()
    else:
        write()
    assert [file.name for file in path.glob("*")] == (
        ["new"] if not fault else ["old"] if older else []
    )
    assert {entry.name for entry in tmp_path.iterdir()} <= {"folder", ".folder.older"}
    assert fault or not (tmp_path / ".folder.older").exists()
