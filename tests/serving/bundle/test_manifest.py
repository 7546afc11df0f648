"""Reading a manifest: the text of every refusal, the version hash, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import storage
from serving.bundle.manifest import (
    Manifest,
    Parallelism,
    content_version,
    json_schema,
    measured_max_batch,
    measured_parallelism,
    multithreading_pays,
)
from serving.errors import BundleError
from serving.imaging.preprocess import DECODES, FITS, Preprocess
from serving.imaging.tta import VIEWS
from tests.support.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tiny_bundle(tmp_path_factory.mktemp("bundle"))
    return storage.read(folder).manifest


def refusal(values: Any) -> str:
    with pytest.raises(BundleError) as refused:
        Manifest.from_json(values if isinstance(values, str) else json.dumps(values))
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a manifest: Expecting property name enclosed in double quotes: line 1 column"),
        ('["schema"]', "not a manifest: it is not a JSON object"),
        ("{}", "schema None is not 1; export the model again"),
        ('{"schema": 2, "labels": 3}', "schema 2 is not 1; export the model again"),
        (
            f'{{"schema": "{"x" * 200}"}}',
            f"schema '{'x' * 79} is not 1; export the model again",
        ),
        ('{"schema": 1}', "not a manifest: name is missing"),
    ],
)
def test_json_that_is_no_manifest_is_refused_by_name(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


FIT = "input should be 'crop', 'squish' or 'pad'"
ZOOM = "input should be greater than 0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": None}, "arch = None: input should be a valid string"),
        ({"arch": {"a": 1}}, "arch: input should be a valid string"),
        ({"labels": 3}, "labels = 3: input should be a valid array"),
        ({"calibration": [1]}, "calibration: input should be a valid object"),
        ({"temperature": True}, "temperature = True: input should be a valid number"),
        ({"temperature": 0}, "temperature = 0: input should be greater than 0"),
        ({"tempera\nture": 1}, "tempera ture is an unknown field"),
        ({"x" * 300: 1}, f"{'x' * 200} is an unknown field"),
        ({"average": "y" * 200}, f"average = '{'y' * 79}: input should be 'mean' or 'log_mean'"),
        (
            {"views": [VIEWS[1]._asdict(), VIEWS[0]._asdict()]},
            "views: the first view must be the plain one",
        ),
        ({"preprocess": {"size": 224}}, "preprocess.crop is missing"),
        *(
            (
                {"preprocess": Preprocess().to_dict() | {"fit": wrong}},
                f"preprocess.fit{shown}: {FIT}",
            )
            for wrong, shown in (([], ""), (5, " = 5"), (None, " = None"), ("zoom", " = 'zoom'"))
        ),
        *(
            ({"views": [VIEWS[0]._replace(zoom=zoom)._asdict()]}, f"views.0.zoom = {zoom}: {ZOOM}")
            for zoom in (0, -1.5)
        ),
    ],
)
def test_the_refusal_of_a_manifest_names_the_field_and_the_rule(
    manifest: Manifest, changes: dict[str, Any], message: str
) -> None:
    assert refusal(json.loads(manifest.to_json()) | changes) == f"not a manifest: {message}"


def test_the_plain_view_may_have_another_name(manifest: Manifest) -> None:
    values = json.loads(manifest.to_json())
    values["views"][0]["name"] = "centre"
    assert Manifest.from_json(json.dumps(values)).views[0] == VIEWS[0]._replace(name="centre")


def test_optional_fields_have_defaults_that_change_no_answer(manifest: Manifest) -> None:
    values = json.loads(manifest.to_json())
    given = ("name", "version", "arch", "labels", "preprocess", "precisions", "files", "schema")
    read = Manifest.from_json(json.dumps({name: values[name] for name in given}))
    defaults = json.loads(read.to_json())
    assert {name: value for name, value in defaults.items() if name not in given} == {
        "views": [view._asdict() for view in VIEWS],
        "average": "mean",
        "temperature": 1.0,
        "thresholds": {"confident": None, "energy": None},
        "calibration": None,
        "tried": {},
        "graph": {},
        "torchscript": None,
        "torch_export": None,
        "golden": [],
        "tta": None,
        "parity": {},
        "batchnorm": {},
        "tuning": {},
        "provenance": {},
    }


def test_the_text_of_a_manifest_is_indented_utf8_in_the_order_of_the_fields(
    manifest: Manifest,
) -> None:
    text = manifest.model_copy(update={"name": "m\xf6we"}).to_json()
    assert text.startswith('{\n  "name": "m\xf6we",\n  "version": ')
    assert text.endswith('\n  "schema": 1\n}\n')
    assert list(json.loads(text)) == list(json_schema()["properties"])


def test_graphs_are_the_files_of_all_precisions_and_torch_files(manifest: Manifest) -> None:
    assert manifest.graphs == ["model.onnx"]
    several = manifest.model_copy(
        update={
            "precisions": {"fp32": {"file": "a.onnx"}, "int8": {"file": "b.onnx"}},
            "torchscript": "a.ts",
            "torch_export": "a.pt2",
        }
    )
    assert several.graphs == ["a.onnx", "b.onnx", "a.ts", "a.pt2"]


def test_the_version_of_a_bundle_never_changes(manifest: Manifest) -> None:
    """Clients and mounted folders know bundles by it, so an upgrade of Fledge must not change it.

    Change the expected value only together with `manifest.SCHEMA`.
    """
    fixed = manifest.model_copy(
        update={
            "labels": ("daisy", "r\xf6schen"),
            "preprocess": Preprocess(size=32),
            "temperature": 1.5,
            "thresholds": {"confident": 0.5, "energy": None},
            "views": VIEWS[:2],
            "average": "log_mean",
        }
    )
    assert content_version(fixed, {"b.onnx": "2", "a.onnx": "1"}) == "cc69343b1d52"


def test_decode_and_fit_decide_the_version(manifest: Manifest) -> None:
    versions = {
        content_version(
            manifest.model_copy(update={"preprocess": Preprocess(decode=decode, fit=fit)}), {}
        )
        for decode in DECODES
        for fit in FITS
    }
    assert len(versions) == len(DECODES) * len(FITS)


# ---- measurements of the export

TUNING = {
    "cpu": {
        "cores": 4,
        "throughput": {"fp32": {"workers": 2, "threads": 2}, "int8": {"workers": 4, "threads": 1}},
        "latency": {"fp32": {"threads": 1}, "int8": {"threads": 4}},
        "max_batch": 1,
    },
    "cuda": {"max_batch": 1024},
}


def tuned(manifest: Manifest, tuning: dict[str, Any] = TUNING) -> Manifest:
    return manifest.model_copy(update={"tuning": tuning})


def test_measurements_hold_for_their_precision_and_number_of_cores(manifest: Manifest) -> None:
    known = tuned(manifest)
    assert measured_parallelism(known, "fp32", 4) == Parallelism(runs=2, threads=2)
    assert measured_parallelism(known, "int8", 4) == Parallelism(runs=4, threads=1)
    assert measured_parallelism(known, "fp16", 4) == Parallelism(runs=4, threads=1)
    assert measured_parallelism(known, "fp32", 8) == Parallelism(runs=8, threads=1)
    assert not multithreading_pays(known, "fp32", 4)
    assert multithreading_pays(known, "int8", 4)
    assert multithreading_pays(known, "fp16", 4)
    assert multithreading_pays(known, "fp32", 8)
    assert measured_max_batch(known, "cpu") == 1
    assert measured_max_batch(known, "cuda") == 1024


@pytest.mark.parametrize("tuning", [{}, {"cpu": None}, {"cpu": [4], "cuda": 3}, {"cpu": {}}])
def test_without_measurements_each_core_runs_its_own_graph(
    manifest: Manifest, tuning: dict[str, Any]
) -> None:
    known = tuned(manifest, tuning)
    assert measured_parallelism(known, "fp32", 4) == Parallelism(runs=4, threads=1)
    assert multithreading_pays(known, "fp32", 4)
    assert measured_max_batch(known, "cpu") is None
    assert measured_max_batch(known, "cuda") is None


@pytest.mark.parametrize("count", [None, 0, -1, 5, 1.0, "2", True, [2]])
def test_measurements_that_no_export_writes_are_ignored(manifest: Manifest, count: Any) -> None:
    for name in ("workers", "threads"):
        best = {"workers": 2, "threads": 2} | {name: count}
        known = tuned(manifest, {"cpu": {"cores": 4, "throughput": {"fp32": best}}})
        assert measured_parallelism(known, "fp32", 4) == Parallelism(runs=4, threads=1)
    if count != 5:
        assert measured_max_batch(tuned(manifest, {"cpu": {"max_batch": count}}), "cpu") is None
    large = tuned(manifest, {"cuda": {"max_batch": 65_537}})
    assert measured_max_batch(large, "cuda") is None


def test_the_published_schema_has_the_names_of_fields_and_no_defaults() -> None:
    """`test_storage` compares the published file with the output of the command."""
    published = Path(__file__).parents[3] / "docs/manifest.schema.json"
    assert json.dumps(json_schema(), indent=2) + "\n" == published.read_text()
