"""The journal from which a scoring job is resumed."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from serving.scoring import journal
from serving.scoring.row_writers import WRITERS
from serving.scoring.rows import ScoreRow
from tests.fuzz import mutators
from tests.fuzz.target import Target

_OUT = Path("out.csv")
_FACTS = {"bundle": "a", "options": {"tta": 0, "top_k": 5}, "inputs": ["photos"]}
_NAMES = ("job.json", "inputs.jsonl", "skipped.json", "00000.jsonl", "00000.npy", "00001.jsonl")

_GOOD = ScoreRow("a.jpg", "ok", "x", 0.5, True, (("x", 0.5), ("y", 0.25)), 1, "", "", (0.5, 0.25))
_BAD = ScoreRow("\udcff.jpg", "error", error="broken-image: cut")


def _array(shape: tuple[int, ...] = (2, 3)) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.float32))
    return file.getvalue()


def seeds() -> Iterator[bytes]:
    rows = (_GOOD.to_json() + _BAD.to_json()).encode().rstrip()
    files = {
        "job.json": json.dumps(_FACTS).encode(),
        "inputs.jsonl": b'"a.jpg"\n"\\udcff.jpg"',
        "skipped.json": b"0",
        "00000.jsonl": rows,
        "00000.npy": _array(),
    }
    yield mutators.join_files(files)
    for left_out in files:
        yield mutators.join_files({name: data for name, data in files.items() if name != left_out})
    many = b"\n".join(b'"%d.jpg"' % number for number in range(1200))
    yield mutators.join_files({**files, "inputs.jsonl": many, "00001.jsonl": rows})
    yield mutators.join_files({**files, "job.json": b'{"bundle": "b"}'})


def check(data: bytes) -> None:
    files = mutators.split_files(data)
    folder = Path(f".{_OUT.name}.parts")
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name in _NAMES:
        if name in files:
            (folder / name).write_bytes(_content(files[name]))
    journal.has_inputs(_OUT)
    with journal.ScoringJournal(_OUT, _FACTS) as opened:
        if not opened.known:
            opened.write_inputs(["a.jpg"], [])
        todo = dict(opened.todo())
        for number in range(opened.shards):
            if number in todo:
                opened.write(number, [ScoreRow(name, "ok") for name in todo[number]])
            rows, features = opened.read(number)
            _write(rows)
            if features is not None and features.dtype.hasobject:
                raise AssertionError("an array of objects")
        if opened.done != opened.total:
            raise AssertionError("not done, and nothing to do")


def _content(data: bytes) -> bytes:
    return data + b"\n" if data and not data.endswith(b"\n") and data[:1] in b'"{' else data


def _write(rows: list[ScoreRow]) -> None:
    """Write the rows into a table, as the end of a job does."""
    for suffix in (".csv", ".jsonl"):
        writer = WRITERS[suffix](Path(f"table{suffix}"), tuple(vars(_GOOD)))
        try:
            writer.write(rows, None)
        finally:
            writer.close()


def _npy(rng: random.Random, data: bytes) -> bytes:
    """Change the header of an array: dtype, order, shape, length."""
    head, mark, rest = data.partition(b"{")
    text, _, body = rest.partition(b"\n")
    new = rng.choice(
        (
            text.replace(
                b"<f4", rng.choice((b"|O", b"<f8", b"<U9999999", b"<m8[s]", b"|V0", b"x"))
            ),
            text.replace(b"False", rng.choice((b"True", b"None", b"3"))),
            text.replace(b"(2, 3)", rng.choice(_SHAPES)),
            text + b", " * 200,
        )
    )
    new = new.strip().ljust(len(text))
    return head[:8] + len(new + b"\n").to_bytes(2, "little") + mark + new + b"\n" + body


_SHAPES = (
    b"(2,)",
    b"()",
    b"(0, 9)",
    b"(99999999, 99)",
    b"(-1, 3)",
    b"(2, 3, 1)",
    b"'a'",
    b"(2.5,)",
)

_LINES = mutators.lines_change(mutators.json_change(tuple(vars(_GOOD))))
_CHANGES = {".jsonl": _LINES, ".json": mutators.json_change(tuple(_FACTS)), ".npy": _npy}

TARGETS = (
    Target(
        "journal",
        check,
        seeds,
        mutators.files_change(_CHANGES),
        words=tuple(f"%% {name}\n".encode() for name in _NAMES),
    ),
)
