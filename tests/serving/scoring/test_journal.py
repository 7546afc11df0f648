"""Exactly once: whenever a job is killed, what comes out is what nobody stopped would have made."""

import csv
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from serving.errors import FledgeError, OptionError, WorkError
from serving.scoring import journal as shards
from serving.scoring import score
from serving.scoring.journal import ScoringJournal
from serving.scoring.score import ScoringOptions
from serving.scoring.table import ScoreRow
from tests.support.tiny_bundle import photo, tiny_bundle

ROOT = Path(__file__).parents[3]
KILLS = 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b", classes=7)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 3,000 lines, some of them broken, over forty photos."""
    folder = tmp_path_factory.mktemp("many")
    names = []
    for seed in range(40):
        path = folder / f"{seed}.jpg"
        path.write_bytes(photo(seed) if seed % 13 else b"no photo")
        names.append(str(path))
    rng = random.Random(0)
    lines = [rng.choice([*names, str(folder / "gone.jpg")]) for _ in range(3000)]
    path = folder / "list.txt"
    path.write_text("\n".join(lines))
    return path


CODE = """
import sys
from pathlib import Path
from serving.scoring import journal, score
journal.SIZE = 100
score.score([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), score.Options(device="cpu"))
"""


def start(many: Path, bundle: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(many), str(bundle), str(out)]
    with out.with_name("log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)


def test_killed_at_twenty_moments_it_ends_as_if_nobody_had(many, bundle, tmp_path) -> None:
    whole = start(many, bundle, tmp_path / "whole.csv")
    begun = time.monotonic()
    assert whole.wait(120) == 0, (tmp_path / "log").read_text()
    seconds = time.monotonic() - begun
    expected = (tmp_path / "whole.csv").read_bytes()
    rng, kills, on_the_way = random.Random(1), 0, 0
    out = tmp_path / "out.csv"
    while kills < KILLS:
        process = start(many, bundle, out)
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            done = len(list(out.with_name(f".{out.name}.parts").glob("[0-9]*.jsonl")))
            on_the_way += 0 < done < 30
        if out.exists():
            assert out.read_bytes() == expected
            out.unlink()
    last = start(many, bundle, out)
    assert last.wait(120) == 0, (tmp_path / "log").read_text()
    assert out.read_bytes() == expected
    assert on_the_way >= 3  # or the kills proved nothing
    assert not out.with_name(f".{out.name}.parts").exists()


def facts(**changes) -> dict:
    return {"bundle": "m:1", "tta": 0, "inputs": ["photos"]} | changes


def rows(*names: str) -> list[ScoreRow]:
    return [ScoreRow(name, "ok", "a", 0.5, None, (("a", 0.5), ("b", 0.25)), 1) for name in names]


def filled(out: Path, monkeypatch, **changes) -> ScoringJournal:
    monkeypatch.setattr(shards, "SIZE", 2)
    journal = ScoringJournal(out, facts(**changes))
    if not journal.known:
        journal.keep_inputs(["a", "b\n", os.fsdecode(b"\xff"), "d", "e"], ["a folder: locked"])
    return journal


def test_what_is_done_is_known_again(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        assert (journal.total, journal.shards, journal.done) == (5, 3, 0)
        assert dict(journal.todo()) == {0: ["a", "b\n"], 1: [os.fsdecode(b"\xff"), "d"], 2: ["e"]}
        features = np.array([[1, 2], [np.nan, 4]], np.float32)
        journal.write(1, rows(os.fsdecode(b"\xff"), "d"), features)
        journal.write(2, rows("e"))
    with filled(out, monkeypatch) as journal:
        assert (journal.done, [number for number, _ in journal.todo()]) == (3, [0])
        assert journal.skipped == 1
        again, vectors = journal.read(1)
        assert again == rows(os.fsdecode(b"\xff"), "d")
        assert np.array_equal(vectors, features, equal_nan=True)
        assert journal.read(2) == (rows("e"), None)
        journal.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"bundle": "m:2"}, {"tta": 4}, {"inputs": ["other"]}])
def test_another_job_is_not_mixed_in(tmp_path, monkeypatch, change) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        journal.write(0, rows("a", "b\n"))
    (name,) = change
    with pytest.raises(OptionError, match=rf"{name} = .*--restart"):
        ScoringJournal(out, facts(**change))
    with ScoringJournal(out, facts()) as journal:
        assert journal.done == 2
    with ScoringJournal(out, facts(**change), restart=True) as journal:
        assert not journal.known
        assert journal.done == 0


