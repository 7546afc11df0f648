"""Evaluation of a table of scores: scikit-learn's figures, valid bounds, no row dropped."""

from __future__ import annotations

import csv
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

import fledge
from serving.errors import DataError, FledgeError, OptionError, WorkError
from serving.evaluation import evaluate_scores, streaming_metrics, table_reader
from serving.evaluation.evaluate_scores import EvaluationOptions, evaluate
from serving.inference.load import open_predictor
from serving.scoring.rows import COLUMNS
from tests.support.tiny_bundle import NAMES, photo, tiny_bundle
from training.evaluation import metrics

CLASSES = 8
LABELS = NAMES[:CLASSES]
Rows = list[dict[str, Any]]


def answered(path: str, every: np.ndarray, k: int = 5, **more: Any) -> dict[str, Any]:
    """The row of an answer."""
    top = [[LABELS[i], float(every[i])] for i in np.argsort(-every, kind="stable")[:k]]
    row = dict.fromkeys(COLUMNS, "") | {"path": path, "status": "ok", "confident": None}
    row |= {"label": top[0][0], "probability": top[0][1], "top_k": top, "views": 1}
    return row | more


def failed(path: str, code: str = "broken-image") -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    return row | {"path": path, "status": "error", "top_k": [], "error": f"{code}: why: so"}


def random_predictions(rows: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [rows, CLASSES] and true labels [rows], about 70 % of them predicted."""
    rng = np.random.default_rng(seed)
    every = rng.dirichlet(np.full(CLASSES, 0.4), rows)
    truth = np.where(rng.random(rows) < 0.7, every.argmax(1), rng.integers(CLASSES, size=rows))
    return every, truth


def write(path: Path, rows: Rows) -> Path:
    """A table of the rows, with the columns of the first."""
    columns = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pairs = [
            {"label": label, "probability": value} for row in rows for label, value in row["top_k"]
        ]
        ends = np.cumsum([0, *(len(row["top_k"]) for row in rows)])
        nested = [pairs[a:b] for a, b in pairwise(ends)]
        kept = {name: [row[name] for row in rows] for name in columns} | {"top_k": nested}
        pq.write_table(pa.table(kept), path, row_group_size=50)
    else:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            out = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
            out.writerow(columns)
            for row in rows:
                out.writerow(cell(row[name]) for name in columns)
    return path


def cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list) else value


def write_labels(path: Path, pairs: dict[str, str], head: str = "path,label") -> Path:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.write(head + "\n")
        csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(pairs.items())
    return path


def run_evaluation(path: Path, **options: Any) -> dict[str, Any]:
    if "labels" not in options:
        options["labels_from_folders"] = True
    return evaluate(path, EvaluationOptions(**options), log=lambda line: None)


def table(
    path: Path,
    every: np.ndarray,
    truth: np.ndarray,
    *,
    k: int,
    probabilities: bool,
    summary: bool = False,
) -> Path:
    """A table of images in the folders of their true labels."""
    rows = []
    for number, (row, label) in enumerate(zip(every, truth, strict=True)):
        more = {"probabilities": row.tolist()} if probabilities else {}
        rows.append(answered(f"photos/{LABELS[label]}/{number}.jpg", row, k, **more))
    if summary:
        write_summary(path)
    return write(path, rows)


def write_summary(path: Path) -> None:
    """Write the part of a table's summary that `evaluate-scores` reads."""
    summary = path.with_name(f"{path.stem}.summary.json")
    summary.write_text(json.dumps({"model": "m:1", "classes": LABELS}))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("k", "probabilities"), [(CLASSES, False), (1, True), (3, True), (6, True)]
)
def test_metrics_of_a_table_equal_those_of_scikit_learn(
    tmp_path: Path, suffix: str, k: int, probabilities: bool
) -> None:
    every, truth = random_predictions()
    out = tmp_path / "matrix.csv"
    path = table(
        tmp_path / f"s{suffix}", every, truth, k=k, probabilities=probabilities, summary=True
    )
    found = run_evaluation(path, confusion=out)
    predicted, names = every.argmax(1), range(CLASSES)
    assert found["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert found["log_loss"] == {
        "value": pytest.approx(sk.log_loss(truth, every, labels=names)),
        "at_least": False,
        "rows": 400,
        "bounded_rows": 0,
    }
    top = sk.top_k_accuracy_score(truth, every, k=5, labels=names)
    assert found["top_5"] == pytest.approx(top)
    matrix = sk.confusion_matrix(truth, predicted, labels=names)
    pairs = {(LABELS.index(c["label"]), LABELS.index(c["said"])): c for c in found["confusion"]}
    assert sum(pair["rows"] for pair in pairs.values()) == 400
    assert all(pair["rows"] == matrix[place] for place, pair in pairs.items())
    recall = sk.recall_score(truth, predicted, average=None, labels=names)
    for item in found["classes"]:
        assert item["accuracy"] == pytest.approx(recall[LABELS.index(item["label"])])
    assert [c["accuracy"] for c in found["classes"]] == sorted(recall)
    with out.open() as file:
        (_, *head), *lines = csv.reader(file)
    places = [LABELS.index(name) for name in head]
    assert [line[0] for line in lines] == head
    assert np.array_equal([line[1:] for line in lines], matrix[places][:, places].astype(str))


