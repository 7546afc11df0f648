"""Manifests that JSON allows and an export never writes are refused, or their reports left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import storage
from serving.bundle.inspect import describe
from serving.bundle.manifest import (
    Manifest,
    measured_max_batch,
    measured_parallelism,
    multithreading_pays,
)
from serving.errors import BundleError
from serving.inference.load import open_predictor
from tests.support.tiny_bundle import altered, tiny_bundle

UNKNOWN = "in a form that this version of Fledge does not know"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("hostile") / "bundle")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"provenance": {}', '"provenance": {"a": Infinity}'),
        lambda text: text.replace('"provenance": {}', '"provenance": {"a": 1e999}'),
        lambda text: text.replace('"provenance": {}', '"provenance": {"a": "\\ud800"}'),
        lambda text: text.replace('"name": "tiny"', '"name": "\\udcff"'),
        lambda text: text.replace("{}", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", 1),
        lambda text: text.replace('"temperature": 1.0', f'"temperature": {"9" * 5000}'),
    ],
)
def test_what_can_be_read_but_not_written_is_refused(
    folder: Path, change: Callable[[str], str]
) -> None:
    text = storage.read(folder).manifest.to_json()
    assert change(text) != text
    with pytest.raises(BundleError, match="not a manifest") as refused:
        Manifest.from_json(change(text))
    assert "\n" not in str(refused.value)


OTHER_FORMS: list[tuple[str, dict[str, Any]]] = [
    ("parity", {"parity": {"graphs": 3}}),
    ("parity", {"parity": {"photos": 1, "graphs": {}}}),
    ("confidence", {"calibration": {"before": 0, "after": []}}),
    ("confidence", {"calibration": {"before": {"ece": "x"}, "after": {"ece": {}}}}),
    ("views", {"tta": {"advised": 2, "photos": 3, "views": []}}),
    ("views", {"tta": {"other": 1}}),
    ("graphs", {"tried": {"int8": [1]}}),
    ("graphs", {"tuning": {"cpu": []}}),
    ("tuning", {"tuning": {"cpu": {"throughput": {"fp32": {"workers": 1}}}}}),
    ("source", {"provenance": {"data": "photos"}}),
]


@pytest.mark.parametrize(("topic", "changes"), OTHER_FORMS)
def test_a_report_of_another_form_is_named_and_the_others_are_described(
    tmp_path: Path, topic: str, changes: dict[str, Any]
) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    altered(folder, **changes)
    lines = describe(folder)
    assert f"  {topic:<12}{UNKNOWN}" in lines
    assert any("unchanged since the export" in line for line in lines)


@pytest.mark.parametrize(
    "tuning",
    [
        {"cpu": [1]},
        {"cpu": {"cores": 4, "throughput": 3, "latency": "x", "max_batch": "many"}},
        {"cpu": {"cores": 4, "throughput": {"fp32": []}, "latency": {"fp32": None}}},
        {"cpu": {"cores": 4, "throughput": {"fp32": {"workers": "2", "threads": None}}}},
        {"cpu": {"cores": 4, "throughput": {"fp32": {"workers": 10**9, "threads": 1}}}},
        {"cpu": {"cores": 4, "throughput": {"fp32": {"workers": True, "threads": -1}}}},
        {"cpu": {"cores": 4, "max_batch": -5}},
        {"cpu": {"cores": 4, "max_batch": 10**9}},
    ],
)
def test_a_measurement_of_another_form_counts_as_none(folder: Path, tuning: dict[str, Any]) -> None:
    manifest = storage.read(folder).manifest.model_copy(update={"tuning": tuning})
    assert measured_parallelism(manifest, "fp32", 4) == (4, 1)
    assert multithreading_pays(manifest, "fp32", 4)
    assert measured_max_batch(manifest, "cpu") is None


def test_a_bundle_with_other_reports_is_served(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    reports = {name: {"cpu": [json.dumps({})]} for name in ("tuning", "tried", "parity")}
    altered(folder, **reports)
    assert open_predictor(folder, device="cpu").cap == 1