def test_half_a_shard_and_half_a_removal_are_nothing(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        folder = journal.folder
        (folder / ".00001.jsonl.partial").write_text("{")
        np.save(folder / "00001.npy", np.zeros((2, 2), np.float32))
        assert [number for number, _ in journal.todo()] == [0, 1, 2]
    (folder / shards._JOB).unlink()  # killed behind the first step of a removal
    with ScoringJournal(out, facts(tta=9)) as journal:
        assert not journal.known
        assert {path.name for path in folder.iterdir()} == {shards._JOB, "lock"}


def test_two_at_one_job_are_one_too_many(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch):
        with pytest.raises(OptionError, match="another process is at work"):
            ScoringJournal(out, facts())
        with pytest.raises(OptionError, match="another process is at work"):
            ScoringJournal(out, facts(), restart=True)
    with ScoringJournal(out, facts()) as journal:
        assert journal.known


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EACCES, True)]
)
def test_where_there_are_no_locks_nobody_is_kept_out(
    tmp_path, monkeypatch, number, refused
) -> None:
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    if refused:
        with pytest.raises(OptionError, match="another process is at work"):
            ScoringJournal(tmp_path / "out.csv", facts())
    else:
        with ScoringJournal(tmp_path / "out.csv", facts()) as journal:
            assert not journal.known


def test_a_damaged_job_is_refused_and_begun_anew(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        (journal.folder / shards._JOB).write_text("{")
    with pytest.raises(OptionError, match="--restart"):
        ScoringJournal(out, facts())
    with ScoringJournal(out, facts(), restart=True) as journal:
        assert not journal.known


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        journal.write(0, rows("a", "b\n"))

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(WorkError, match=r"No space left.*is kept in .*\.parts"):
                journal.write(1, rows("c", "d"))
        assert journal.done == 2


def test_copies_are_sorted_and_never_into_what_is_scored(bundle, tmp_path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.csv"
    for seed in range(6):
        (folder / str(seed % 2)).mkdir(parents=True, exist_ok=True)
        (folder / str(seed % 2) / f"{seed // 2}.jpg").write_bytes(photo(seed))
    (folder / "broken.jpg").write_bytes(b"no photo")
    wanted = ScoringOptions(device="cpu", copy_to=folder / "sorted")
    with pytest.raises(OptionError, match=r"--copy-to .*in/sorted lies in .*in, which is scored"):
        score.score([str(folder)], bundle, out, wanted, say=lambda _: None)
    wanted = ScoringOptions(device="cpu", copy_to=tmp_path / "sorted")
    for _ in range(2):  # the second writes the same over
        score.score([str(folder)], bundle, out, wanted, say=lambda _: None)
    copies = {path.read_bytes(): path for path in (tmp_path / "sorted").rglob("*.jpg")}
    assert len(list((tmp_path / "sorted").rglob("*.jpg"))) == 7
    for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines()):
        place = copies[Path(row["path"]).read_bytes()]
        assert place.parent.name == (row["label"] or "_errors")


def test_the_folder_may_change_meanwhile_and_options_may_not(many, bundle, tmp_path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.jpg").write_bytes(photo(seed))
    done = ScoringJournal(out, {})  # somebody else's
    done.keep_inputs([])
    done.__exit__()
    with pytest.raises(OptionError, match="--restart"):
        score.score([str(folder)], bundle, out, ScoringOptions(device="cpu"), say=lambda _: None)
    said: list[str] = []
    wanted = ScoringOptions(device="cpu", restart=True, probabilities=True)
    score.score([str(folder)], bundle, out, wanted, say=said.append)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(len(line["probabilities"]) == 7 for line in lines)
    assert all(sum(line["probabilities"]) == pytest.approx(1) for line in lines)
    summary = json.loads(out.with_suffix(".summary.json").read_text())
    assert (summary["images"], summary["scored"], summary["now"]) == (3, 3, 3)
    with pytest.raises(FledgeError):
        score.score([str(tmp_path / "none")], bundle, out, ScoringOptions(), say=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in",
        "out.jsonl",
        "out.summary.json",
    ]
