"""`fledge export RUN --folds RUN …`: precisions are judged on the held-out photos of all folds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import fledge
from export import benchmark, pipeline
from export.precision import folds
from export.precision.select import FoldGraph
from serving.errors import DataError
from tests.export.conftest import Run, rates
from training.data.dataset import SPLIT_FILE, write_split
from training.run import checkpoint


def other_fold(run: Run, folder: Path) -> Path:
    """The run with its training and held-out photos exchanged."""
    shutil.copytree(run.folder, folder)
    data = replace(run.dataset, train=run.dataset.valid, valid=run.dataset.train)
    (folder / SPLIT_FILE).unlink()
    write_split(data, folder / SPLIT_FILE)
    return folder


@pytest.mark.process
def test_a_precision_is_judged_on_the_held_out_photos_of_all_folds(
    shared_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded_exporters: None
):
    monkeypatch.setattr(benchmark, "measure", rates)
    lines: list[str] = []
    manifest = pipeline.export(
        shared_run.folder,
        tmp_path / "bundle",
        pipeline.ExportOptions(precision="auto", accuracy_budget=90),
        folds=[other_fold(shared_run, tmp_path / "other fold")],
        formats=(),
        log=lines.append,
    )
    entry = manifest.tried["int8"]
    assert entry["photos"] == 42
    assert entry["photos_by"] == {"held_out": 42, "folds": 21, "training": 0, "worth": 42}
    # Both networks have the same weights, and so the accuracies of all photos together.
    assert manifest.parity["photos"] == 21
    assert f"--folds '{tmp_path / 'other fold'}': 21 held-out photos" in lines
    assert any("int8 kept; on 42 held-out photos, 21 of them of other folds " in x for x in lines)
    assert {path.name for path in (tmp_path / "bundle" / manifest.version).glob("*.onnx")} == {
        "model.onnx",
        "model.int8.onnx",
    }


def test_the_graph_of_a_fold_comes_with_its_own_photos(
    shared_run: Run, tmp_path: Path, recorded_exporters: None
):
    other = other_fold(shared_run, tmp_path / "other")
    (fold,) = folds.find([other], shared_run.info, [], log=lambda _: None)
    (found,) = folds.write([fold], tmp_path, shared_run.preprocess)
    assert isinstance(found, FoldGraph)
    assert (fold.train, fold.held_out) == (found.train, found.held_out)
    assert found.path.exists()
    parts = (
        [(s.path, s.label) for s in part]
        for part in (shared_run.dataset.valid, shared_run.dataset.train)
    )
    assert (found.train, found.held_out) == tuple(parts)


def test_runs_that_are_no_other_folds_are_refused(
    shared_run: Run, tmp_path: Path, recorded_exporters: None
):
    counted = [path for path, _ in shared_run.dataset.valid]

    def find(path: Path) -> None:
        folds.find([path], shared_run.info, counted, log=lambda _: None)

    with pytest.raises(DataError, match="its held-out photos count already; name runs of other"):
        find(shared_run.folder)
    other = other_fold(shared_run, tmp_path / "other")
    info = (other / checkpoint.BEST).with_suffix(".json")
    values = json.loads(info.read_text())
    values["preprocess"]["crop"] = 0.5
    info.write_text(json.dumps(values))
    with pytest.raises(DataError, match="its preprocess differs; name runs of the same recipe"):
        find(other)
    with pytest.raises(DataError, match=r"no checkpoint|no run|best"):
        find(tmp_path)


def test_the_option_reaches_the_export(
    shared_run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    given: dict[str, object] = {}
    monkeypatch.setattr(pipeline, "export", lambda *args, **options: given.update(options))
    out = str(tmp_path / "bundle")
    words = ["export", str(shared_run.folder), "--folds", "a", "b", "--photos", "c", "--out", out]
    assert fledge.main(words) == 0
    assert (given["folds"], given["photos"]) == ([Path("a"), Path("b")], Path("c"))
    words = ["export", "--checkpoint", "x", "--arch", "a", "--labels", "b", "--photos", "c"]
    assert fledge.main([*words, "--folds", "a", "--out", out]) == 2
    assert "--folds goes with a run" in capsys.readouterr().err