def test_interval_and_calibration_equal_those_of_training(tmp_path: Path) -> None:
    every, truth = random_predictions()
    found = run_evaluation(table(tmp_path / "s.csv", every, truth, k=1, probabilities=False))
    right = int((every.argmax(1) == truth).sum())
    wilson = binomtest(right, 400).proportion_ci(method="wilson")
    assert found["accuracy"]["interval"] == pytest.approx(tuple(wilson), abs=1e-6)
    other = metrics.calibration(every, truth, bins=15)
    assert found["calibration"]["error"] == pytest.approx(other.ece)
    assert [b["rows"] for b in found["calibration"]["bins"]] == other.photos.tolist()
    for name, expected in (("accuracy", other.accuracy), ("probability", other.confidence)):
        values = [np.nan if b[name] is None else b[name] for b in found["calibration"]["bins"]]
        assert values == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_without_all_probabilities_the_loss_is_a_lower_bound(tmp_path: Path, k: int) -> None:
    every, truth = random_predictions(seed=k)
    path = table(tmp_path / "s.csv", every, truth, k=k, probabilities=False, summary=True)
    found = run_evaluation(path)
    first = np.sort(every, 1)[:, ::-1][:, :k]
    own = every[range(400), truth]
    bounded = own < first[:, -1]
    bound = np.where(bounded, np.minimum(first[:, -1], 1 - first.sum(1)), own)
    assert found["log_loss"]["at_least"]
    assert found["log_loss"]["bounded_rows"] == bounded.sum()
    assert found["log_loss"]["value"] == pytest.approx(-np.log(bound).mean())
    assert found["log_loss"]["value"] < sk.log_loss(truth, every, labels=range(CLASSES))
    known = sk.top_k_accuracy_score(truth, every, k=5, labels=range(CLASSES)) if k >= 5 else None
    assert found["top_5"] == pytest.approx(known)


def test_without_class_names_a_loss_that_is_only_bounded_is_left_out(tmp_path: Path) -> None:
    """A true label outside `top_k` may be a class of low probability, or no class at all."""
    every, truth = random_predictions()
    found = run_evaluation(table(tmp_path / "s.csv", every, truth, k=5, probabilities=False))
    assert found["log_loss"] is None
    assert found["top_5"] is not None


def test_without_class_names_top_5_of_five_labels_is_left_out(tmp_path: Path) -> None:
    rows = [answered(f"{LABELS[i % 5]}/{i}.jpg", np.eye(5)[i % 5] * 0.5 + 0.1, 5) for i in range(9)]
    assert run_evaluation(write(tmp_path / "s.csv", rows))["top_5"] is None


