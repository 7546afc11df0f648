"""A scoring job that is killed between any two file operations is resumed to the same table.

The folder is copied just before one file operation, as a kill there would leave it. Temporary
files in the copy are cut at any byte, because a killed process may have written only a part.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.scoring import journal as journal_module
from serving.scoring import score
from serving.scoring.journal import ScoringJournal
from serving.scoring.options import ScoringOptions
from serving.scoring.rows import ScoreRow
from serving.utils.files import partial_of
from tests.support import file_events
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import file_names

FACTS = {"bundle": "m:1", "inputs": ["photos"]}
NAMES = st.lists(file_names(), min_size=1, max_size=7)
OPERATIONS = 70
KILLS = st.lists(
    st.tuples(st.integers(0, OPERATIONS), st.sampled_from([0, 0.3, 0.9, 1])), max_size=2
)


def row(name: str) -> ScoreRow:
    if len(name) % 3 == 0:
        return ScoreRow(name, "error", error="broken-image: cut short")
    share = len(name) / 16
    return ScoreRow(name, "ok", "a", share, None, (("a", share), ("b", 1 - share)), 1)


def run(out: Path, names: Sequence[str]) -> None:
    """A scoring job without a model: each row is a function of the image's name."""
    embeddings = out.suffix == ".parquet"
    with ScoringJournal(out, FACTS) as journal:
        if not journal.known:
            journal.write_inputs(iter(names), [])
        for number, shard in journal.todo():
            features = np.array([[len(name), number] for name in shard], np.float32)
            journal.write(number, list(map(row, shard)), features if embeddings else None)
        score._write_table(journal, out, ScoringOptions(embeddings=embeddings))
        journal.remove()


def run_and_kill(folder: Path, out: str, names: Sequence[str], operation: int, cut: float) -> Path:
    """Run a job, and return a copy of its folder as it was before one of its file operations."""
    left = folder.with_name(f"{folder.name}x")
    count = 0

    def copy_before(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if count == operation:
            shutil.copytree(folder, left)
        count += 1

    with file_events.listen(copy_before):
        run(folder / out, names)
    if not left.exists():  # the job has fewer operations
        return folder
    for path in left.rglob("*.partial"):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * cut)])
    return left


@given(NAMES, KILLS, st.sampled_from(["scores.csv", "scores.jsonl", "scores.parquet"]))
@examples(20)
def test_a_job_killed_at_any_file_operation_is_resumed_to_the_same_table(names, kills, out) -> None:
    with tempfile.TemporaryDirectory() as top, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "SIZE", 2)
        whole, folder = Path(top, "whole"), Path(top, "killed")
        whole.mkdir()
        folder.mkdir()
        run(whole / out, names)
        expected = (whole / out).read_bytes()
        for operation, cut in kills:
            folder = run_and_kill(folder, out, names, operation, cut)
            if (folder / out).exists():
                assert (folder / out).read_bytes() == expected
        run(folder / out, names)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {out: expected}


def test_the_kills_reach_every_kind_of_file(tmp_path, monkeypatch) -> None:
    """Otherwise the law above would hold for jobs that were never interrupted."""
    monkeypatch.setattr(journal_module, "SIZE", 2)
    seen: list[set[str]] = []

    def look(event: str, arguments: tuple[object, ...]) -> None:
        seen.append({path.name for path in tmp_path.rglob("*")})

    with file_events.listen(look):
        run(tmp_path / "scores.parquet", ["a", "bb", "ccc", "dddd", "e"])
    assert 20 < len(seen) <= OPERATIONS
    names = set().union(*seen)
    assert {"job.json", "inputs.jsonl", "inputs.json", "00002.jsonl", "00002.npy"} <= names
    assert {"scores.parquet", "00001.jsonl"} <= {partial_of(name) for name in names}
