"""Atomic writes: the complete new file or the old one, and no temporary files left."""

import os
import stat
import subprocess
import sys
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
    partial_of,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("older", [None, "old"])
@pytest.mark.parametrize("fault", [None, RuntimeError, KeyboardInterrupt])
def test_a_file_is_complete_or_unchanged(
    tmp_path: Path, older: str | None, fault: type[BaseException] | None
):
    path = tmp_path / "file"
    if older:
        path.write_text(older)
    (tmp_path / ".file.0123456789abcdef.partial").write_text("longer, of a killed process")

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
    left = ".folder.0123456789abcdef.partial", ".folder.fedcba9876543210.partial"
    for name in (*left, *(["folder"] if older else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    for name in left:
        (tmp_path / name).chmod(0o1755)

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
    assert {entry.name for entry in tmp_path.iterdir()} <= {"folder"}


def test_a_folder_that_someone_gave_the_name_of_a_leftover_stays(tmp_path: Path) -> None:
    photos = tmp_path / ".photos.0123456789abcdef.partial"
    photos.mkdir()
    (photos / "1.jpg").touch()
    with atomic_write(tmp_path / "table") as partial:
        partial.touch()
    with atomic_folder(tmp_path / "folder") as folder:
        assert folder.stat().st_mode & stat.S_ISVTX
    assert (photos / "1.jpg").exists()
    assert not (tmp_path / "folder").stat().st_mode & stat.S_ISVTX


def test_only_unlocked_files_of_this_user_are_taken_for_leftovers(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    link, other = (tmp_path / f".{name}.0123456789abcdef.partial" for name in ("link", "other"))
    link.symlink_to(kept)
    (tmp_path / ".file.partial").touch()  # no random number
    other.touch()
    if os.geteuid() == 0:
        os.chown(other, 12345, 12345)
    else:
        other.unlink()
    with atomic_write(tmp_path / "used") as used:
        code = f"""if True:
            from pathlib import Path
            from serving.utils.files import atomic_write
            with atomic_write(Path({str(tmp_path / "file")!r})) as partial:
                partial.write_text("x")
        """
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        assert used.exists()  # another process has looked for leftovers
    assert link.is_symlink()
    assert (kept / "file").exists()
    assert (tmp_path / ".file.partial").exists()
    assert other.exists() or os.geteuid()
    assert [path.name for path in tmp_path.glob("*")].count("file") == 1


def test_a_link_at_the_path_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    path = tmp_path / "x"
    path.symlink_to(target)
    with atomic_write(path, 0o600) as partial:
        assert (partial.stat().st_mode & 0o777) == 0o600
        partial.write_text("new")
    assert (path.read_text(), path.is_symlink(), target.read_text()) == ("new", False, "mine")


@pytest.mark.parametrize("exchanges", [False, True])
def test_a_link_at_the_path_of_a_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    (tmp_path / "x").symlink_to(tmp_path / "target")
    with atomic_folder(tmp_path / "x") as partial:
        (partial / "new").touch()
    assert not (tmp_path / "x").is_symlink()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["old"]
    assert {path.name for path in tmp_path.iterdir()} == {"x", "target"}


def test_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "\xe4" * 127, os.fsdecode(b"\xff" * 255)):
        with atomic_write(tmp_path / name) as partial:
            partial.touch()
        assert (tmp_path / name).exists()
    assert partial_of(partial.name)
    assert partial_of(".a.b.0123456789abcdef.partial") == "a.b"
    assert partial_of(".a.partial") == partial_of("a.0123456789abcdef.partial") == ""
