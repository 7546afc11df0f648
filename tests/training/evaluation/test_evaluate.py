import csv
import dataclasses

import numpy as np
import pytest
import torch

import fledge
from serving.errors import DataError, OptionError
from serving.imaging import decode
from serving.imaging.preprocess import DECODES, FITS, Preprocess
from serving.imaging.tta import VIEWS, average, render, softmax, views_for
from tests.support.finished_run import finished
from tests.support.tiny_bundle import elongated
from tests.training.conftest import coloured
from training.activations import frozen_prefix
from training.config.sections import TtaConfig
from training.evaluation import evaluate
from training.pixels.transform import PixelTransform
from training.run import checkpoint
from training.run.dataset import load_run_dataset

BATCH = 8


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", BATCH)


@pytest.fixture
def run(tmp_path):
    photos = coloured(tmp_path / "photos", {"blue": 15, "green": 15, "red": 15})
    finished(tmp_path / "run", photos, valid=0.6)  # 27 photos: the last batch is partial
    return tmp_path / "run"


@pytest.fixture
def lines():
    return []


def expected(run, samples, view):
    """Probabilities of one view, all photos at once through `logits_of`."""
    classifier, info = checkpoint.load(run)
    photos = [decode.read(s.path, preprocess=info.preprocess) for s in samples]
    pixels = [render(p.image, info.preprocess, [view], p.area)[0] for p in photos]
    pixels = torch.from_numpy(np.stack(pixels))
    network = frozen_prefix.fused(classifier.eval())
    return softmax(evaluate.logits_of(network, pixels, info.preprocess).numpy())


def valid(run):
    return load_run_dataset(run).valid


def test_without_tta_the_probabilities_are_those_of_the_plain_view(run, lines):
    result = evaluate.evaluate(run, log=lines.append)
    samples = valid(run)
    assert (result.probabilities == expected(run, samples, VIEWS[0])).all()
    assert (result.plain == result.probabilities).all()
    assert result.paths == tuple(s.path for s in samples)
    assert result.labels.tolist() == [s.label for s in samples]
    assert (result.photos, result.views, result.broken) == (len(samples), 1, 0)
    assert (result.accuracy, result.loss) == evaluate.score(result.plain, result.labels)
    assert len(np.unique(result.plain.argmax(axis=1))) > 1
    assert lines == []


def test_photos_after_a_broken_one_fill_its_batch(run, lines):
    samples = list(valid(run))
    samples[2].path.write_bytes(b"no photo")
    samples[20].path.write_bytes(samples[20].path.read_bytes()[:200])
    result = evaluate.evaluate(run, log=lines.append)
    readable = [s for i, s in enumerate(samples) if i not in (2, 20)]
    assert (result.plain == expected(run, readable, VIEWS[0])).all()
    assert (result.photos, result.broken) == (len(readable), 2)
    assert lines[0].startswith("warning: the photos in ")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"skipped {samples[i].path}" for i in (2, 20)
    ]


@pytest.mark.parametrize("how", ["mean", "log_mean"])
def test_views_are_averaged_as_in_the_service(run, how):
    result = evaluate.evaluate(run, tta=TtaConfig(count=3, average=how))
    by_view = np.stack([expected(run, valid(run), view) for view in VIEWS[:3]], axis=1)
    assert (result.probabilities == np.stack([average(rows, how) for rows in by_view])).all()
    assert (result.plain == by_view[:, 0]).all()
    assert result.views == 3


@pytest.mark.parametrize(
    ("kind", "views"), [("flip", 2), ("five_crop", 5), ("multi_scale", 4), ("draws", 4)]
)
def test_every_kind_keeps_the_plain_view_and_its_weight(run, kind, views):
    plain = evaluate.evaluate(run)
    result = evaluate.evaluate(run, tta=TtaConfig(kind=kind, count=3))
    assert result.views == views
    assert (result.plain == plain.probabilities).all()
    assert not np.allclose(result.probabilities, plain.probabilities, atol=1e-6)
    assert np.allclose(result.probabilities.sum(axis=1), 1)
    only_plain = evaluate.evaluate(run, tta=TtaConfig(kind=kind, count=3, plain_weight=1))
    assert np.allclose(only_plain.probabilities, plain.probabilities)