def test_without_class_names_the_loss_is_left_out_and_a_bundle_gives_it(
    tmp_path: Path,
) -> None:
    every, truth = random_predictions()
    every[:, 3], every[:, 5] = every[:, [3, 5]].min(1) / 100, every[:, [3, 5]].min(1) / 90
    every /= every.sum(1, keepdims=True)
    path = table(tmp_path / "s.csv", every, truth, k=1, probabilities=True)
    exact = sk.log_loss(truth, every, labels=range(CLASSES))
    predicted = every.argmax(1)
    lines: list[str] = []
    options = EvaluationOptions(labels_from_folders=True)
    found = evaluate(path, options, log=lines.append)
    hidden = {LABELS[i]: int((truth == i).sum()) for i in (3, 5)}
    assert found["unknown_labels"] == hidden
    assert found["unknown_to"] == "answers"
    assert found["log_loss"] is None
    assert found["top_5"] is None
    assert found["accuracy"]["value"] == (predicted == truth).mean()
    hint = [line for line in lines if "class order unknown" in line]
    assert len(hint) == 1
    assert f"{tmp_path / 's.summary.json'} is missing, or has no class names" in hint[0]
    assert hint[0].endswith("add --bundle BUNDLE")
    bundle = tiny_bundle(tmp_path / "bundle", classes=CLASSES)
    for more in ({"bundle": bundle}, {}):  # then by the summary
        lines.clear()
        options = EvaluationOptions(labels_from_folders=True, **more)
        found = evaluate(path, options, log=lines.append)
        assert found["unknown_labels"] == {}
        assert found["unknown_to"] == "model"
        assert found["log_loss"]["value"] == pytest.approx(exact)
        assert not found["log_loss"]["at_least"]
        top = sk.top_k_accuracy_score(truth, every, k=5, labels=range(CLASSES))
        assert found["top_5"] == pytest.approx(top)
        assert not any("class order" in line for line in lines)
        write_summary(path)


def test_an_older_summary_has_no_class_order(tmp_path: Path) -> None:
    every, truth = random_predictions(50)
    path = table(tmp_path / "s.csv", every, truth, k=5, probabilities=True, summary=True)
    exact = run_evaluation(path)
    (tmp_path / "s.summary.json").write_text('{"model": "m:1", "labels": {"rose": 50}}')
    found = run_evaluation(path)
    assert found["log_loss"] is None
    # The classes of the five most probable labels are in `top_k`, whatever their order.
    same = ("accuracy", "calibration", "classes", "confusion", "confident", "top_5")
    assert {name: found[name] for name in same} == {name: exact[name] for name in same}
    assert exact["top_5"] is not None


def test_the_bundle_takes_precedence_over_the_summary(tmp_path: Path) -> None:
    every, truth = random_predictions(50)
    path = table(tmp_path / "s.csv", every, truth, k=5, probabilities=True, summary=True)
    (tmp_path / "s.summary.json").write_text('{"classes": ["a", "b"]}')
    # A summary of another table, such as s.parquet of another model, is not used.
    assert run_evaluation(path)["log_loss"] is None
    bundle = tiny_bundle(tmp_path / "bundle", classes=CLASSES)
    exact = sk.log_loss(truth, every, labels=range(CLASSES))
    assert run_evaluation(path, bundle=bundle)["log_loss"]["value"] == pytest.approx(exact)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_top_5_needs_five_labels_or_all_probabilities(tmp_path: Path, k: int) -> None:
    every, truth = random_predictions()
    path = table(tmp_path / "s.csv", every, truth, k=k, probabilities=False, summary=True)
    bundle = tiny_bundle(tmp_path / "bundle", classes=CLASSES)
    top = sk.top_k_accuracy_score(truth, every, k=5, labels=range(CLASSES))
    for more in ({}, {"bundle": bundle}):
        assert run_evaluation(path, **more)["top_5"] == (pytest.approx(top) if k == 5 else None)


