import dataclasses
import json
import shlex

import numpy as np
import pytest
from PIL import Image

import fledge
from serving.errors import OptionError
from tests.support.finished_run import finished
from tests.training.conftest import coloured
from training.config import load
from training.config.sections import TtaConfig
from training.data.dataset import load_dataset
from training.evaluation import fits
from training.evaluation.evaluate import evaluate
from training.evaluation.metrics import paired_interval


@pytest.fixture
def run(tmp_path):
    """A run on photos of about 2 : 1, so that each fit shows something else."""
    photos = coloured(tmp_path / "my photos", {"blue": 12, "red": 12})
    for path in photos.rglob("*.jpg"):
        rng = np.random.default_rng(int(path.stem))
        pixels = rng.integers(0, 256, (40, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    finished(tmp_path / "run", photos, valid=0.5)
    return tmp_path / "run"


def trained_with(run, fit):
    """Change the recorded fit of a run."""
    path = run / "best.json"
    info = json.loads(path.read_text())
    info["preprocess"]["fit"] = fit
    path.write_text(json.dumps(info))


def test_each_fit_is_evaluated_as_if_the_checkpoint_had_it(run):
    found = {one.fit: one.result for one in fits.compare(run, ["squish", "pad", "crop"])}
    assert list(found) == ["crop", "squish", "pad"]
    for fit in ("squish", "pad"):
        assert not np.allclose(found[fit].probabilities, found["crop"].probabilities)
        trained_with(run, fit)
        assert (evaluate(run).probabilities == found[fit].probabilities).all()


def test_the_fit_of_training_is_first_even_if_it_is_not_named(run):
    trained_with(run, "pad")
    assert [one.fit for one in fits.compare(run, ["crop"])] == ["pad", "crop"]
    assert [one.fit for one in fits.compare(run, ["pad"])] == ["pad"]


def test_views_are_those_of_each_fit(run):
    found = fits.compare(run, ["pad"], tta=TtaConfig(count=10))
    assert [one.result.views for one in found] == [10, 8]  # pad has no wide views


def test_differences_are_paired_by_photo(run):
    base = evaluate(run)
    classes = len(base.classes)

    def answering(right, paths=base.paths):
        answers = np.where(right, base.labels, (base.labels + 1) % classes)[: len(paths)]
        return dataclasses.replace(
            base,
            probabilities=np.eye(classes)[answers],
            labels=base.labels[: len(paths)],
            paths=paths,
        )

    number = base.photos
    first, second = np.zeros(number, bool), np.zeros(number, bool)
    first[:3] = second[2:7] = True  # two lost, four won
    one = fits._compared("pad", answering(second), answering(first))
    assert one.gain == pytest.approx(2 / number)
    assert one.interval == paired_interval(4, 2, number)
    assert one.interval[0] < one.gain < one.interval[1]
    # A photo that could not be read with one of the fits is no difference.
    fewer = fits._compared("pad", answering(second, base.paths[:5]), answering(first))
    assert fewer.gain == pytest.approx((2 - 2) / 5)


def test_the_command_prints_a_table_and_how_to_train(run, capsys):
    words = ["evaluate", str(run), "--fit", "crop,squish,pad"]
    assert fledge.main(words) == 0
    output = capsys.readouterr()
    title, *rows, last = output.out.splitlines()
    assert title.split()[:3] == ["fit", "accuracy", "loss"]
    assert [row.split()[0] for row in rows] == ["crop", "squish", "pad"]
    for row, one in zip(rows, fits.compare(run, ["squish", "pad"]), strict=True):
        accuracy, loss = row.split()[1:3]
        assert float(accuracy) == pytest.approx(one.result.accuracy, abs=1e-6)
        assert float(loss) == pytest.approx(one.result.loss, abs=1e-6)
    assert "trained with it" in rows[0]
    assert last == "photos 12  views 1  broken 0"
    assert "the network was trained with preprocess.fit=crop" in output.err
    command = shlex.split(output.err.split("`")[1])
    options = fledge._parser().parse_args(command[1:])
    others = fits.compare(run, ["squish", "pad"])[1:]
    best = max(others, key=lambda one: (one.result.accuracy, -one.result.loss)).fit
    assert load.read(options.recipe, options.overrides).preprocess.fit == best
    split = load_dataset(options.data, split=options.split)
    assert {s.path for s in split.valid} == set(evaluate(run).paths)  # the same held-out photos


def test_the_trained_fit_alone_asks_for_no_other_training(run, capsys):
    assert fledge.main(["evaluate", str(run), "--fit", "crop"]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 3
    assert output.err == ""


def test_the_csv_has_the_answers_with_the_named_fit(run, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    words = ["evaluate", str(run), "--csv", str(out), "--fit"]
    assert fledge.main([*words, "squish"]) == 0
    rows = out.read_text().splitlines()[1:]
    probabilities = fits.compare(run, ["squish"])[1].result.probabilities.max(axis=1)
    assert [float(row.split(",")[-1].strip('"')) for row in rows] == pytest.approx(
        probabilities.tolist(), abs=1e-6
    )
    capsys.readouterr()
    assert fledge.main([*words, "squish,pad"]) == 2
    assert "--csv takes the answers with one fit" in capsys.readouterr().err


def test_unknown_fits_are_refused():
    assert fits.parse("Crop, pad,crop") == ["crop", "pad"]
    for wrong in ("", "crop,", "stretch", "crop;pad"):
        with pytest.raises(OptionError, match="use one or more of crop,squish,pad"):
            fits.parse(wrong)
