"""Lists of image paths: text, CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

from serving.evaluation import table_reader
from serving.inputs import lists, sources
from tests.fuzz import mutators
from tests.fuzz.target import Target, put

_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")


def seeds() -> Iterator[bytes]:
    """The first line is the suffix of the list's name, the second the column that is asked for."""
    for text in ("a.jpg\nb c.jpg\n", "\ufeffa.jpg\r\n\r\nb.jpg", "a.jpg\0b.jpg\0"):
        yield f".txt\n\n{text}".encode()
    for column in ("", "path", "image"):
        yield f'.csv\n{column}\npath,label\na.jpg,x\n,\n"b,c.jpg",y\n'.encode()
        yield f".csv\n{column}\n\ufefflabel;path\r\nx;a.jpg\r\n".encode()
        yield f".tsv\n{column}\npath\timage\na.jpg\tb.jpg\n".encode()
        yield f'.jsonl\n{column}\n{{"path": "a.jpg", "image": null}}\n\n{{"path": 3}}\n'.encode()
    yield b".csv\n\nname\na.jpg\n\xff.jpg\n"
    yield b".txt\n\n" + "ü.jpg\r\nin\\\\b.jpg\r\n".encode("utf-16")
    yield b".csv\n\n" + "sep=;\r\nimage;label\r\nü.jpg;x\r\n".encode("utf-16-le")
    yield b".csv\n2\nx;a.jpg\ny;b.jpg\n"


def check(data: bytes) -> None:
    suffix, _, rest = data.partition(b"\n")
    column, _, body = rest.partition(b"\n")
    kind = suffix.decode("latin-1")
    path = Path("list" + (kind if kind in _SUFFIXES else ".csv"))
    put(path, body)
    with contextlib.suppress(lists.DataError):
        _texts(list(sources.find(["-"], stdin=io.BytesIO(body))))
    asked = column.decode("utf-8", "surrogateescape") or None
    notes: list[str] = []
    _texts(list(sources.find([str(path)], column=asked, note=notes.append)))
    _texts(notes)


def _texts(found: list[str]) -> None:
    for text in found:
        os.fsencode(text)  # what can't be encoded can't be opened, and not be written into a table


def mutate(rng: random.Random, data: bytes) -> bytes:
    suffix, mark, rest = data.partition(b"\n")
    column, mark2, body = rest.partition(b"\n")
    choice = rng.randrange(8)
    if choice == 0:
        suffix = rng.choice(_SUFFIXES).encode()
    elif choice == 1:
        column = rng.choice((b"", b"path", b"image", b"label", b"\xff"))
    elif suffix == b".jsonl":
        body = mutators.lines_change(mutators.json_change(("path", "image")))(rng, body)
    else:
        body = mutators.one_of(mutators.lines_change(), mutators.csv_change(("path",)))(rng, body)
    return suffix + mark + column + mark2 + body


# Parquet: the lists and the tables of scores


def parquet_seeds() -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = {
        "path": ["a.jpg", "b.jpg"],
        "status": ["ok", "error"],
        "label": ["x", None],
        "probability": [0.5, None],
        "confident": [True, None],
        "top_k": [[("x", 0.5)], None],
        "error": ["", "bad: b"],
        "probabilities": [[0.5, 0.5], None],
    }
    pairs = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    scores["top_k"] = [[{"label": "x", "probability": 0.5}], None]
    full = pa.table({**scores, "top_k": pa.array(scores["top_k"], pairs)})
    tables = (
        full,
        pa.table({"path": ["a.jpg"]}),
        pa.table({"path": pa.array(["a.jpg", "b.jpg", "a.jpg"]).dictionary_encode()}),
        pa.table({"path": pa.array([b"a.jpg", b"\xff"], pa.binary()), "n": [1, 2]}),
        pa.table({"path": pa.array([], pa.string())}),
    )
    for table in tables:
        for compression in ("none", "snappy", "zstd"):
            file = io.BytesIO()
            pq.write_table(table, file, compression=compression, store_schema=False)
            yield file.getvalue()


def check_parquet(data: bytes) -> None:
    path = Path("list.parquet")
    put(path, data)
    notes: list[str] = []
    with contextlib.suppress(lists.DataError):
        _texts(list(sources.find([str(path)], note=notes.append)))
    for row in table_reader.read(path):
        row.top_k()
        row.probabilities()


def repair_parquet(data: bytes) -> bytes:
    """State the length of the footer that the file has, if the marks at both ends are there."""
    if not data.startswith(b"PAR1") or len(data) < 12:
        return data
    body = data if data.endswith(b"PAR1") else data[:-4] + b"PAR1"
    (length,) = struct.unpack("<I", body[-8:-4])
    return body if length < len(body) - 12 else body[:-8] + struct.pack("<I", 1) + b"PAR1"


TARGETS = (
    Target("list", check, seeds, mutate, words=(b"path", b"image", b"\xef\xbb\xbf", b"\r\n", b'"')),
    Target(
        "parquet",
        check_parquet,
        parquet_seeds,
        repair=repair_parquet,
        prepare=lambda: __import__("pyarrow.parquet") and None,
        words=(b"PAR1", b"path", b"status", b"label", b"probability", b"top_k", b"probabilities"),
    ),
)