def test_rows_of_two_models_are_refused(tmp_path: Path) -> None:
    every, truth = random_predictions(40)
    rows = [answered(f"rose/{i}", row, probabilities=row.tolist()) for i, row in enumerate(every)]
    rows[30]["probabilities"] = rows[30]["probabilities"][::-1]
    write_summary(tmp_path / "s.csv")
    with pytest.raises(DataError, match=r"s\.csv, line 32: probabilities has another than"):
        run_evaluation(write(tmp_path / "s.csv", rows))
    rows[30]["probabilities"] = rows[30]["probabilities"][1:]
    with pytest.raises(DataError, match="line 32: 7 probabilities of 8 classes"):
        run_evaluation(write(tmp_path / "s.csv", rows))
    bundle = tiny_bundle(tmp_path / "bundle", classes=3)
    with pytest.raises(DataError, match=r"line .: .*; evaluate the rows of each model separately"):
        run_evaluation(
            table(tmp_path / "t.csv", every, truth, k=1, probabilities=False), bundle=bundle
        )


def confident_row(label: str, path: str, **more: Any) -> dict[str, Any]:
    """An answer with probability 0.9, the other classes equal."""
    every = np.where(np.array(LABELS) == label, 0.9, 0.1 / (CLASSES - 1))
    return answered(path, every, **more)


def test_rows_that_are_left_out_are_counted_and_printed(tmp_path: Path) -> None:
    rows = [confident_row("rose", f"in/rose/{i}.jpg", confident=i < 2) for i in range(3)]
    rows += [
        confident_row("rose", "in/daisy/3.jpg", confident=True),
        confident_row("lily", "in/wolf/4.jpg"),
    ]
    rows += [
        failed("in/rose/5.jpg"),
        failed("in/lily/6.jpg", "no-image"),
        confident_row("rose", "7.jpg"),
    ]
    rows += [failed("8.jpg")]
    lines: list[str] = []
    path = write(tmp_path / "s.csv", rows)
    found = evaluate(path, EvaluationOptions(labels_from_folders=True), log=lines.append)
    assert (found["rows"], found["answers"], found["evaluated"]) == (9, 6, 5)
    assert found["errors"] == {"broken-image": 2, "no-image": 1}
    assert found["without_label"] == 1
    assert found["unknown_labels"] == {"wolf": 1}
    assert (found["accuracy"]["right"], found["accuracy"]["rows"]) == (3, 5)
    assert found["accuracy_errors_as_wrong"]["value"] == pytest.approx(3 / 7)
    assert found["confident"] == {
        "coverage": pytest.approx(3 / 4),
        "precision": pytest.approx(2 / 3),
        "rows": 3,
        "of": 4,
    }
    text = "\n".join(lines)
    for words in (
        "60.0%, 3 of 5 right; 95% interval 23.1% to 88.2%",
        "42.9%, 3 of 7 right",
        "counting errors as wrong",
        "1 row with an answer and no true label",
        "counted as wrong: wolf 1",
        "broken-image 2, no-image 1",
        "daisy -> rose",
        "3 of 4 answers, 75.0%, 66.7% of these right",
        "3 of 3",
    ):
        assert words in text


def test_a_label_that_is_no_class_is_left_out_of_the_loss(tmp_path: Path) -> None:
    every, truth = random_predictions(50)
    rows = [
        answered(f"{LABELS[t]}/{i}.jpg", row, CLASSES)
        for i, (row, t) in enumerate(zip(every, truth, strict=True))
    ]
    write_summary(tmp_path / "s.csv")
    path = write(tmp_path / "s.csv", [*rows, answered("wolf/x.jpg", every[0], CLASSES)])
    found = run_evaluation(path)
    assert (found["unknown_to"], found["unknown_labels"]) == ("model", {"wolf": 1})
    assert found["accuracy"]["rows"] == 51
    assert found["log_loss"]["rows"] == 50
    assert found["log_loss"]["value"] == pytest.approx(
        sk.log_loss(truth, every, labels=range(CLASSES))
    )


