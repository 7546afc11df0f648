import shlex

import numpy as np
import pytest

import fledge
from tests.training.conftest import SHORT, coloured
from training.config import load
from training.engine import finetune
from training.evaluation import shortcomings
from training.run import checkpoint


def lines(photos, right):
    names = [f"class {i}" for i in range(len(photos))]
    return list(shortcomings.shortcomings(names, np.array(photos), np.array(right)))


@pytest.mark.parametrize(
    ("photos", "right", "at_the_level"),
    [
        ([40, 40, 40, 40], [40, 0, 0, 0], True),
        ([40, 40, 40, 40], [20, 20, 30, 20], False),
        ([30, 3, 2], [30, 1, 0], True),  # 88.6 % where one class has 85.7 %
        ([30, 3, 2], [30, 3, 2], False),
        ([500, 500], [258, 257], True),  # one standard error is 1.6 points
        ([500, 500], [259, 259], False),
        ([500, 0], [300, 0], False),  # of one class alone nothing can be said
    ],
)
def test_an_accuracy_at_the_level_of_one_constant_answer_is_said(photos, right, at_the_level):
    assert any("level of always saying class 0" in line for line in lines(photos, right)) == (
        at_the_level
    )


def test_classes_that_are_never_found_are_named_with_their_photos():
    assert lines([90, 8, 3], [90, 8, 0]) == ["1 class is never found: class 2 (0 of 3)"]
    (line,) = lines([50] * 3 + [2] * 7, [50] * 3 + [0] * 7)
    assert line.startswith("7 classes are never found: class 3 (0 of 2), class 4 (0 of 2), ")
    assert line.endswith(" and 2 more")
    assert lines([9, 9, 0], [9, 9, 0]) == []  # nothing is known of a class without photos


def test_classes_without_photos_are_named():
    names = [f"class {i}" for i in range(8)]
    found = list(shortcomings.unmeasured(names[:3], np.array([9, 0, 2])))
    assert found == [
        "1 class has no photo among those that the accuracy was measured on: class 1; it says "
        "nothing about it"
    ]
    (line,) = shortcomings.unmeasured(names, np.array([9] + [0] * 7))
    assert line.startswith("7 classes have no photo among those")
    assert "class 5 and 2 more" in line
    assert list(shortcomings.unmeasured(names[:2], np.array([1, 1]))) == []


def test_a_class_without_a_validation_photo_gets_a_hint_in_preview_train_report_and_card(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    coloured(tmp_path / "photos" / "train", {"blue": 12, "green": 12, "red": 12})
    coloured(tmp_path / "photos" / "valid", {"blue": 6, "green": 6})
    hint = "1 class has no photo among those that the accuracy was measured on: red;"
    words = ["preview", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert fledge.main(words) == 0
    assert f"hint: {hint}" in capsys.readouterr().out
    said: list[str] = []
    read = load.read(recipe(SHORT))
    run = finetune.run(
        read, str(tmp_path / "photos"), out=tmp_path / "run", device="cpu", log=said.append
    )
    assert any(line.startswith(f"warning: {hint}") for line in said)
    assert "photos: parts train/, valid/, with a folder per class in each" in said
    assert f"Warning: {hint}" in (run / "report.html").read_text()


def test_balanced_accuracy_is_the_mean_of_the_classes():
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    photos, right = shortcomings.count(np.eye(5)[answers], labels)
    expected = balanced_accuracy_score(labels, answers)
    assert shortcomings.balanced_accuracy(photos, right) == pytest.approx(expected, rel=1e-12)


def test_a_run_at_the_level_of_chance_says_so_at_its_end(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = coloured(tmp_path / "my photos", {"blue": 15, "green": 5, "red": 5})
    said: list[str] = []
    read = load.read(recipe(SHORT), ["stage.all.lr=1e-9", "stage.all.epochs=1"])
    run = finetune.run(read, str(photos), out=tmp_path / "run", device="cpu", log=said.append)
    metrics = checkpoint.read_info(run / "best.json").metrics
    assert metrics["balanced_accuracy"] < 0.5
    *_, level, lost, remedy, last = said
    assert level.startswith("warning: accuracy ")
    assert " the level of always saying blue, 60.00% of 5 photos" in level
    assert remedy.endswith("train longer: stage.all.epochs=2")
    assert "never found: " in lost
    assert f"balanced {metrics['balanced_accuracy']:.2%}" in last
    assert "next: fledge export" in last
    words = shlex.split(remedy.partition("`")[2].partition("`")[0])
    monkeypatch.chdir(tmp_path)
    assert fledge.main(words[1:]) == 0
    page = (run / "report.html").read_text()
    assert "Warning: accuracy " in page
    assert "balanced accuracy" in page


def test_a_run_that_learns_has_no_warning(recipe, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    run = finetune.run(
        load.read(recipe(), ["stage.all.cycle_len=8"]),
        str(photos),
        out=tmp_path / "run",
        device="cpu",
        log=said.append,
    )
    assert checkpoint.read_info(run / "best.json").metrics["balanced_accuracy"] > 0.8
    assert not [line for line in said if "warning: " in line and "pretrained" not in line]
    assert "Warning: " not in (run / "report.html").read_text()