def test_draws_are_a_function_of_the_recipes_seed(run):
    draws = TtaConfig(kind="draws", count=2)
    first, second = (evaluate.evaluate(run, tta=draws).probabilities for _ in range(2))
    assert (first == second).all()
    path = run / "recipe.toml"
    path.write_text(path.read_text().replace("seed = 3", "seed = 4"))
    assert not np.allclose(evaluate.evaluate(run, tta=draws).probabilities, first)
    path.unlink()
    with pytest.raises(OptionError, match=r"recipe.toml: no such recipe"):
        evaluate.evaluate(run, tta=draws)


def test_at_most_two_batches_of_photos_are_read_ahead(run, monkeypatch):
    read = [0]
    ahead, sizes = [], []
    original, network = decode.read, evaluate.logits_of

    def reading(*arguments, **options):
        read[0] += 1
        return original(*arguments, **options)

    def scoring(classifier, pixels, preprocess):
        ahead.append(read[0] - sum(sizes[::3]))
        sizes.append(len(pixels))
        return network(classifier, pixels, preprocess)

    monkeypatch.setattr(decode, "read", reading)
    monkeypatch.setattr(evaluate, "logits_of", scoring)
    evaluate.evaluate(run, tta=TtaConfig(count=3))
    assert sizes == [BATCH] * 9 + [3] * 3
    assert max(ahead) <= 2 * BATCH + 1  # one in the network, one read ahead


def test_photos_that_can_not_be_evaluated_are_reported(run, tmp_path, lines):
    with pytest.raises(DataError, match="has no test photos"):
        evaluate.evaluate(run, part="test")
    samples = valid(run)
    samples[0].path.unlink()
    result = evaluate.evaluate(run, data_folder=tmp_path / "photos", log=lines.append)
    assert (result.photos, result.broken) == (len(samples) - 1, 1)
    assert lines[0].startswith("warning: the photos in ")
    assert lines[1] == f"skipped {samples[0].path}: No such file or directory"
    for sample in samples:
        sample.path.write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"none of the 27 valid photos .* can be read"):
        evaluate.evaluate(run, log=lines.append)
    for sample in samples:
        sample.path.unlink()
    with pytest.raises(DataError, match=r"none of the 27 valid photos is in .*--data"):
        evaluate.evaluate(run, log=lines.append)
    with pytest.raises(DataError, match=r"^--data .*nope: no such folder or archive$"):
        evaluate.evaluate(run, data_folder=tmp_path / "nope", log=lines.append)


def test_the_csv_has_a_row_for_every_photo(run, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    assert fledge.main(["evaluate", str(run), "--tta", "2", "--csv", str(out)]) == 0
    output = capsys.readouterr()
    result = evaluate.evaluate(run, tta=TtaConfig(count=2))
    assert output.out == (
        f"accuracy {result.accuracy:.6f}  loss {result.loss:.6f}  "
        f"photos {result.photos}  views 2  broken 0\n"
    )
    plain, loss = evaluate.score(result.plain, result.labels)
    assert output.err == f"plain view: accuracy {plain:.6f}  loss {loss:.6f}\n"
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        s.path.relative_to(result.root).as_posix() for s in valid(run)
    ]
    assert [row["label"] for row in rows] == [row["path"].split("/")[0] for row in rows]
    right = [row["label"] == row["predicted"] for row in rows]
    assert np.mean(right) == result.accuracy
    for row, values in zip(rows, result.probabilities, strict=True):
        assert float(row["probability"]) == pytest.approx(values.max(), abs=1e-6)


