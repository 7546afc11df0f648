"""A killed and resumed job writes the same table as an uninterrupted one."""

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
from serving.scoring import journal as journal_module
from serving.scoring import score
from serving.scoring.journal import ScoringJournal
from serving.scoring.options import ScoringOptions
from serving.scoring.rows import ScoreRow
from tests.support.tiny_bundle import photo, tiny_bundle

ROOT = Path(__file__).parents[3]
KILLS = 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b", classes=7)


def write_list(folder: Path, lines: int) -> Path:
    """A list of so many lines, some of them broken, over forty photos."""
    names = []
    for seed in range(40):
        path = folder / f"{seed}.jpg"
        path.write_bytes(photo(seed) if seed % 13 else b"no photo")
        names.append(str(path))
    rng = random.Random(0)
    path = folder / "list.txt"
    path.write_text("\n".join(rng.choice([*names, str(folder / "gone.jpg")]) for _ in range(lines)))
    return path


# Runs a job in forks of one process. The n-th one is killed at its n-th rename or removal: with the
# file half written, with the file complete, or before the removal.
KILLED_AT_EACH_POINT = """
import json, os, sys, traceback
from pathlib import Path
from PIL import Image
from serving.scoring import journal, score
from serving.scoring.options import ScoringOptions
Image.preinit()
journal.SIZE = 5
source, bundle, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
replace, unlink, points = os.replace, os.unlink, 0

def in_fork(kill_at=None):
    # The exit status of a run: 0, or 9 if it was killed.
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    def point():
        global points
        points += 1
        return points - 1 == kill_at
    def killed_replace(partial, path):
        if point():
            os.truncate(partial, os.stat(partial).st_size // 2)
            os._exit(9)
        if point():
            os._exit(9)
        replace(partial, path)
    def killed_unlink(path):
        if os.path.exists(path) and point():
            os._exit(9)
        unlink(path)
    os.replace, os.unlink, os.fsync = killed_replace, killed_unlink, lambda file: None
    try:
        score.score([source], bundle, out, ScoringOptions(device="cpu"), log=lambda _: None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

parts = out.with_name(f".{out.name}.parts")
assert in_fork() == 0
expected = out.read_bytes()
out.unlink()
kills = resumed = complete = 0
while (status := in_fork(kills)) == 9:
    done = len(list(parts.glob("[0-9]*.jsonl")))
    resumed += 0 < done < 3 and (parts / "job.json").exists()
    if out.exists():
        assert out.read_bytes() == expected, kills
        complete += 1
    assert in_fork() == 0, kills
    assert out.read_bytes() == expected, kills
    assert not parts.exists(), kills
    out.unlink()
    kills += 1
assert status == 0
print(json.dumps([kills, resumed, complete]))
"""


@pytest.mark.process
def test_a_job_killed_at_any_rename_or_removal_and_resumed_writes_the_same_table(
    bundle: Path, tmp_path: Path
) -> None:
    many = write_list(tmp_path, 13)
    command = [sys.executable, "-c", KILLED_AT_EACH_POINT, str(many), str(bundle)]
    done = subprocess.run(
        [*command, str(tmp_path / "out.csv")],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # no threads in the process that forks
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills, resumed, complete = json.loads(done.stdout)
    # Eight files are renamed: three of the job, three shards, table, summary. Seven are removed.
    assert (kills, resumed) == (8 * 2 + 7, 2 * 2)
    assert complete == 2 + 7  # the summary and the removals come after the table


CODE = """
import sys
from pathlib import Path
from serving.scoring import journal
from serving.scoring.options import ScoringOptions
from serving.scoring.score import score
journal.SIZE = 100
score([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), ScoringOptions(device="cpu"))
"""


def start(many: Path, bundle: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(many), str(bundle), str(out)]
    with out.with_name("log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)


@pytest.mark.process
def test_a_job_killed_at_random_times_writes_the_same_table(bundle: Path, tmp_path: Path) -> None:
    many = write_list(tmp_path, 1500)
    uninterrupted = start(many, bundle, tmp_path / "expected.csv")
    started = time.monotonic()
    assert uninterrupted.wait(120) == 0, (tmp_path / "log").read_text()
    seconds = time.monotonic() - started
    expected = (tmp_path / "expected.csv").read_bytes()
    rng, kills = random.Random(1), 0
    out = tmp_path / "out.csv"
    while kills < KILLS:
        process = start(many, bundle, out)
        try:
            process.wait(rng.uniform(seconds / 2, seconds))  # the first half are the imports
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if out.exists():
            assert out.read_bytes() == expected
            out.unlink()
    last = start(many, bundle, out)
    assert last.wait(120) == 0, (tmp_path / "log").read_text()
    assert out.read_bytes() == expected
    assert not out.with_name(f".{out.name}.parts").exists()


def facts(**changes) -> dict:
    return {"bundle": "m:1", "tta": 0, "inputs": ["photos"]} | changes


def rows(*names: str) -> list[ScoreRow]:
    return [ScoreRow(name, "ok", "a", 0.5, None, (("a", 0.5), ("b", 0.25)), 1) for name in names]


def filled(out: Path, monkeypatch, **changes) -> ScoringJournal:
    monkeypatch.setattr(journal_module, "SIZE", 2)
    journal = ScoringJournal(out, facts(**changes))
    if not journal.known:
        journal.write_inputs(["a", "b\n", os.fsdecode(b"\xff"), "d", "e"], ["a folder: locked"])
    return journal


def test_shards_are_read_back(tmp_path, monkeypatch) -> None:
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
        found, vectors = journal.read(1)
        assert found == rows(os.fsdecode(b"\xff"), "d")
        assert np.array_equal(vectors, features, equal_nan=True)
        assert journal.read(2) == (rows("e"), None)
        journal.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"bundle": "m:2"}, {"tta": 4}, {"inputs": ["other"]}])