AWKWARD = ("comma, x.jpg", 'quo"te.jpg', "li\nne.jpg", "花.jpg", os.fsdecode(b"\xfc.jpg"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_are_matched_by_path_else_by_a_unique_file_name(tmp_path: Path, suffix: str) -> None:
    truth = {
        **{f"in/{name}": "rose" for name in AWKWARD},
        "elsewhere/once.jpg": "iris",
        "a/twice.jpg": "rose",
        "b/twice.jpg": "lily",
        "c/own.jpg": "lily",
        "d/both.jpg": "tulip",
        "e/blank.jpg": "",
        "f/blank.jpg": "iris",
    }
    rows = [confident_row("rose", f"in/{name}") for name in AWKWARD]
    rows += [confident_row("iris", "in/x.tar::y/once.jpg"), confident_row("iris", "in/twice.jpg")]
    rows += [confident_row("iris", "z/own.jpg"), confident_row("lily", "c/own.jpg")]
    rows += [
        confident_row("iris", "1/both.jpg"),
        confident_row("iris", "2/both.jpg"),
        confident_row("iris", "e/blank.jpg"),
    ]
    rows += [confident_row("iris", "in/nowhere.jpg")]
    path = write(tmp_path / f"s{suffix}", rows)
    found = run_evaluation(path, labels=write_labels(tmp_path / "l.csv", truth))
    assert found["accuracy"]["right"] == found["evaluated"] == len(AWKWARD) + 2
    assert found["by_file_name"] == 1
    assert found["ambiguous_file_name"] == 4
    assert found["without_label"] == 6


def test_a_path_that_is_not_utf_8_is_matched_as_escaped_in_parquet(tmp_path: Path) -> None:
    given = write_labels(tmp_path / "l.csv", {os.fsdecode(b"in/\xfc.jpg"): "rose"})
    path = write(tmp_path / "s.csv", [confident_row("rose", "in/\\xfc.jpg")])
    assert run_evaluation(path, labels=given)["by_file_name"] == 0


def test_too_many_labels_for_a_matrix_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_scores, "_WIDEST_MATRIX", 2)
    path = write(
        tmp_path / "s.csv", [confident_row("rose", f"{name}/x.jpg") for name in (0, 1, "rose")]
    )
    with pytest.raises(OptionError, match=r"--confusion .*: 3 labels are too many"):
        run_evaluation(path, confusion=tmp_path / "m.csv", json=tmp_path / "f.json")
    assert [file.name for file in tmp_path.iterdir()] == ["s.csv"]


def test_columns_of_the_labels_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", [confident_row("rose", "x.jpg")])
    given = write_labels(tmp_path / "l.csv", {"x.jpg": " rose "}, "\ufeffid,breed")
    options = {"labels_column": "breed", "path_column": "id"}
    assert run_evaluation(path, labels=given, **options)["accuracy"]["value"] == 1
    assert run_evaluation(path, labels=given)["accuracy"]["value"] == 1
    for option, example in (("labels_column", "breed"), ("path_column", "id")):
        words = rf"no column 'x' among 'id', 'breed'; .* --{option.replace('_', '-')} {example}$"
        with pytest.raises(DataError, match=words):
            run_evaluation(path, labels=given, **{option: "x"})


@pytest.mark.parametrize(
    ("path", "truth"),
    [
        ("photos/valid/rose/1.jpg", "rose"),
        ("rose/1.jpg", "rose"),
        ("1.jpg", None),
        ("/1.jpg", None),
        ("in/photos.tar::rose/1.jpg", "rose"),
        ("in/lily/photos.tar::rose/a::b.jpg", "rose"),
        ("in/lily/photos.tar.gz::1.jpg", None),
        ("in/lily/photos.TGZ::2::rose/1.jpg", "rose"),
        ("in/lily/photos.tar::./1.jpg", None),
        ("./1.jpg", None),
        ("in/rose/a::b.jpg", "rose"),
    ],
)
def test_the_label_is_the_folder_of_the_image(tmp_path: Path, path: str, truth: str | None) -> None:
    out = write(
        tmp_path / "s.csv", [confident_row("rose", path), confident_row("iris", "iris/x.jpg")]
    )
    found = run_evaluation(out)
    assert found["accuracy"]["right"] == found["evaluated"] == 1 + (truth is not None)


def test_the_most_probable_mistakes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_metrics, "MISTAKES", 10)
    every, truth = random_predictions()
    every[truth == 0] = every[0]  # equal probabilities: the first rows are kept
    out = tmp_path / "wrong.csv"
    run_evaluation(table(tmp_path / "s.csv", every, truth, k=5, probabilities=False), mistakes=out)
    with out.open() as file:
        found = list(csv.DictReader(file))
    wrong = np.flatnonzero(every.argmax(1) != truth)
    order = wrong[np.argsort(-every[wrong].max(1), kind="stable")][:10]
    assert [row["path"] for row in found] == [f"photos/{LABELS[truth[i]]}/{i}.jpg" for i in order]
    assert [row["truth"] for row in found] == [LABELS[truth[i]] for i in order]
    assert [row["label"] for row in found] == [LABELS[every[i].argmax()] for i in order]
    assert [float(row["probability"]) for row in found] == every[order].max(1).tolist()


