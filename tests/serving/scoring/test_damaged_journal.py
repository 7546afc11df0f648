"""A journal that was damaged on disk is refused in one line, with the remedy."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.errors import OptionError
from serving.scoring.journal import ScoringJournal
from serving.scoring.rows import ScoreRow

ROW = ScoreRow("a.jpg", "ok", "x", 0.5, True, (("x", 0.5),), 1, "", "", (0.5, 0.5))
FACTS = {"bundle": "a"}
DEEP = "[" * 100_000 + "]" * 100_000


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The table of an unfinished job of one image, which is scored."""
    path = tmp_path / "out.csv"
    with ScoringJournal(path, FACTS) as journal:
        journal.write_inputs(["a.jpg"])
        journal.write(0, [ROW], np.zeros((1, 3), np.float32))
    return path


def read_all(out: Path) -> None:
    with ScoringJournal(out, FACTS) as journal:
        list(journal.todo())
        journal.read(0)


def row(**changes: Any) -> bytes:
    return json.dumps(json.loads(ROW.to_json()) | changes).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("skipped.json", b"[]"),
        ("skipped.json", b"x"),
        ("skipped.json", b"\xff"),
        ("skipped.json", b""),
        ("00000.jsonl", b"{"),
        ("00000.jsonl", b"[]\n"),
        ("00000.jsonl", b"3\n"),
        ("00000.jsonl", b"\xff\n"),
        ("00000.jsonl", DEEP.encode() + b"\n"),
        ("00000.jsonl", b"{}\n"),
        ("00000.jsonl", row(probabilities=3)),
        ("00000.jsonl", row(probabilities=["a"])),
        ("00000.jsonl", row(top_k=[["x"]])),
        ("00000.jsonl", row(top_k=[[1, 0.5]])),
        ("00000.jsonl", row(top_k={"a": 1})),
        ("00000.jsonl", row(path=None)),
        ("00000.jsonl", row(label=[])),
        ("00000.jsonl", row(views="1")),
        ("00000.jsonl", row(path="\ud800.jpg")),
        ("00000.jsonl", row(other=1)),
        ("00000.npy", b""),
        ("00000.npy", b"x" * 200),
        ("00000.npy", array(np.zeros((2, 3), np.float32))),
        ("00000.npy", array(np.zeros((1, 3)))),
        ("00000.npy", array(np.float32(0))),
        ("00000.npy", array(np.zeros((1, 3), np.float32)).replace(b"(1, 3)", b"(9**9)")),
        ("00000.npy", array(np.zeros((1, 3), np.float32)).replace(b"False", b"None ")),
        ("00000.npy", array(np.zeros((1, 3), np.float32)).replace(b"(1, 3)", b"((1, 3")),
        ("00000.npy", array(np.zeros((1, 3), np.float32)).replace(b"{", b"\n {", 1)[:-1]),
    ],
)
def test_damage_is_refused_with_its_file_and_the_remedy(out: Path, name: str, data: bytes) -> None:
    read_all(out)
    folder = out.with_name(".out.csv.parts")
    (folder / name).write_bytes(data)
    with pytest.raises(OptionError, match=rf"{name} is damaged: .*; add --restart") as refused:
        read_all(out)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("line", [b"3\n", b"{\n", b'"\xff"\n', b"null\n"])
def test_a_damaged_list_of_images_is_refused(out: Path, line: bytes) -> None:
    folder = out.with_name(".out.csv.parts")
    (folder / "00000.jsonl").unlink()
    (folder / "inputs.jsonl").write_bytes(line)
    with (
        ScoringJournal(out, FACTS) as journal,
        pytest.raises(OptionError, match=r"inputs\.jsonl is damaged"),
    ):
        list(journal.todo())


@pytest.mark.parametrize("text", ["3", "[1]", "null", DEEP, '"x"'])
def test_a_job_description_of_another_kind_is_refused(out: Path, text: str) -> None:
    (out.with_name(".out.csv.parts") / "job.json").write_text(text)
    with pytest.raises(OptionError, match="add --restart"):
        ScoringJournal(out, FACTS)


def test_a_path_of_bytes_that_are_not_utf8_stays_valid() -> None:
    odd = ScoreRow("\udcff.jpg", "error", error="broken-image: cut")
    assert ScoreRow.from_json(odd.to_json()) == odd
