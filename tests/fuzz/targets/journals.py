"""The journal from which a scoring job is resumed."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from serving.scoring import journal, journal_folder
from serving.scoring.row_writers import WRITERS
from serving.scoring.rows import ScoreRow
from tests.fuzz import mutators
from tests.fuzz.target import Target

_OUT = Path("out.csv")
_FACTS = {"bundle": "a", "options": {"tta": 0, "top_k": 5}, "inputs": ["photos"]}
_NAMES = ("job.json", "inputs.jsonl", "inputs.json", "00000.jsonl", "00000.npy", "00001.jsonl")

_GOOD = ScoreRow("a.jpg", "ok", "x", 0.5, True, (("x", 0.5), ("y", 0.25)), 1, "", "", (0.5, 0.25))
_BAD = ScoreRow("\udcff.jpg", "error", error="broken-image: cut")


def _array(shape: tuple[int, ...] = (2, 3)) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.float32))
    return file.getvalue()


def seeds() -> Iterator[bytes]:
    rows = (_GOOD.to_json() + _BAD.to_json()).encode()
    files = {
        "job.json": json.dumps({"journal": journal.VERSION, **_FACTS}).encode(),
        "inputs.jsonl": b'"a.jpg"\n"\\udcff.jpg"\n',
        "inputs.json": b'{"images": 2, "skipped": 0, "sha256": []}',
        "00000.jsonl": b"{}\n" + rows,
        "00000.npy": _array(),
    }
    yield repair(mutators.join_files(files))
    for left_out in files:
        kept = {name: data for name, data in files.items() if name != left_out}
        yield repair(mutators.join_files(kept))
    many = b"".join(b'"%d.jpg"\n' % number for number in range(1200))
    yield repair(
        mutators.join_files({**files, "inputs.jsonl": many, "00001.jsonl": b"{}\n" + rows})
    )
    yield repair(mutators.join_files({**files, "job.json": b'{"bundle": "b"}'}))


def repair(data: bytes) -> bytes:
    """Give the list of images and the rows the right checksums, so that they are read."""
    files = {name: _content(content) for name, content in mutators.split_files(data).items()}
    lines = files.get("inputs.jsonl", b"").splitlines(keepends=True)
    shards = [b"".join(lines[at : at + 1000]) for at in range(0, len(lines), 1000)]
    digests = [_sha256(shard) for shard in shards]
    if "inputs.json" in files:
        counts = {"images": len(lines), "skipped": 0, "sha256": digests}
        files["inputs.json"] = json.dumps(counts).encode()
    for number, digest in enumerate(digests[:2]):
        name = f"{number:05}.jsonl"
        if name in files:
            _, _, body = files[name].partition(b"\n")
            head = {"rows": shards[number].count(b"\n"), "inputs": digest, "sha256": _sha256(body)}
            head["features"] = _features_digest(files.get(f"{number:05}.npy"))
            files[name] = json.dumps(head).encode() + b"\n" + body
    return mutators.join_files(files)


def _features_digest(data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        return _sha256(np.ascontiguousarray(np.load(io.BytesIO(data))).data)
    except Exception:  # what numpy raises for damaged files
        return "0" * 64


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def check(data: bytes) -> None:
    files = mutators.split_files(data)
    folder = Path(f".{_OUT.name}.parts")
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name in _NAMES:
        if name in files:
            (folder / name).write_bytes(_content(files[name]))
    (folder / journal_folder.LOCK).write_bytes(journal_folder._MARK)
    journal.has_inputs(_OUT)
    with journal.ScoringJournal(_OUT, _FACTS) as opened:
        if not opened.known:
            opened.write_inputs(["a.jpg"], [])
        todo, done = dict(opened.todo()), set[int]()
        count = 0
        for number in range(opened.shards):
            if number in todo:
                opened.write(number, [ScoreRow(name, "ok") for name in todo[number]])
                done.add(number)
            rows, features = opened.read(number)
            _write(rows)
            count += len(rows)
            if features is not None and features.dtype.hasobject:
                raise AssertionError("an array of objects")
        if opened.done != opened.total or done != todo.keys():
            raise AssertionError("not done, and nothing to do")
        if count != opened.total:
            raise AssertionError(f"{count} rows of {opened.total} images")


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
        repair,
        words=tuple(f"%% {name}\n".encode() for name in _NAMES),
    ),
)
