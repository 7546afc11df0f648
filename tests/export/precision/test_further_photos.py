"""`fledge export RUN --photos DIR`: photos that the run has not seen, for judging precisions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from export import benchmark, pipeline
from export.precision import further_photos
from serving.errors import DataError
from tests.export.conftest import Run, jpeg, rates


def new_photos(folder: Path, per_class: int = 4) -> Path:
    rng = np.random.default_rng(99)
    for number, name in enumerate(Run.classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            (folder / name / f"new {index}.jpg").write_bytes(jpeg(number / 3, rng, (50, 41)))
    return folder


def known(run: Run) -> list[Path]:
    return [path for path, _ in (*run.dataset.train, *run.dataset.valid)]


def test_photos_of_the_run_are_left_out_by_content_and_counted(shared_run: Run, tmp_path: Path):
    folder = new_photos(tmp_path / "more photos")
    for number, path in enumerate(known(shared_run)[:5]):
        shutil.copy(path, folder / path.parent.name / f"renamed {number}.jpg")
    lines: list[str] = []
    # In the order of the logits, whatever the order of the folders.
    labels = ("red", "other", "green", "blue")
    found = further_photos.find(folder, labels, known(shared_run), lines.append)
    assert len(found) == 12
    assert all(path.name.startswith("new") for path, _ in found)
    assert all(labels[label] == path.parent.name for path, label in found)
    assert lines[-1] == (
        f"--photos '{folder}': 12 further held-out photos; 5 that the run has are left out"
    )


def test_the_folder_of_the_run_itself_is_refused(shared_run: Run):
    with pytest.raises(DataError, match="the run has all 42 photos already"):
        further_photos.find(shared_run.photos, Run.classes, known(shared_run), print)


def test_a_folder_of_another_class_is_refused(shared_run: Run, tmp_path: Path):
    folder = new_photos(tmp_path / "more")
    with pytest.raises(
        DataError, match=r"'blue' is no label .*; name each folder as the run has its"
    ):
        further_photos.find(folder, ("red", "green", "pink"), known(shared_run), print)


@pytest.mark.process
def test_a_precision_is_judged_on_further_photos_too(
    shared_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded_exporters: None
):
    monkeypatch.setattr(benchmark, "measure", rates)
    folder, lines = new_photos(tmp_path / "more", per_class=20), []
    options = pipeline.ExportOptions(precision="auto", accuracy_budget=90)
    manifest = pipeline.export(
        shared_run.folder,
        tmp_path / "bundle",
        options,
        photos=folder,
        formats=(),
        log=lines.append,
    )
    entry = manifest.tried["int8"]
    assert entry["photos"] == 81
    assert entry["photos_by"] == {"held_out": 81, "folds": 0, "training": 0, "worth": 81}
    assert manifest.parity["photos"] == 21  # as without them
    assert any("int8 kept; on 81 held-out photos" in line for line in lines)