def test_a_csv_that_can_not_be_written_is_refused_before_evaluation(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "evaluate", None)
    for name, why in (
        (tmp_path / "none" / "a.csv", f"there is no folder {tmp_path / 'none'}; make it first"),
        (tmp_path, "a folder; name a file"),
    ):
        assert fledge.main(["evaluate", str(run), "--csv", str(name)]) == 2
        assert capsys.readouterr().err == f"fledge: --csv {name}: {why}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tta", "-1"], "--tta -1: input should be greater than or equal to 0"),
        (["--plain-weight", "2"], "--plain-weight 2.0: input should be less than or equal to 1"),
        (
            ["--tta", "11"],
            "--tta 11: there are 10 fixed views; use fewer, or --tta-kind draws",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(run, words, message, capsys):
    assert fledge.main(["evaluate", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fledge: {message}")
    assert error.count("\n") == 1


def test_draws_use_the_augmentation_of_the_checkpoints_stage(run):
    draws = TtaConfig(kind="draws", count=2)
    path = run / "recipe.toml"
    base = path.read_text()
    base_result = evaluate.evaluate(run, tta=draws).probabilities
    stage = '[[stage]]\nname = "{}"\nlr = 0.01\naugment = {{ max_lighting = 0.9 }}\n'
    path.write_text(base + stage.format("other"))
    assert (evaluate.evaluate(run, tta=draws).probabilities == base_result).all()
    path.write_text(base + stage.format("tail"))  # the checkpoint's stage
    staged = evaluate.evaluate(run, tta=draws).probabilities
    path.write_text(base.replace("[[stage]]", "augment = { max_lighting = 0.9 }\n[[stage]]"))
    assert not np.allclose(staged, base_result)
    assert (evaluate.evaluate(run, tta=draws).probabilities == staged).all()


def test_draws_are_made_from_photos_of_the_runs_presize(run, monkeypatch):
    draws, original, sides = TtaConfig(kind="draws", count=1), evaluate.draw, set()

    def draw(pixels, *arguments, **options):
        sides.add(pixels.shape[1:3])
        return original(pixels, *arguments, **options)

    monkeypatch.setattr(evaluate, "draw", draw)
    path = run / "recipe.toml"
    text = path.read_text()
    answers = []
    for presize, side in (("", 48), ("1.5", 48), ("3", 96)):
        own = f"data = {{ presize = {presize} }}\n[[stage]]"
        path.write_text(text.replace("[[stage]]", own) if presize else text)
        answers.append(evaluate.evaluate(run, tta=draws).probabilities)
        assert sides == {(side, side)}
        sides.clear()
    assert (answers[0] == answers[1]).all()
    assert not np.allclose(answers[0], answers[2], atol=1e-6)


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("fit", FITS)
def test_views_and_draws_are_made_of_what_fit_keeps(tmp_path, monkeypatch, fit, how):
    fields = {"fit": fit, "decode": how, "background": (0, 255, 0)}
    run = tmp_path / "run"
    finished(run, elongated(tmp_path / "photos"), valid=0.5, **fields)
    samples, info = valid(run), checkpoint.load(run)[1]
    assert info.preprocess == Preprocess(32, **fields)
    views = views_for(info.preprocess)
    result = evaluate.evaluate(run, tta=TtaConfig(kind="views", count=len(views)))
    rows = [expected(run, samples, view) for view in views]
    for photo, answer in enumerate(result.probabilities):
        assert answer == pytest.approx(average(np.stack([row[photo] for row in rows])), abs=1e-6)
    seen, original = [], evaluate.draw

    def draw(pixels, aspect, *arguments, **options):
        seen.append((pixels, aspect, options["crop"]))
        return original(pixels, aspect, *arguments, **options)

    monkeypatch.setattr(evaluate, "draw", draw)
    evaluate.evaluate(run, tta=TtaConfig(kind="draws", count=1))
    ((squares, aspects, crop),) = seen
    assert crop == (0.875 if fit == "crop" else 1)
    transform = PixelTransform("train", info.preprocess, 1.5)
    for sample, square, aspect in zip(samples, squares, aspects, strict=True):
        decoded = decode.read(sample.path, preprocess=transform.to_square)
        assert (square.numpy() == transform(decoded)).all()
        upright = decoded.size[0] / decoded.size[1]
        assert float(aspect) == pytest.approx(upright if fit == "crop" else 1)


def test_the_csv_quotes_any_name(run, tmp_path):
    result = evaluate.evaluate(run)
    strange = (result.root / "a\r,b\n.jpg", *result.paths[1:])
    named = dataclasses.replace(result, paths=strange, classes=("x\ry", "g", "r"))
    evaluate.write_csv(named, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["path"] == "a\r,b\n.jpg"
    assert [row["label"] for row in rows] == [named.classes[label] for label in result.labels]


def test_the_csv_can_be_made_safe_for_spreadsheets(run, tmp_path):
    result = evaluate.evaluate(run)
    strange = (result.root / "=1+1.jpg", *result.paths[1:])
    named = dataclasses.replace(result, paths=strange, classes=("@a", "-b", "c"))
    for safe in (True, False):
        evaluate.write_csv(named, tmp_path / "a.csv", safe=safe)
        with (tmp_path / "a.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["path"] == "'=1+1.jpg"[not safe :]
        quoted = [("'" * safe) + "@a", ("'" * safe) + "-b", "c"]
        assert [row["label"] for row in rows] == [quoted[label] for label in result.labels]
        assert all(0 <= float(row["probability"]) <= 1 for row in rows)