def test_a_job_with_other_facts_is_refused(tmp_path, monkeypatch, change) -> None:
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


def test_an_incomplete_shard_and_an_incomplete_removal_are_ignored(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        folder = journal.folder
        (folder / ".00001.jsonl.0123456789abcdef.partial").write_text("{")
        np.save(folder / "00001.npy", np.zeros((2, 2), np.float32))
        assert [number for number, _ in journal.todo()] == [0, 1, 2]
    (folder / journal_module.JOB).unlink()  # killed after the first step of a removal
    with ScoringJournal(out, facts(tta=9)) as journal:
        assert not journal.known
        assert {path.name for path in folder.iterdir()} == {journal_module.JOB, "lock"}


def test_a_second_process_is_refused(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch):
        with pytest.raises(OptionError, match="another process is writing it"):
            ScoringJournal(out, facts())
        with pytest.raises(OptionError, match="another process is writing it"):
            ScoringJournal(out, facts(), restart=True)
    with ScoringJournal(out, facts()) as journal:
        assert journal.known


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EACCES, True)]
)
def test_without_lock_support_a_job_runs_unlocked(tmp_path, monkeypatch, number, refused) -> None:
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    if refused:
        with pytest.raises(OptionError, match="another process is writing it"):
            ScoringJournal(tmp_path / "out.csv", facts())
    else:
        with ScoringJournal(tmp_path / "out.csv", facts()) as journal:
            assert not journal.known


def test_a_damaged_job_is_refused_and_can_be_restarted(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        (journal.folder / journal_module.JOB).write_text("{")
    with pytest.raises(OptionError, match="--restart"):
        ScoringJournal(out, facts())
    with ScoringJournal(out, facts(), restart=True) as journal:
        assert not journal.known


def test_a_full_disk_keeps_the_complete_shards(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.csv"
    with filled(out, monkeypatch) as journal:
        journal.write(0, rows("a", "b\n"))

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(WorkError, match=r"No space left.*are kept in .*\.parts"):
                journal.write(1, rows(os.fsdecode(b"\xff"), "d"))
        assert journal.done == 2


def test_copies_are_sorted_by_label_and_refused_within_the_inputs(bundle, tmp_path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.csv"
    for seed in range(6):
        (folder / str(seed % 2)).mkdir(parents=True, exist_ok=True)
        (folder / str(seed % 2) / f"{seed // 2}.jpg").write_bytes(photo(seed))
    (folder / "broken.jpg").write_bytes(photo(9)[:500])
    (folder / "none.jpg").write_bytes(b"no photo")
    options = ScoringOptions(device="cpu", copy_to=folder / "sorted")
    with pytest.raises(OptionError, match=r"--copy-to .*in/sorted lies in .*in, which is scored"):
        score.score([str(folder)], bundle, out, options, log=lambda _: None)
    options = ScoringOptions(device="cpu", copy_to=tmp_path / "sorted")
    for _ in range(2):  # the second call overwrites the same files
        score.score([str(folder)], bundle, out, options, log=lambda _: None)
    copies = {path.read_bytes(): path for path in (tmp_path / "sorted").rglob("*.jpg")}
    assert len(list((tmp_path / "sorted").rglob("*.jpg"))) == 7
    for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines()):
        if row["path"].endswith("none.jpg"):
            continue
        copy = copies[Path(row["path"]).read_bytes()]
        assert copy.parent.name == (row["label"] or "_errors")


def test_an_unfinished_job_with_other_options_is_refused_or_restarted(bundle, tmp_path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.jpg").write_bytes(photo(seed))
    other = ScoringJournal(out, {})
    other.write_inputs([])
    other.__exit__()
    with pytest.raises(OptionError, match="--restart"):
        score.score([str(folder)], bundle, out, ScoringOptions(device="cpu"), log=lambda _: None)
    logged: list[str] = []
    options = ScoringOptions(device="cpu", restart=True, probabilities=True)
    score.score([str(folder)], bundle, out, options, log=logged.append)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(len(line["probabilities"]) == 7 for line in lines)
    assert all(sum(line["probabilities"]) == pytest.approx(1) for line in lines)
    summary = json.loads(out.with_suffix(".summary.json").read_text())
    assert (summary["images"], summary["scored"], summary["now"]) == (3, 3, 3)
    with pytest.raises(FledgeError):
        score.score([str(tmp_path / "none")], bundle, out, ScoringOptions(), log=logged.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in",
        "out.jsonl",
        "out.summary.json",
    ]
