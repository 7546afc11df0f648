import base64
import html
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageOps

import fledge
from serving.imaging.preprocess import DECODES, FITS, Preprocess
from tests.support.finished_run import finished
from tests.support.tiny_bundle import elongated
from tests.training.conftest import coloured
from training.config.sections import TtaConfig
from training.evaluation import evaluate, metrics
from training.report import charts, mistakes, report, training_curves
from training.run.dataset import load_run_dataset

HOSTILE = ("<script>alert(1)<", 'b"><img src=x onerror=alert(1)>', "זר & 'co'")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page's elements, attributes and text; its tags must nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def png(path):
    Image.new("RGB", (30, 20), "white").save(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    photos = coloured(folder / "photos", {"blue": 8, "green": 8, "red": 8})
    finished(folder / "run", photos)
    return folder / "run"


@pytest.fixture(scope="module")
def answers(run):
    """Random predictions, mostly right, with every kind of mistake."""
    result = evaluate.evaluate(run)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), result.photos)
    probabilities[np.arange(result.photos), result.labels] += rng.random(result.photos)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    accuracy, loss = evaluate.score(probabilities, result.labels)
    changes = {"probabilities": probabilities, "accuracy": accuracy, "loss": loss, "views": 4}
    return evaluate.EvaluationResult(**{**vars(result), **changes})


@pytest.fixture
def lines():
    return []


def written(run, lines, **options):
    path = report.write(run, log=lines.append, **options)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(run, answers, lines):
    for name in ("schedule.png", "lr_find-head.png", "lr_find-tail.png"):
        png(run / name)
    text = written(run, lines, result=answers, tta=TtaConfig())
    page = Page(text)
    assert "://" not in text
    assert not page.all("script")
    assert not page.all("link")
    pictures = page.all("img")
    assert all(attrs["alt"] for attrs in pictures)
    assert all(attrs["aria-label"] for attrs in page.all("svg"))
    for attrs in pictures:
        kind, _, data = attrs["src"].partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == f"data:image/{image.format.lower()}"
    wrong = int((answers.probabilities.argmax(axis=1) != answers.labels).sum())
    assert 0 < wrong < answers.photos
    assert len(pictures) == answers.photos + 3  # each photo once, and three PNG files of the run
    assert lines == []
    assert len(text) < 500_000


def test_the_figures_of_the_page_equal_the_metrics(run, answers, lines):
    text = " ".join(Page(written(run, lines, result=answers)).text)
    plain = metrics.accuracy(answers.plain, answers.labels)
    low, high = metrics.interval(round(answers.accuracy * answers.photos), answers.photos)
    found = metrics.calibration(answers.probabilities, answers.labels)
    for figure in (plain, answers.accuracy, low, high, found.ece):
        assert f"{figure:.1%}" in text
    assert f"{answers.loss:.3f}" in text
    assert "1 min" in text  # 74.5 seconds of epochs
    assert 'name = "tiny"' in text
    for version in ("python", "torch", "torchvision"):
        assert version in text


def test_the_recipe_stands_on_the_page_line_by_line(run, answers, lines):
    text = written(run, lines, result=answers)
    recipe = text.partition("<pre>")[2].partition("</pre>")[0]
    assert html.unescape(recipe) == (run / "recipe.toml").read_text().rstrip("\n")