def test_a_table_is_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [confident_row("rose", "rose/x.jpg")] * 1000)
    with path.open("a") as file:
        file.write('{"path": "torn')
    rows = table_reader.read(path)
    assert next(rows).label == "rose"
    with pytest.raises(DataError, match=r"s\.jsonl, line 1001: no JSON"):
        list(rows)


GOOD = "path,status,label,probability\nrose/x.jpg,ok,rose,0.5\n"


@pytest.mark.parametrize(
    ("name", "text", "kind", "words"),
    [
        ("s.csv", "", DataError, "no row in it; score some images"),
        ("s.csv", "path,status,label,probability\n", DataError, "no row in it"),
        ("s.jsonl", "\n", DataError, "no row in it"),
        ("s.csv", "path,label\nx,rose\n", DataError, "line 2: no column 'status' among 'path', 'l"),
        ("s.jsonl", '{"path": "x"}\n', DataError, "line 1: no column 'status' among 'path'"),
        ("s.jsonl", "[1]\n", DataError, "line 1: no JSON object"),
        ("s.csv", GOOD + "rose/y.jpg,ok,ro", DataError, "line 3: 3 fields, .* is the file whole"),
        ("s.csv", GOOD + 'rose/y.jpg,ok,"ro', DataError, "line 3: .*; is the file whole"),
        ("s.csv", GOOD + "rose/y.jpg,fine,rose,0.1\n", DataError, "line 3: status is 'fine'"),
        ("s.csv", GOOD + "rose/y.jpg,ok,,0.1\n", DataError, "line 3: ok, but no label"),
        ("s.csv", GOOD + "rose/y.jpg,ok,rose,1.1\n", DataError, "line 3: '1.1' is no probability"),
        ("s.csv", GOOD + "rose/y.jpg,ok,rose,nan\n", DataError, "line 3: 'nan' is no probability"),
        (
            "s.csv",
            GOOD.replace("rose/x", "x"),
            DataError,
            "'x.jpg' lies in no folder; use --labels",
        ),
        ("s.csv", GOOD.replace("ok,rose,0.5", "error,,"), WorkError, "not one of 1 rows has an an"),
        ("s.xls", GOOD, OptionError, r"s\.xls: no table of scores; use one in \.csv, \.jsonl"),
        ("s.parquet", GOOD, FledgeError, "no Parquet file that can be read|needs pyarrow: pip"),
    ],
)
def test_an_invalid_table_is_a_one_line_error_with_the_file_and_line(
    tmp_path: Path, name: str, text: str, kind: type[Exception], words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=words) as caught:
        run_evaluation(tmp_path / name, json=tmp_path / "out.json")
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("column", ["top_k", "probabilities"])
@pytest.mark.parametrize("value", ["[0.5", "7", '[["rose"]]', '[["rose", 2]]', "[2, 3]", "[]x"])
def test_the_error_for_an_invalid_list_in_a_row_names_the_line(
    tmp_path: Path, column: str, value: str
) -> None:
    row = confident_row("rose", "rose/x.jpg", probabilities="") | {column: value}
    with pytest.raises(DataError, match=r"s\.csv, line 2: "):
        run_evaluation(write(tmp_path / "s.csv", [row]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\na.jpg,x\nb.jpg,x\na.jpg,y\n", "'a.jpg' is 'x' in line 2 and 'y' in line 4"),
        ("path,label\n", "no labels in it; write lines of path,label"),
        ("path,label\na.jpg\n", "line 2: 1 field, and the first line has 2"),
        ("path,label\na.jpg,x\n", "l.csv has 'a.jpg', the table 'rose/x.jpg': no path is in both"),
        (None, "can't be read: No such file or directory; give a table with the columns path"),
    ],
)
def test_invalid_labels_are_a_one_line_error(tmp_path: Path, text: str | None, words: str) -> None:
    path = write(tmp_path / "s.csv", [confident_row("rose", "rose/x.jpg")])
    if text is not None:
        (tmp_path / "l.csv").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        run_evaluation(path, labels=tmp_path / "l.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either --labels FILE, .* or --labels-from-folders"),
        ({"labels_from_folders": True, "labels": "l.csv"}, "either --labels FILE"),
        (
            {"labels_from_folders": True, "labels_column": "x"},
            "--labels-column x: goes with --labels",
        ),
        ({"labels_from_folders": True, "json": "none/x"}, "--json .*none/x: there is no folder"),
        ({"labels_from_folders": True, "mistakes": "s.csv"}, "--mistakes .*: that is the table"),
        (
            {"labels_from_folders": True, "mistakes": "x", "confusion": "x"},
            "that is --confusion; name",
        ),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "s.csv", [confident_row("rose", "rose/x.jpg")])
    before = path.read_bytes()
    files = {
        k: tmp_path / v
        for k, v in options.items()
        if k not in ("labels_from_folders", "labels_column")
    }
    with pytest.raises(OptionError, match=words):
        evaluate(path, EvaluationOptions(**(options | files)))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("suffix", "more"),
    [
        (".csv", ()),
        (".csv", ("--probabilities",)),
        (".jsonl", ("--probabilities", "--top-k", "1")),
        (".parquet", ("--probabilities",)),
    ],
)
def test_metrics_of_a_scored_folder_equal_those_of_the_predictor(
    tmp_path: Path, suffix: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    bundle = tiny_bundle(tmp_path / "bundle", classes=7)
    for seed in range(40):
        path = tmp_path / "photos" / NAMES[seed % 7] / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(seed) if seed % 10 else b"hello")
    out = tmp_path / f"s{suffix}"
    words = [str(tmp_path / "photos"), "--bundle", str(bundle), "--device", "cpu"]
    assert fledge.main(["score", *words, "--out", str(out), *more]) == 0
    capsys.readouterr()
    predictor = open_predictor(bundle, device="cpu")
    seeds = [seed for seed in range(40) if seed % 10]
    prepared = [predictor.prepare(photo(seed)) for seed in seeds]
    every = np.stack([predictor.predict([one])[0].probabilities for one in prepared])
    truth, names = np.array(seeds) % 7, range(7)
    words = [str(out), "--labels-from-folders", "--json", str(tmp_path / "f.json")]
    assert fledge.main(["evaluate-scores", *words]) == 0
    stdout = capsys.readouterr().out
    found = json.loads((tmp_path / "f.json").read_text())
    accuracy = sk.accuracy_score(truth, every.argmax(1))
    assert f"{accuracy:.1%}, {round(accuracy * 36)} of 36 right" in stdout
    assert found["accuracy"]["value"] == pytest.approx(accuracy)
    assert found["errors"] == {"not-an-image": 4}
    assert found["accuracy_errors_as_wrong"]["rows"] == 40
    assert found["top_5"] == pytest.approx(sk.top_k_accuracy_score(truth, every, k=5, labels=names))
    loss = sk.log_loss(truth, every, labels=names)
    assert found["log_loss"]["at_least"] == (not more)
    assert found["log_loss"]["value"] <= loss * (1 + 1e-9)
    assert not more or found["log_loss"]["value"] == pytest.approx(loss)
    assert found["confident"] is None


def test_help_has_an_example_and_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fledge.main(["evaluate-scores", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "example: fledge evaluate-scores scores.csv --labels-from-folders" in text
    assert fledge.main(["evaluate-scores", "/nowhere.csv", "--labels-from-folders"]) == 2
    stderr = capsys.readouterr().err
    assert stderr == "fledge: /nowhere.csv: not there; make one with `fledge score`\n"
