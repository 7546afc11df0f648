"""Every way to change a file is counted, fails with the asked error, and does half of a write."""

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving.utils.files import atomic_folder, atomic_write, partial_of
from tests.faults.file_operations import KILLED, FileOperations, Operation

ROOT = Path(__file__).parents[2]


def test_operations_below_the_folder_are_counted_and_others_are_not(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    with FileOperations(folder) as operations:
        other.write_text("x")
        with atomic_write(folder / "a") as partial:
            partial.write_text("text")
        with atomic_folder(folder / "b") as partial:
            (partial / "c").write_bytes(b"bytes")
        np.save(folder / "d.npy", np.zeros(3))
        with (folder / "e").open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, 5)
            file.truncate(3)
        (folder / "link").symlink_to("a")
        shutil.rmtree(folder / "b")
        (folder / "a").rename(folder / "f")
        assert (folder / "f").read_text() == "text"
    kinds = [operation.kind for operation in operations.operations]
    assert any(kind == "write" and partial_of(path) == "a" for kind, path in operations.operations)
    assert Operation("write", "d.npy") in operations.operations
    assert Operation("unlink", os.path.join("b", "c")) in operations.operations
    assert {*kinds} == {
        "open", "write", "read", "fsync", "replace", "unlink", "mkdir", "list", "rename", "rmdir",
        "allocate", "truncate", "symlink", "lock",
    }  # fmt: skip
    assert open is io.open  # everything is put back
    assert (folder / "f").read_text() == "text"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_write_fails_after_half_of_its_bytes(tmp_path: Path, error: int) -> None:
    with (
        FileOperations(tmp_path, 1, error) as operations,
        pytest.raises(OSError, match=f"Errno {error}") as caught,
    ):
        (tmp_path / "file").write_bytes(b"12345678")
    assert (caught.value.errno, caught.value.filename) == (error, None)
    assert operations.failed
    assert (tmp_path / "file").read_bytes() == b"1234"


def test_a_full_disk_stays_full_and_still_removes_files(tmp_path: Path) -> None:
    with FileOperations(tmp_path, 0, errno.ENOSPC):
        for _ in range(2):
            with pytest.raises(OSError, match="No space left") as caught:
                (tmp_path / "file").write_text("x")
            assert caught.value.filename == str(tmp_path / "file")
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "folder").mkdir()
        (tmp_path / "file").unlink(missing_ok=True)


def test_a_kill_ends_the_process_without_cleanup(tmp_path: Path) -> None:
    program = f"""if True:
        from pathlib import Path
        from serving.utils.files import atomic_write
        from tests.faults.file_operations import FileOperations
        folder = Path({str(tmp_path)!r})
        with FileOperations(folder, 3), atomic_write(folder / "file") as partial:
            partial.write_bytes(b"12345678")
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == KILLED
    (left,) = tmp_path.iterdir()
    assert partial_of(left.name) == "file"
    assert left.read_bytes() == b"1234"