def test_files_that_the_run_lacks_are_left_out(run, answers, lines, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("best.safetensors", "best.json", "split.csv"):
        (bare / name).write_bytes((run / name).read_bytes())
    text = written(bare, lines, result=answers)
    assert "How it was trained" not in text
    assert "recipe.toml is missing" in text
    (bare / "metrics.csv").write_text("stage,epoch\nhead\nhead,one,2,x\n")
    (bare / "steps.csv").write_bytes(b"\xff\xfe\x00")
    assert "How it was trained" not in written(bare, lines, result=answers)


def test_hostile_names_are_escaped(tmp_path, lines):
    photos = tmp_path / "photos"
    coloured(photos, dict.fromkeys([n.replace("/", "") for n in HOSTILE], 4))
    for folder in photos.iterdir():
        (folder / "0.jpg").rename(folder / "<b>\x07&\udcff.jpg")
    finished(tmp_path / "run", photos, name="tiny")
    text = written(tmp_path / "run", lines, tta=TtaConfig(count=2))
    page = Page(text)
    assert not page.all("script")
    assert all(set(attrs) <= {"src", "alt", "width", "height"} for attrs in page.all("img"))
    text = " ".join(page.text)
    for name in HOSTILE:
        assert name in text
    assert "<b>\ufffd&?.jpg" in text


def test_missing_and_broken_photos_are_skipped_and_logged(tmp_path, lines):
    photos = coloured(tmp_path / "photos", {"blue": 6, "red": 6})
    found = finished(tmp_path / "run", photos)
    missing, broken, later = (sample.path for sample in found.valid[:3])
    missing.unlink()
    broken.write_bytes(b"no photo")
    text = written(tmp_path / "run", lines)
    assert "missing or broken: 2 photos" in text
    assert [f"skipped {path}" in "\n".join(lines) for path in (missing, broken)] == [True, True]
    result = evaluate.evaluate(tmp_path / "run", log=lines.append)
    lines.clear()
    later.unlink()  # after the evaluation
    before = len(Page(text).all("img"))
    after = Page(written(tmp_path / "run", lines, result=result))
    assert len(after.all("img")) == before - 1
    assert f"skipped {later}" in lines[0]


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("fit", FITS)
def test_the_pictures_show_what_the_network_sees(tmp_path, lines, fit, how):
    fields = {"crop": 0.8, "fit": fit, "background": (0, 0, 255)}
    finished(tmp_path / "run", elongated(tmp_path / "photos"), decode=how, **fields)
    page = Page(written(tmp_path / "run", lines))
    found = load_run_dataset(tmp_path / "run").valid
    pictures = {attrs["alt"].partition(":")[0]: attrs["src"] for attrs in page.all("img")}
    assert len(pictures) > 1
    as_shown = Preprocess(mistakes.THUMBNAIL, interpolation="lanczos", **fields)
    for name, source in pictures.items():
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        differences = []
        for sample in found:
            if sample.path.name == name.rpartition("/")[2]:
                with Image.open(sample.path) as image:
                    expected = as_shown(ImageOps.exif_transpose(image))
                differences.append(np.abs(shown.astype(int) - expected).mean())
        assert min(differences) < 4


def test_the_checkpoint_of_a_stage_has_a_separate_page(run, lines, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    best = report.write(folder, log=lines.append).read_bytes()
    (folder / "stages").mkdir()
    for end in ("safetensors", "json"):
        shutil.copyfile(folder / f"best.{end}", folder / "stages" / f"head.{end}")
    path = report.write(folder / "stages" / "head.safetensors", log=lines.append)
    assert path == folder / "report-head.html"
    assert (folder / "report.html").read_bytes() == best
    text = path.read_text(encoding="utf-8")
    assert "<title>tiny, head: " in text
    assert "<h1><bdi>tiny, head</bdi></h1>" in text
    assert "Of the checkpoint head, not of the run's best." in text
    assert "best epoch" not in text.lower()
    assert b"best epoch" in best


def test_pages_without_mistakes_and_with_many_classes_are_written(run, answers, lines):
    right = np.eye(3)[answers.labels] * 0.7 + 0.1
    done = {**vars(answers), "probabilities": right, "plain": right, "accuracy": 1.0, "views": 1}
    text = written(run, lines, result=evaluate.EvaluationResult(**done))
    assert text.count("None: every photo is right.") == 2
    assert "with TTA" not in text
    many = 120
    rng = np.random.default_rng(0)
    labels = rng.integers(0, many, answers.photos)
    probabilities = rng.dirichlet(np.ones(many), answers.photos)
    done |= {
        "classes": tuple(f"class {i}" for i in range(many)),
        "labels": labels,
        "probabilities": probabilities,
        "plain": probabilities,
    }
    text = written(run, lines, result=evaluate.EvaluationResult(**done))
    assert f"the {mistakes.CLASSES} classes confused most" in text
    heads = re.findall(r'<th scope="row"><bdi>class \d+</bdi>', text)
    assert len(heads) == many


def test_the_worst_mistakes_contain_no_right_prediction(run, answers, monkeypatch, lines):
    # A right prediction may have a larger loss than a wrong one.
    monkeypatch.setattr(mistakes, "PHOTOS", 2)
    probabilities = np.full((answers.photos, 3), [0.34, 0.33, 0.33])
    for i, label in enumerate(answers.labels):
        probabilities[i] = np.roll(probabilities[i], label)
    probabilities[0] = np.roll([0.48, 0.52, 0], answers.labels[0])  # wrong, with a smaller loss
    done = {**vars(answers), "probabilities": probabilities}
    page = Page(written(run, lines, result=evaluate.EvaluationResult(**done)))
    assert len([attrs for attrs in page.all("figure") if attrs.get("class") == "wrong"]) == 1


def test_the_report_command_writes_the_page(run, capsys):
    assert fledge.main(["report", str(run), "--tta", "3", "--average", "log_mean"]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert "TTA over 3 views" in (run / "report.html").read_text()
    assert fledge.main(["report", str(run)]) == 0  # the recipe's own: flip
    assert "TTA over 2 views" in (run / "report.html").read_text()


def test_batch_losses_are_placed_in_their_epochs(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "stage,epoch,lr,train_loss,valid_loss,accuracy,seconds\n"
        "a,1,0.1,3,1,0.5,1\na,2,0.1,2,1,0.5,1\nb,1,0.1,1,1,0.5,1\n"
    )
    rows = [("a", 1, 4.0), ("a", 1, 2.0), ("a", 2, 2.0), ("b", 1, 1.0), ("b", 2, 9.0)]
    (tmp_path / "steps.csv").write_text(
        "stage,epoch,step,loss,momentum,lr\n"
        + "".join(f"{stage},{epoch},1,{loss},0.9,0.1 0.2\n" for stage, epoch, loss in rows)
    )
    found = training_curves._batches(tmp_path, training_curves._epochs(tmp_path, print), print)
    assert found == [(0.5, 4.0), (1.0, 2.0), (2.0, 2.0), (3.0, 1.0)]
    assert training_curves.seconds(tmp_path, print) == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.93, 0.98, [0.93, 0.94, 0.95, 0.96, 0.97, 0.98]),
     (0, 12, [0, 2, 4, 6, 8, 10, 12]), (3, 3, [3])],
)  # fmt: skip
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert charts.ticks(low, high, 5) == pytest.approx(expected)


