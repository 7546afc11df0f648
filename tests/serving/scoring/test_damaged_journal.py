"""A journal that was damaged on disk is refused in one line, with the remedy."""

import hashlib
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


def with_head(folder: Path, body: bytes) -> bytes:
    """The rows of a shard with the right checksum, so that they are parsed."""
    head = json.loads((folder / "00000.jsonl").read_bytes().partition(b"\n")[0])
    head["sha256"] = hashlib.sha256(body).hexdigest()
    return json.dumps(head).encode() + b"\n" + body


def row(**changes: Any) -> bytes:
    return json.dumps(json.loads(ROW.to_json()) | changes).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("inputs.json", b"[]"),
        ("inputs.json", b"x"),
        ("inputs.json", b"\xff"),
        ("inputs.json", b""),
        ("inputs.json", b"{}"),
        ("inputs.json", DEEP.encode()),
        ("inputs.json", b'{"images": 1, "skipped": 0, "sha256": 7}'),
        ("inputs.json", b'{"images": 1, "skipped": 0, "sha256": []}'),
        ("inputs.json", b'{"images": 1, "skipped": 0, "sha256": [7]}'),
        ("inputs.json", b'{"images": true, "skipped": 0, "sha256": ["a"]}'),
        ("inputs.json", b'{"images": 1, "skipped": -1, "sha256": ["a"]}'),
        ("inputs.json", b'{"images": 1%s, "skipped": 0, "sha256": []}' % (b"0" * 5000)),
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
    if name == "00000.jsonl":
        data = with_head(folder, data)
    (folder / name).write_bytes(data)
    with pytest.raises(OptionError, match=rf"{name}l? is damaged: .*; add --restart") as refused:
        read_all(out)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("line", [b"3\n", b"{\n", b'"\xff"\n', b"null\n"])
def test_a_damaged_list_of_images_is_refused(out: Path, line: bytes) -> None:
    folder = out.with_name(".out.csv.parts")
    (folder / "00000.jsonl").unlink()
    (folder / "inputs.jsonl").write_bytes(line)
    counts = json.loads((folder / "inputs.json").read_bytes())
    with pytest.raises(OptionError, match=r"inputs\.jsonl is damaged: it was cut or changed"):
        ScoringJournal(out, FACTS)
    counts["sha256"] = [hashlib.sha256(line).hexdigest()]
    (folder / "inputs.json").write_text(json.dumps(counts))
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
