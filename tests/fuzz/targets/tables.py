"""Tables of scores, and files of true labels, as `fledge evaluate-scores` reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from serving.evaluation import table_reader
from serving.evaluation.evaluate_scores import EvaluationOptions, evaluate
from serving.evaluation.true_labels import LabelFile
from tests.fuzz import mutators
from tests.fuzz.target import Target, put

_COLUMNS = ("path", "status", "label", "probability", "confident", "top_k", "views", "applied")
_COLUMNS += ("error", "probabilities", "x", "y")
_HEAD = "path,status,label,probability,confident,top_k,views,applied,error,probabilities\n"
_TOP = '"[[""x"", 0.5], [""y"", 0.25]]"'
_CSV = (
    _HEAD
    + f'x/1.jpg,ok,x,0.5,true,{_TOP},1,,,"[0.5, 0.5]"\n'
    + f'y/2.jpg,ok,x,0.75,false,{_TOP},1,exif-orientation,,"[0.75, 0.25]"\n'
    + 'y/3.jpg,error,,,,[],,,"broken-image: cut",\n'
)
_ROW = {
    "path": "x/1.jpg",
    "status": "ok",
    "label": "x",
    "probability": 0.5,
    "confident": None,
    "top_k": [{"label": "x", "probability": 0.5}, ["y", 0.25]],
    "views": 1,
    "applied": "",
    "error": "",
    "probabilities": [0.5, 0.5],
}
_SUMMARY = json.dumps({"classes": ["x", "y"]}).encode()


def _jsonl(*rows: dict[str, object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def seeds() -> Iterator[bytes]:
    rows = _jsonl(_ROW, {**_ROW, "path": "y/2.jpg", "error": "", "label": "y"})
    failed = {"path": "y/3.jpg", "status": "error", "label": None, "probability": None}
    for table in (
        {"t.csv": _CSV.encode()},
        {"t.jsonl": rows + _jsonl({**failed, "error": "a: b"})},
    ):
        yield mutators.join_files(table)
        yield mutators.join_files({**table, "t.summary.json": _SUMMARY})
    small = _CSV.replace(_TOP, "").replace('"[0.5, 0.5]"', "").encode()
    yield mutators.join_files({"t.csv": small, "t.summary.json": _SUMMARY})


def check(data: bytes) -> None:
    files = mutators.split_files(data)
    kind = next((name for name in ("t.csv", "t.jsonl") if name in files), None)
    if kind is None:
        return
    put(Path(kind), files[kind])
    put(Path("t.summary.json"), files.get("t.summary.json"))
    options = EvaluationOptions(
        labels_from_folders=True,
        json=Path("figures.json"),
        confusion=Path("confusion.csv"),
        mistakes=Path("mistakes.csv"),
    )
    evaluate(Path(kind), options, log=lambda line: None)


def label_seeds() -> Iterator[bytes]:
    paths = _jsonl(
        *({**_ROW, "path": path} for path in ("x/1.jpg", "a.tar::x/2.jpg", "é/1.jpg", "\udcff"))
    )
    texts = (
        "path,label\nx/1.jpg,x\n2.jpg,y\n",
        '\ufeffpath,label\r\n"x/1.jpg",x\r\n',
        "label,path\nx,/data/x/1.jpg\ny,/data/y/1.jpg\n",
        "path,label\nx/1.jpg,x\nx/1.jpg,y\n",
    )
    for text in texts:
        yield mutators.join_files({"labels.csv": text.encode(), "t.jsonl": paths})


def check_labels(data: bytes) -> None:
    files = mutators.split_files(data)
    put(Path("labels.csv"), files.get("labels.csv", b""))
    put(Path("t.jsonl"), files.get("t.jsonl", b""))
    labels = LabelFile(Path("labels.csv"))
    paths = [row.path for row in table_reader.read(Path("t.jsonl"))]
    for path in paths:
        labels.register(path)
    for path in paths:
        found = labels.label_of(path)
        if found is not None and not isinstance(found, str):
            raise AssertionError(str(found))
    labels.match_counts()
    labels.no_match_message("x")


_JSONL = mutators.lines_change(mutators.json_change(_COLUMNS))
_CHANGES = {
    ".csv": mutators.one_of(mutators.csv_change(_COLUMNS), mutators.lines_change()),
    ".jsonl": _JSONL,
    ".json": mutators.json_change(("classes",)),
}


def mutate(rng: random.Random, data: bytes) -> bytes:
    return mutators.files_change(_CHANGES)(rng, data)


_WORDS = (*(name.encode() for name in _COLUMNS), b"%% t.csv\n", b"%% t.jsonl\n", b"ok", b"error")

TARGETS = (
    Target("scores", check, seeds, mutate, words=_WORDS),
    Target("labels", check_labels, label_seeds, mutate, words=(*_WORDS, b"::", b".tar::")),
)
