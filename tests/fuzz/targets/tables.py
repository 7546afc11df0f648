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
        semicolons = text.replace(",", ";").encode("utf-16")
        yield mutators.join_files({"labels.csv": semicolons, "t.jsonl": paths})


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


# Tables of labels that are the data set of a training

_PHOTOS = ("x/1.jpg", "x/2.jpg", "y/1.jpg", "train/3.jpg", "test/4.jpg", "é.png")


def prepare_table() -> None:
    for name in _PHOTOS:
        path = Path("photos") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    from training.data import dataset  # noqa: F401


def table_seeds() -> Iterator[bytes]:
    rows = [(name, name[0]) for name in _PHOTOS[:3]]
    for first, delimiter, form in (
        ("id,label", ",", "{}"),
        ("image;class;split", ";", "C:\\\\photos\\\\{}"),
        ("", "\t", "../photos/{}"),
        ("sep=;\nfile;species", ";", "/data/{}"),
    ):
        lines = [first, *(delimiter.join((form.format(n), label)) for n, label in rows)]
        text = "\r\n".join(filter(None, lines))
        for encoding in ("utf-8", "utf-16"):
            yield b"csv\n" + text.encode(encoding)
    for name, label in rows:
        yield b"jsonl\n" + json.dumps({"file_name": name, "label": label}).encode() * 2
    yield "txt\né 1.0\nx/1 01\nx/2 1\n".encode()


def check_table(data: bytes) -> None:
    from training.config.sections import DataConfig
    from training.data.dataset import load_dataset

    kind, _, body = data.partition(b"\n")
    suffix = {b"jsonl": "jsonl", b"txt": "txt", b"tsv": "tsv"}.get(kind, "csv")
    for old in Path("photos").glob("t.*"):
        old.unlink()
    path = Path("photos") / f"t.{suffix}"
    put(path, body)
    dataset = load_dataset(str(path), config=DataConfig(similar="merge"), trainable=False)
    root = Path("photos").resolve()
    for photo, label in (*dataset.train, *dataset.valid, *dataset.test):
        dataset.classes[label].encode()
        if photo.relative_to(root).as_posix() not in _PHOTOS:
            raise AssertionError(f"{photo} is none of the photos")


def mutate_table(rng: random.Random, data: bytes) -> bytes:
    kind, mark, body = data.partition(b"\n")
    columns = ("id", "label", "image", "class", "split")
    if kind == b"jsonl":
        body = mutators.lines_change(mutators.json_change(columns))(rng, body)
    else:
        body = mutators.one_of(mutators.csv_change(columns), mutators.lines_change())(rng, body)
    return kind + mark + body


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
    Target(
        "table",
        check_table,
        table_seeds,
        mutate_table,
        prepare=prepare_table,
        words=(b"id", b"label", b"train", b"sep=;", b"\xff\xfe", b"\\", b"../", b"C:\\"),
    ),
)
