"""Cases of the scoring journal: counts, damage, messages, and what a failed start leaves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.errors import OptionError, WorkError
from serving.scoring import journal as journal_module
from serving.scoring.journal import ScoringJournal, has_inputs
from serving.scoring.rows import ScoreRow

FACTS = {"bundle": "m:1", "tta": 0}


@pytest.fixture(autouse=True)
def _two_images_in_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SIZE", 2)


def rows(*names: str) -> list[ScoreRow]:
    return [ScoreRow(name, "ok", "a", 0.5, None, (("a", 0.5), ("b", 0.25)), 1) for name in names]


def message(kind: type[Exception], work: Any) -> str:
    with pytest.raises(kind) as raised:
        work()
    return str(raised.value)


@pytest.mark.parametrize(("count", "shards"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)])
def test_images_are_counted_by_complete_shards(tmp_path: Path, count: int, shards: int) -> None:
    names = [str(number) for number in range(count)]
    with ScoringJournal(tmp_path / "out.csv", FACTS) as journal:
        assert (journal.total, journal.shards, journal.done, journal.skipped) == (0, 0, 0, 0)
        journal.write_inputs(names)
        assert (journal.total, journal.shards, journal.done) == (count, shards, 0)
        done = 0
        for number, own in list(journal.todo()):
            assert own == names[2 * number : 2 * number + 2]
            journal.write(number, rows(*own))
            done += len(own)
            assert journal.done == done
        assert (done, list(journal.todo())) == (count, [])


def test_the_folder_has_the_documented_files(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert not has_inputs(out)
    with ScoringJournal(out, FACTS) as journal:
        folder = tmp_path / ".out.csv.parts"
        assert journal.folder == folder
        assert not has_inputs(out)
        assert not journal.known
        journal.write_inputs(["a", "\xe4\n", "c"], ["one"])
        assert has_inputs(out)
        assert journal.known
        journal.write(0, rows("a", "\xe4\n"), np.zeros((2, 3), np.float32))
        journal.write(1, rows("c"))
        assert sorted(path.name for path in folder.iterdir()) == [
            *("00000.jsonl", "00000.npy", "00001.jsonl", "inputs.json", "inputs.jsonl"),
            *("job.json", "lock"),
        ]
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        assert folder.stat().st_mode & 0o777 == 0o700
        assert json.loads((folder / "job.json").read_text()) == {"journal": 2, **FACTS}
        names = [b'"a"\n"\\u00e4\\n"\n', b'"c"\n']
        assert (folder / "inputs.jsonl").read_bytes() == b"".join(names)
        digests = [hashlib.sha256(lines).hexdigest() for lines in names]
        counts = {"images": 3, "skipped": 1, "sha256": digests}
        assert json.loads((folder / "inputs.json").read_text()) == counts
        head, _, body = (folder / "00001.jsonl").read_bytes().partition(b"\n")
        digest = hashlib.sha256(body).hexdigest()
        assert json.loads(head) == {
            "rows": 1, "inputs": digests[1], "sha256": digest, "features": None
        }  # fmt: skip
        journal.remove()
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_skipped_while_the_names_are_listed_is_counted(tmp_path: Path) -> None:
    skipped: list[str] = []

    def names() -> Iterator[str]:
        for name in ("a", "b", "c"):
            skipped.append(f"a folder before {name}")
            yield name

    with ScoringJournal(tmp_path / "out.csv", FACTS) as journal:
        journal.write_inputs(names(), skipped)
        assert (journal.total, journal.skipped) == (3, 3)
    with ScoringJournal(tmp_path / "out.csv", FACTS) as journal:
        assert (journal.total, journal.skipped) == (3, 3)


@pytest.mark.parametrize(
    ("before", "now", "shown"),
    [
        ({"tta": 0}, {"tta": 4}, "tta = 0, now 4"),
        ({"tta": 0, "a": None}, {"a": None}, "tta = 0, now null"),
        ({"a": 1}, {"a": 1, "top_k": "all"}, 'top_k = null, now "all"'),
        ({"in": "x" * 58}, {"in": "x" * 59}, f'in = "{"x" * 58}", now "{"x" * 56}...'),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}, "a = 1, now 2"),
        ({"a": [1, 2]}, {"a": (1, 3)}, "a = [1, 2], now [1, 3]"),
    ],
)
def test_the_refusal_of_another_job_names_what_differs(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], shown: str
) -> None:
    out = tmp_path / "out.csv"
    with ScoringJournal(out, before):
        pass
    assert message(OptionError, lambda: ScoringJournal(out, now)) == (
        f"--out {out}: an unfinished job exists there with {shown}; use the same options and "
        "inputs, or add --restart"
    )
    with ScoringJournal(out, before):  # the refusal changed nothing and holds no lock
        pass


@pytest.mark.parametrize("text", ["", "{", "[]x", "[1]", "7", "[" * 100_000])
def test_an_unreadable_job_is_refused(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out.csv"
    with ScoringJournal(out, FACTS) as journal:
        (journal.folder / "job.json").write_text(text)
    assert 'exists there with job = "unreadable", now null' in message(
        OptionError, lambda: ScoringJournal(out, FACTS)
    )


def test_facts_are_compared_as_json(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with ScoringJournal(out, {"inputs": ("a", "b"), 1: None}):
        pass
    with ScoringJournal(out, {"inputs": ["a", "b"], "1": None}):
        pass


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("inputs.json", b"many", "Expecting value: line 1 column 1 (char 0)"),
        ("inputs.jsonl", b'"a"\n"b"\n', "it was cut or changed after 2 images"),
        ("inputs.jsonl", b'"a"\n', "it was cut or changed after 0 images"),
        ("inputs.jsonl", b'"a"\n7\n"c"\n', "it was cut or changed after 0 images"),
        ("inputs.jsonl", b'"a"\n"b"\n"c"\n"d"\n', "it has more than its 3 images"),
    ],
)
def test_a_damaged_list_is_refused_with_a_remedy(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    out = tmp_path / "out.csv"
    with ScoringJournal(out, FACTS) as journal:
        journal.write_inputs(["a", "b", "c"])
        damaged = journal.folder / name
        damaged.write_bytes(content)

    def read() -> None:
        with ScoringJournal(out, FACTS) as journal:
            list(journal.todo())

    assert message(OptionError, read) == (
        f"--out {out}: an unfinished job exists there, and {damaged} is damaged: {reason}; "
        "add --restart"
    )


def test_a_list_with_fewer_images_than_are_counted_is_damaged(tmp_path: Path) -> None:
    out, lines = tmp_path / "out.csv", b'"a"\n'
    with ScoringJournal(out, FACTS) as journal:
        journal.write_inputs(["a", "b"])
        counts = {"images": 2, "skipped": 0, "sha256": [hashlib.sha256(lines).hexdigest()]}
        (journal.folder / "inputs.json").write_text(json.dumps(counts))
        (journal.folder / "inputs.jsonl").write_bytes(lines)
    with pytest.raises(OptionError, match="cut or changed"), ScoringJournal(out, FACTS) as journal:
        list(journal.todo())


@pytest.mark.parametrize(
    "features",
    [np.zeros((2, 3)), np.zeros((1, 3), np.float32), np.zeros(2, np.int64), np.float32(1)],
)
def test_features_of_another_shape_or_type_are_damage(tmp_path: Path, features: Any) -> None:
    with ScoringJournal(tmp_path / "out.csv", FACTS) as journal:
        journal.write_inputs(["a", "b"])
        journal.write(0, rows("a", "b"), np.zeros((2, 3), np.float32))
        path = journal.folder / "00000.npy"
        np.save(path, features)
        shown = f"{path} is damaged: it is {features.dtype} {list(features.shape)}; add --restart"
        assert message(OptionError, lambda: journal.read(0)).endswith(shown)
        path.write_bytes(b"")
        assert f"{path} is damaged: " in message(OptionError, lambda: journal.read(0))


def test_a_failed_operation_names_the_table_and_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    kept = f"; complete shards are kept in {tmp_path / '.out.csv.parts'}"
    with ScoringJournal(out, FACTS) as journal:
        missing = f"--out {out}: No such file or directory{kept}"
        assert message(WorkError, lambda: journal.read(0)) == missing
        assert message(WorkError, lambda: list(journal.todo())) == missing
        (journal.folder / "00000.npy").mkdir()
        assert message(WorkError, journal.remove).endswith(kept)
    elsewhere = tmp_path / "none" / "out.csv"
    assert message(WorkError, lambda: ScoringJournal(elsewhere, FACTS)).startswith(
        f"--out {elsewhere}: No such file or directory; "
    )

    def full(_: int) -> None:
        raise OSError("no reason")

    with pytest.MonkeyPatch.context() as patch, ScoringJournal(tmp_path / "b", FACTS) as journal:
        patch.setattr(os, "fsync", full)
        assert f"--out {tmp_path / 'b'}: no reason; " in message(
            WorkError, lambda: journal.write_inputs(["a"])
        )
        assert not journal.known


def test_a_start_that_fails_leaves_no_folder_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in message(WorkError, lambda: ScoringJournal(out, FACTS))
    assert list(tmp_path.iterdir()) == []
    with ScoringJournal(out, FACTS) as journal:
        journal.write_inputs(["a"])
    assert has_inputs(out)


def test_a_restart_discards_all_files_of_the_job(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with ScoringJournal(out, FACTS) as journal:
        journal.write_inputs(["a", "b"], ["skipped"])
        journal.write(0, rows("a", "b"), np.zeros((2, 3), np.float32))
    with ScoringJournal(out, FACTS, restart=True) as journal:
        names = sorted(path.name for path in journal.folder.iterdir())
        assert names == ["job.json", "lock"]
        assert (journal.total, journal.skipped, journal.known) == (0, 0, False)


def test_the_second_process_is_told_what_to_do(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with ScoringJournal(out, FACTS):
        assert message(OptionError, lambda: ScoringJournal(out, FACTS)) == (
            f"--out {out}: another process is writing it; wait, or name another file"
        )