def test_a_flat_curve_and_one_point_can_be_drawn():
    for points in ([(1.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 1.0), (2.0, float("nan"))]):
        drawn = charts.lines([charts.Series(points, "loss", "first")], "a title")
        assert "nan" not in drawn
        Page(drawn)


def test_losses_that_are_not_finite_do_not_break_the_page(run, answers, lines, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for row in ("head,1,0.1,nan,inf,nan,1e400", "head,1,0.1,1e308,-1e308,5,1e308"):
        (folder / "metrics.csv").write_text(
            "stage,epoch,lr,train_loss,valid_loss,accuracy,seconds\n" + f"{row}\n" * 2
        )
        page = Page(written(folder, lines, result=answers))
        assert "How it was trained" in " ".join(page.text)
        assert training_curves.seconds(folder, print) == 0
    Page(charts.lines([], "nothing"))


@pytest.mark.parametrize(
    ("accuracy", "lean"),
    [
        (0.5, "neither over- nor under-confident."),
        (0.5004, "neither over-"),
        (0.4, "over-confident by 10.0"),
        (0.6, "under-confident by 10.0"),
    ],
)
def test_over_and_under_confidence_are_described_in_words(answers, accuracy, lean):
    even = np.full((answers.photos, 2), 0.5)
    done = {**vars(answers), "probabilities": even, "labels": answers.labels % 2}
    found = report._calibration(evaluate.EvaluationResult(**{**done, "accuracy": accuracy}))
    assert lean in found["lean"] + "."
