"""Files beside the table of scores: unfinished jobs that were cut or changed, links, other users.

A killed process leaves a job of 13 images in shards of 5, of which two are complete.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fledge
from serving.errors import OptionError
from serving.scoring import journal
from tests.support.tiny_bundle import photo, tiny_bundle

ROOT = Path(__file__).parents[2]
IMAGES = 13

KILLED = """
import os, signal, sys
import fledge
from serving.errors import OptionError
from serving.scoring import journal
journal.SIZE = 5
write, count = journal.ScoringJournal.write, []
def written(self, *arguments):
    write(self, *arguments)
    count.append(1)
    if len(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
journal.ScoringJournal.write = written
fledge.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a bundle, the right table, and what the killed process left."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_bundle(folder / "bundle")
    (folder / "photos").mkdir()
    for number in range(IMAGES):
        (folder / "photos" / f"{number}.jpg").write_bytes(photo(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SIZE", 5)
        assert fledge.main(command(folder, "right.csv")) == 0
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *command(folder, "out.csv")], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert (folder / ".out.csv.parts" / "00001.jsonl").exists()
    return folder


@pytest.fixture
def left(killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of what the killed process left."""
    monkeypatch.setattr(journal, "SIZE", 5)
    shutil.copytree(killed / ".out.csv.parts", tmp_path / ".out.csv.parts")
    return tmp_path


def command(folder: Path, out: str, to: Path | None = None) -> list[str]:
    return [
        "score", str(folder / "photos"), "--bundle", str(folder / "bundle"),
        "--out", str((to or folder) / out), "--device", "cpu", "--workers", "1",
    ]  # fmt: skip


def lines(count: int) -> Callable[[bytes], bytes]:
    return lambda data: b"".join(data.splitlines(keepends=True)[:count])


def swap(data: bytes) -> bytes:
    first, second, *rest = data.splitlines(keepends=True)
    return b"".join((second, first, *rest))


def digit(data: bytes) -> bytes:
    """Change one digit of a probability."""
    at = data.index(b'"probability": 0.') + 17
    return data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]


def test_an_unchanged_job_is_continued(
    killed: Path, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fledge.main(command(killed, "out.csv", left)) == 0
    assert "going on: 10 of 13 images are done" in capsys.readouterr().out
    assert (left / "out.csv").read_bytes() == (killed / "right.csv").read_bytes()
    assert not (left / ".out.csv.parts").exists()


@pytest.mark.parametrize(
    "change",
    [lines(0), lines(1), lines(3), lines(5), swap, digit, lambda data: data + data.splitlines()[1]],
    ids=["empty", "head", "2 rows", "4 rows", "swapped", "digit", "more"],
)
def test_a_shard_that_was_cut_or_changed_is_scored_again(
    killed: Path, left: Path, change: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = left / ".out.csv.parts" / "00001.jsonl"
    path.write_bytes(change(path.read_bytes()))
    assert fledge.main(command(killed, "out.csv", left)) == 0
    printed = capsys.readouterr().out
    assert "damaged: 1 parts of the unfinished job; they are scored again" in printed
    assert "going on: 5 of 13" in printed
    assert (left / "out.csv").read_bytes() == (killed / "right.csv").read_bytes()


def test_a_shard_in_the_place_of_another_is_scored_again(killed: Path, left: Path) -> None:
    parts = left / ".out.csv.parts"
    shutil.copyfile(parts / "00000.jsonl", parts / "00001.jsonl")
    shutil.copyfile(parts / "00000.jsonl", parts / "00002.jsonl")
    assert fledge.main(command(killed, "out.csv", left)) == 0
    assert (left / "out.csv").read_bytes() == (killed / "right.csv").read_bytes()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("inputs.jsonl", lines(6)),
        ("inputs.jsonl", lines(10)),
        ("inputs.jsonl", lines(0)),
        ("inputs.jsonl", swap),
        ("inputs.jsonl", lambda data: data + b'"14.jpg"\n'),
        ("inputs.jsonl", lambda data: data[:-3]),
        ("inputs.json", lambda data: data.replace(b'"images": 13', b'"images": 10')),
        ("inputs.json", lambda data: b""),
        ("inputs.json", lambda data: b"[" * 100_000),
        ("job.json", lambda data: data.replace(b'"journal": 2', b'"journal": 1')),
        ("job.json", lambda data: b"[" * 100_000),
    ],
)
def test_a_list_of_images_that_was_cut_or_changed_is_refused(
    killed: Path,
    left: Path,
    name: str,
    change: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = left / ".out.csv.parts" / name
    path.write_bytes(change(path.read_bytes()))
    assert fledge.main(command(killed, "out.csv", left)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(left / "out.csv") in error
    assert error.endswith("add --restart\n")
    assert not (left / "out.csv").exists()
    assert fledge.main([*command(killed, "out.csv", left), "--restart"]) == 0
    assert (left / "out.csv").read_bytes() == (killed / "right.csv").read_bytes()


def test_a_job_of_the_version_before_is_refused_and_can_be_restarted(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no checksums, so nothing tells whether it is whole."""
    parts = tmp_path / ".out.csv.parts"
    parts.mkdir()
    (parts / "job.json").write_text(json.dumps({"bundle": "tiny:1", "tta": 0}))
    (parts / "inputs.jsonl").write_text('"a.jpg"\n')
    (parts / "skipped.json").write_text("0")
    (parts / "lock").touch()
    assert fledge.main(command(killed, "out.csv", tmp_path)) == 2
    error = capsys.readouterr().err
    assert "of another version of Fledge" in error
    assert error.endswith("add --restart\n")
    assert fledge.main([*command(killed, "out.csv", tmp_path), "--restart"]) == 0
    assert not parts.exists()


def test_the_list_is_cut_while_the_job_runs(
    killed: Path, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = journal.ScoringJournal.write

    def written(self: journal.ScoringJournal, *arguments: object) -> None:
        write(self, *arguments)  # type: ignore[arg-type]
        path = self.folder / "00000.jsonl"
        path.write_bytes(path.read_bytes()[:-20])

    monkeypatch.setattr(journal.ScoringJournal, "write", written)
    assert fledge.main(command(killed, "out.csv", left)) == 2
    assert not (left / "out.csv").exists()


def test_links_at_the_guessable_names_are_not_followed(killed: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    for name in (".out.csv.partial", "out.csv", "out.summary.json", ".out.summary.json.partial"):
        (work / name).symlink_to(precious)
    assert fledge.main(command(killed, "out.csv", work)) == 0
    assert precious.read_text() == "mine"
    assert (work / "out.csv").read_bytes() == (killed / "right.csv").read_bytes()
    assert not (work / "out.csv").is_symlink()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["link", "file", "foreign", "other", "fifo", "locked by a link", "unmarked", "pretended"],
)
def test_a_folder_that_is_not_ours_is_refused_and_untouched(
    killed: Path, tmp_path: Path, kind: str, restart: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, parts = tmp_path / "mine", tmp_path / ".out.csv.parts"
    mine.mkdir()
    names = ("job.json", "inputs.jsonl", "00000.jsonl", "lock", "letter.txt")
    for name in names:
        (mine / name).write_text("mine")
    if kind == "link":
        parts.symlink_to(mine)
    elif kind == "file":
        parts.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(parts)
    elif kind == "foreign":
        shutil.copytree(mine, parts)
    elif kind == "locked by a link":
        parts.mkdir()
        (parts / "lock").symlink_to(mine / "letter.txt")
    elif kind == "unmarked":
        parts.mkdir()
        (parts / "00000.npy").write_text("mine")
    elif kind == "pretended":
        parts.mkdir()
        for name in ("00000.npy", "lock"):
            (parts / name).write_text("mine")
    elif os.geteuid():
        pytest.skip("needs root")
    else:
        parts.mkdir()
        os.chown(parts, 12345, 12345)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    more = ["--restart"] if restart else []
    assert fledge.main([*command(killed, "out.csv", tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(parts) in error
    assert "remove it, or name another file" in error
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "name", ["job.json", "inputs.json", "inputs.jsonl", "00000.jsonl", "00001.jsonl"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_in_the_folder_of_a_job_is_not_read(
    killed: Path, left: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = left / ".out.csv.parts"
    (parts / name).rename(left / "kept")
    if kind == "fifo":
        os.mkfifo(parts / name)
    elif kind == "folder":
        (parts / name).mkdir()
    else:
        (parts / name).symlink_to(left / "kept")
    status = fledge.main(command(killed, "out.csv", left))
    error = capsys.readouterr().err
    assert status in (0, 1, 2)
    assert error.count("\n") == (status != 0)
    if status == 0:
        assert (left / "out.csv").read_bytes() == (killed / "right.csv").read_bytes()
    else:
        assert not (left / "out.csv").exists()
    assert (left / "kept").exists()


def test_the_folder_of_a_job_becomes_private(killed: Path, left: Path) -> None:
    parts = left / ".out.csv.parts"
    parts.chmod(0o777)
    with journal.ScoringJournal(left / "other.csv", {}) as other:
        assert other.folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(OptionError):
        journal.ScoringJournal(left / "out.csv", {})
    assert parts.stat().st_mode & 0o777 == 0o700


def test_a_file_of_the_user_in_the_folder_of_a_job_stays(killed: Path, left: Path) -> None:
    notes = left / ".out.csv.parts" / "notes.txt"
    notes.write_text("mine")
    assert fledge.main([*command(killed, "out.csv", left), "--restart"]) == 0
    assert notes.read_text() == "mine"
    assert fledge.main(command(killed, "out.csv", left)) == 0
    assert sorted(path.name for path in notes.parent.iterdir()) == ["lock", "notes.txt"]


def test_random_damage_never_gives_another_table(
    killed: Path, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, rng = (killed / "right.csv").read_bytes(), random.Random(3)
    names = ["inputs.jsonl", "inputs.json", "job.json", "00000.jsonl", "00001.jsonl"]
    kept = {name: (left / ".out.csv.parts" / name).read_bytes() for name in names}
    for _ in range(12):
        shutil.rmtree(left / ".out.csv.parts", ignore_errors=True)
        shutil.copytree(killed / ".out.csv.parts", left / ".out.csv.parts")
        name = rng.choice(names)
        data = bytearray(kept[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (left / ".out.csv.parts" / name).write_bytes(data)
        status = fledge.main(command(killed, "out.csv", left))
        assert status in (0, 2)
        if status == 0:
            assert (left / "out.csv").read_bytes() == right
        assert capsys.readouterr().err.count("\n") == (status != 0)
        (left / "out.csv").unlink(missing_ok=True)
