"""Manifests and tables whose JSON is hostile end in one line, without gigabytes."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from serving.bundle import storage
from serving.bundle.manifest import Manifest
from serving.errors import BundleError, DataError
from serving.evaluation.table_reader import read
from serving.inputs import lists
from serving.scoring.summary import read_classes
from serving.utils import json_reader
from serving.utils.json_reader import JsonError
from tests.support.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_bundle(tmp_path_factory.mktemp("json") / "bundle")
    return dict(json.loads((folder / storage.MANIFEST).read_text()))


CHANGES: dict[str, dict[str, Any]] = {
    "labels of numbers": {"labels": [1] * 1_990_000},
    "golden of numbers": {"golden": [1] * 1_990_000},
    "files of numbers": {"files": {str(number): 1 for number in range(150_000)}},
    "files of nothing": {"files": {str(number): {} for number in range(45_000)}},
    "views of others": {"views": [{"q": 1}] * 45_000},
    "unknown fields": {f"x{number}": 1 for number in range(150_000)},
    "precisions of text": {"precisions": "x"},
    "many lists": {"tried": {"a": [[]] * 5_000_000}},
    "many objects": {"tried": {"a": [{}] * 4_000_000}},
    "long name": {"name": ["a" * 10_000_000]},
    "line breaks": {"arch": ["\n\x1b[2J"], "\n\x1b[2J": 1},
    "huge number": {"temperature": 10**39},
    "number of many digits": {"temperature": 10**41},
    "large size": {"preprocess": {"size": 10**30}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_manifest_is_refused_in_one_line(manifest: dict[str, Any], name: str) -> None:
    text = json.dumps(manifest | CHANGES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if name == "huge number":
        assert Manifest.from_json(text).temperature == 10**39
        return
    with pytest.raises(BundleError, match="not a manifest") as refused:
        Manifest.from_json(text)
    assert time.process_time() - started < 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 400e6
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_the_largest_manifest_of_an_export_is_read(manifest: dict[str, Any]) -> None:
    """With 22,000 classes, 8 golden images and three precisions."""
    labels = [f"class-{number}" for number in range(22_000)]
    one = {"file": "golden/0.jpg", "probabilities": {}}
    values = [1 / 22_000 + number / 1e9 for number in range(22_000)]
    one["probabilities"] = {precision: values for precision in ("fp32", "int8", "fp16")}
    parity = {"by_class": {str(number): [10, 9] for number in range(22_000)}}
    new = manifest | {"labels": labels, "golden": [one] * 8, "parity": parity}
    text = json.dumps(new, indent=2)  # as `to_json` writes it
    assert len(text) > 16e6
    assert len(Manifest.from_json(text).labels) == 22_000


TEXTS = {
    "twice": '{"a": 1, "b": 2, "a": 3}',
    "nan": "[NaN]",
    "minus infinity": "[-Infinity]",
    "overflow": "[1e400]",
    "surrogate": '"\\ud800"',
    "surrogate key": '{"\\udfff": 1}',
    "deep": "[" * 101 + "]" * 101,
    "deeper": "[" * 10**6,
    "digits": "9" * 41,
    "cut": '{"a": ',
    "nothing": "",
    "bytes": b"\xff\xfe",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "nul": "\0",
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_not_strict_json_is_refused(name: str) -> None:
    with pytest.raises(JsonError) as refused:
        json_reader.parse(TEXTS[name])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 400


def test_strict_json_is_read_as_by_python() -> None:
    for value in (
        *(None, True, 0, -1, 10**39, 0.1, 1e-320, "", "\U0001f600\n", [], {}, [[[1]]]),
        {"a": {"b": [1, 2.5, {"c": None}]}, "": "x"},
    ):
        for ascii_only in (True, False):
            text = json.dumps(value, ensure_ascii=ascii_only)
            assert json_reader.parse(text) == json_reader.parse(text.encode()) == value
    assert json_reader.parse("[" * 100 + "]" * 100) == json.loads("[" * 100 + "]" * 100)


def test_the_schema_s_first_error_is_told() -> None:
    with pytest.raises(JsonError, match=r"^1 = 'x': input should be a valid integer"):
        json_reader.validate([1, "x"], TypeAdapter(list[int]))


def test_endless_lines_of_tables_and_lists_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "scores.jsonl"
    with table.open("wb") as file:
        file.truncate(2**33)  # 8 GB of zeros without a line break
    with pytest.raises(DataError, match="line 1 is longer than"):
        list(read(table))
    with pytest.raises(DataError, match="it is mostly NUL bytes"):
        lists.open_list(str(table), None)
    with table.open("r+b") as file:  # after the part from which the form is recognised
        file.write(b'{"path": "' + b"x" * 2**17)
    with pytest.raises(DataError, match="line 1 is longer than"):
        lists.open_list(str(table), None)
    table.with_name("scores.summary.json").symlink_to("/dev/zero")
    assert read_classes(table) is None
