import csv
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

import fledge
from serving.errors import DataError, OptionError, WorkError
from serving.imaging.preprocess import Preprocess
from tests.training.conftest import BLOCKS, coloured, small_network
from training.ablation import ablation, table, tricks
from training.config import load
from training.config.schema import Recipe
from training.config.sections import HeadConfig
from training.engine import finetune
from training.models.classifier import create_classifier
from training.optim.optimizer import build_optimizer
from training.run.checkpoint import CheckpointInfo, read_info

BASE = load.read(Path("training/recipes/tricks.toml"))
FIRST = tricks.choose(["first"])
OTHERS = [load.read(path) for path in sorted(Path("training/recipes").glob("*.toml"))]


def options(recipe, section="", values=None):
    """Pairs of dotted option and value; stages are numbered."""
    values = tricks.values_of(recipe) if values is None else values
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict) or key == "stage":
            yield from options(recipe, f"{section}{key}.", value)
        else:
            yield f"{section}{key}", value


def changed(name, base=BASE):
    """The options that a row changes in the recipe of the row it is based on, without [tta]."""
    row = tricks.BY_NAME[name]
    before = dict(options(tricks.recipe_of(tricks.BY_NAME[row.on], base) if row.on else base))
    after = dict(options(tricks.recipe_of(row, base)))
    return {
        key: after.get(key)
        for key in after.keys() | before.keys()
        if after.get(key) != before.get(key) and not key.startswith("tta.")
    }


def test_the_recipe_tricks_is_the_row_bn_fixed():
    row = tricks.recipe_of(tricks.BY_NAME["bn_fixed"], BASE)
    assert row.model_copy(update={"tta": BASE.tta}) == BASE


def test_each_of_the_first_rows_changes_one_technique():
    assert [row.name for row in FIRST] == [
        "features", "bn_eval", "bn_alone", "bn_moves", "bn_fixed", "concat_pool", "deep_head",
    ]  # fmt: skip
    assert [row.on for row in FIRST] == [
        "", "features", "features", "bn_alone", "bn_moves", "bn_fixed", "concat_pool",
    ]  # fmt: skip
    features = tricks.recipe_of(FIRST[0], BASE)
    (stage,) = features.stage
    assert (stage.unfreeze, stage.frozen_batchnorm, features.head.kind) == (0, "stats", "linear")
    assert changed("bn_eval") == {"stage.0.frozen_batchnorm": "eval"}
    assert changed("bn_alone") == {"stage.0.frozen_batchnorm": "train"}
    assert changed("bn_moves") == {
        "stage.0.unfreeze": 99, "stage.0.groups": 2, "stage.0.lr_divide": 100.0,
        "stage.0.batchnorm": "train", "stage.0.frozen_batchnorm": "eval",
    }  # fmt: skip
    assert changed("bn_fixed") == {"stage.0.batchnorm": "fixed"}
    assert changed("concat_pool") == {"head.kind": "concat_pool", "head.hidden": []}
    assert changed("deep_head") == {"head.hidden": [512], "head.dropout": 0.5}


def test_each_onoff_row_changes_only_the_options_of_its_technique():
    assert {key.partition(".")[0] for key in changed("augmentation")} == {"augment"}
    assert changed("sgdr") == {"stage.0.schedule": "sgdr", "stage.0.cycles": 2,
                               "stage.0.cycle_len": 1}  # fmt: skip
    assert changed("decay") == {"optimizer.weight_decay": 0.01, "optimizer.decay": "decoupled"}
    assert changed("tta") == {}
    small, full = tricks.recipe_of(tricks.BY_NAME["resizing"], BASE).stage
    assert (small.image_size, full.image_size, small.epochs, full.epochs) == (128, 0, 1, 1)


@pytest.mark.parametrize("row", [row for row in tricks.ROWS if row.on == "none"],
                         ids=lambda row: row.name)  # fmt: skip
def test_each_augment_row_changes_only_the_options_of_its_augmentation(row):
    none = tricks.recipe_of(tricks.BY_NAME["none"], BASE)
    assert none.augment.preset == "none"
    assert none.augment_of(none.stage[0]) == none.augment
    options = set(changed(row.name))
    assert options
    kinds = {re.sub(r"augment\.(max_)?|_ops|_magnitude", "", option) for option in options}
    if row.name == "crop":
        assert kinds == {"crop", "scale", "ratio"}
    else:
        named = {"rand_augment": "policy", "trivial_augment": "policy",
                 "smoothing": "label_smoothing"}  # fmt: skip
        assert kinds == {named.get(row.name, row.name)}


@pytest.mark.parametrize("base", OTHERS, ids=lambda base: base.name)
@pytest.mark.parametrize("row", tricks.ROWS, ids=lambda row: row.name)
def test_every_row_is_valid_for_every_recipe_and_keeps_the_number_of_epochs(base, row):
    found = tricks.recipe_of(row, base)
    assert sum(s.epochs for s in found.stage) == sum(s.epochs for s in base.stage)
    assert found.data == base.data
    assert load.parse(tricks.values_of(found), "again") == found


def test_rows_include_those_they_are_compared_with():
    assert [row.name for row in tricks.choose(["sgdr"])] == ["bn_fixed", "sgdr"]
    assert [row.name for row in tricks.choose(["flip", "mixup"])] == ["none", "flip", "mixup"]
    assert tricks.choose(["all"]) == tricks.ROWS
    with pytest.raises(OptionError, match="no row 'mixop'; did you mean 'mixup'"):
        tricks.choose(["mixop"])


@pytest.fixture
def runs(monkeypatch):
    """Replaces training: records each recipe and writes a best.json, or raises as in `results`."""
    done = []
    results = {}

    def run(recipe, source, *, split, out, device, cache_gb, log):
        done.append(recipe)
        out.mkdir(parents=True)
        log("warning: repeated")
        log(finetune.UNPRETRAINED)
        log("noise")
        error = next((e for key, e in results.items() if key(recipe)), None)
        if error is not None:
            raise error
        accuracy = 0.8 + 0.1 * (recipe.head.kind == "concat_pool") + 0.01 * recipe.seed
        assert recipe.tta.count == 0, "TTA is evaluated outside the measured seconds"
        metrics = {"accuracy": accuracy, "loss": 0.5}
        info = CheckpointInfo("x", "x", ("a", "b"), Preprocess(), metrics=metrics,
                              data={"train": 24, "valid": 6})  # fmt: skip
        (out / "best.json").write_text(json.dumps(asdict(info)))
        (out / "best.safetensors").write_bytes(b"x")
        return out

    def evaluate(folder, *, tta, log):
        assert tta.count
        return SimpleNamespace(accuracy=read_info(folder / "best.json").metrics["accuracy"] + 0.05)

    monkeypatch.setattr(ablation.finetune, "run", run)
    monkeypatch.setattr(ablation, "evaluate", evaluate)
    return SimpleNamespace(done=done, results=results)


@pytest.fixture
def photos(tmp_path):
    return coloured(tmp_path / "photos", {"a": 10, "b": 10}, side=16)


def ablate(photos, tmp_path, base: Recipe = BASE, rows=FIRST, log=None, **options):
    lines = []
    options = ablation.AblationOptions(**{"seeds": 2, **options})
    out = tmp_path / "out"
    return ablation.run(base, str(photos), out, rows, options, log or lines.append), lines


def test_every_row_is_run_on_every_seed_and_not_again(runs, photos, tmp_path):
    trials, lines = ablate(photos, tmp_path)
    assert [len(units) for units in trials.values()] == [2] * 7
    assert list(trials["features"]) == ["seed 0", "seed 1"]
    assert [recipe.seed for recipe in runs.done] == [0] * 7 + [1] * 7
    assert lines.count("warning: repeated") == 1
    assert lines.count(finetune.UNPRETRAINED) == 1
    assert "noise" not in lines
    assert any(line.startswith("14 of 14  deep_head, seed 1: accuracy 91.00%") for line in lines)
    again, lines = ablate(photos, tmp_path)
    assert again == trials
    assert len(runs.done) == 14
    assert lines[0].startswith("14 of 14 trials are done already")
    more, _ = ablate(photos, tmp_path, seeds=3)
    assert len(runs.done) == 21
    assert {unit: t for unit, t in more["bn_eval"].items() if unit != "seed 2"} == trials["bn_eval"]


def test_trials_outside_the_table_are_counted_and_kept(runs, photos, tmp_path):
    _, lines = ablate(photos, tmp_path, rows=FIRST[:2])
    assert not any("left out" in line for line in lines)
    _, lines = ablate(photos, tmp_path, rows=FIRST[:1], seeds=1)
    assert lines[-1] == (
        f"3 trials of other rows, seeds or folds in {tmp_path / 'out'} are left out of the table; "
        "they are kept"
    )
    assert len(runs.done) == 4


def test_rows_with_equal_recipes_are_run_once(runs, photos, tmp_path):
    trials, _ = ablate(photos, tmp_path, rows=tricks.choose(["tta", "sgdr"]))
    assert len(runs.done) == 4
    assert trials["tta"] == trials["bn_fixed"]
    found = table.lines(tricks.choose(["tta"]), trials)
    assert found[1].difference.mean == pytest.approx(0.05)


def test_adding_the_row_tta_repeats_one_run_per_seed(runs, photos, tmp_path):
    ablate(photos, tmp_path)
    trials, _ = ablate(photos, tmp_path, rows=tricks.choose(["first", "tta"]))
    assert len(runs.done) == 14 + 2
    assert trials["tta"]["seed 0"].accuracy_tta == trials["bn_fixed"]["seed 0"].accuracy + 0.05


def test_batchnorm_alone_trains_at_the_full_rate():
    classifier = create_classifier("resnet18", 2, head=HeadConfig(kind="linear"))
    recipe = tricks.recipe_of(tricks.BY_NAME["bn_alone"], BASE)
    (stage,) = recipe.stage
    classifier.freeze(0, frozen_batchnorm=stage.frozen_batchnorm)
    built = build_optimizer(classifier, recipe.optimizer, stage, stage.lr)
    assert {group["lr"] for group in built.param_groups} == {stage.lr}


def test_equal_differences_have_no_interval():
    assert math.isnan(table._ends(table.interval([0.01, 0.01]))[0])


def test_intervals_of_folds_are_wider_than_those_of_seeds():
    values = [0.91, 0.95, 0.90, 0.93, 0.94]
    plain, corrected = table.interval(values), table.interval(values, overlap=0.25)
    # Nadeau & Bengio, 2003: 1/n becomes 1/n + held out/trained on.
    assert corrected.half / plain.half == pytest.approx(math.sqrt((0.2 + 0.25) / 0.2))


def test_changed_recipes_and_photos_are_run_again(runs, photos, tmp_path):
    ablate(photos, tmp_path)
    ablate(photos, tmp_path, base=BASE.model_copy(update={"batch_size": 16}))
    assert len(runs.done) == 28
    (photos / "a" / "0.jpg").unlink()
    ablate(photos, tmp_path)
    assert len(runs.done) == 42


def test_weights_are_removed_unless_kept(runs, photos, tmp_path):
    ablate(photos, tmp_path, rows=FIRST[:1])
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert (tmp_path / "out" / "trials" / "features-seed1" / "best.json").is_file()
    ablate(photos, tmp_path, rows=FIRST[:1], seeds=3, keep=True)
    kept = list((tmp_path / "out").rglob("*.safetensors"))
    assert [path.parent.name for path in kept] == ["features-seed2"]


def test_a_failed_trial_has_its_error_in_the_row_and_is_run_again(runs, photos, tmp_path):
    runs.results[lambda r: r.head.kind == "concat_pool" and r.seed == 1] = WorkError("loss is nan")
    trials, lines = ablate(photos, tmp_path)
    assert trials["deep_head"]["seed 1"].error == "loss is nan"
    assert trials["deep_head"]["seed 1"].accuracy is None
    assert trials["deep_head"]["seed 0"].accuracy == 0.9
    assert any("deep_head, seed 1: loss is nan" in line for line in lines)
    found = {line.row: line for line in table.lines(FIRST, trials)}
    assert found["concat_pool"].difference == (
        pytest.approx(0.1),
        pytest.approx(float("nan"), nan_ok=True),
        1,
    )
    runs.results.clear()
    trials, _ = ablate(photos, tmp_path)
    assert len(runs.done) == 16
    assert trials["deep_head"]["seed 1"].accuracy == pytest.approx(0.91)


def test_an_error_of_every_row_ends_the_ablation(runs, photos, tmp_path):
    runs.results[lambda r: True] = OptionError("arch = 'resnet999' is unknown")
    with pytest.raises(WorkError, match="no row can be run; the first: arch = 'resnet999'"):
        ablate(photos, tmp_path)
    assert len(runs.done) == 7
    runs.results.clear()
    runs.results[lambda r: True] = DataError("weights = 'x': no such file")
    with pytest.raises(DataError, match="no such file"):
        ablate(photos, tmp_path)
    assert len(runs.done) == 8


def test_an_interrupted_ablation_resumes(runs, photos, tmp_path):
    runs.results[lambda r: r.seed == 1 and r.head.hidden == ()] = KeyboardInterrupt()
    lines = []
    with pytest.raises(KeyboardInterrupt):
        ablate(photos, tmp_path, log=lines.append)
    assert lines[-1] == (
        f"interrupted: 12 of 14 trials are kept in {tmp_path / 'out'}; "
        "the same command goes on with the rest"
    )
    runs.results.clear()
    trials, _ = ablate(photos, tmp_path)
    assert len(runs.done) == 13 + 2
    assert all(trial.accuracy for units in trials.values() for trial in units.values())


def test_folds_come_from_the_photos_or_from_a_split_file(runs, photos, tmp_path):
    trials, _ = ablate(photos, tmp_path, rows=FIRST[:1], folds=5)
    assert list(trials["features"]) == [f"fold {k}" for k in range(5)]
    assert [(r.data.fold, r.data.folds, r.seed) for r in runs.done] == [(k, 5, 0) for k in range(5)]
    split = tmp_path / "split.csv"
    names = [path.relative_to(photos) for path in sorted(photos.rglob("*.jpg"))]
    split.write_text("path,fold\n" + "".join(f"{n},{i % 2}\n" for i, n in enumerate(names)))
    runs.done.clear()
    ablate(photos, tmp_path, rows=FIRST[:1], folds=2, split=split)
    assert [(r.data.fold, r.data.folds) for r in runs.done] == [(0, 0), (1, 0)]
    with pytest.raises(OptionError, match="fold"):
        ablate(photos, tmp_path, rows=FIRST[:1], folds=3, split=split)


def test_wrong_options_are_refused_before_any_run(runs, photos, tmp_path):
    for option, value in (("seeds", 0), ("folds", 1), ("folds", -2)):
        with pytest.raises(OptionError, match=rf"^--{option} {value}: use \d or more$"):
            ablate(photos, tmp_path, **{option: value})
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    with pytest.raises(OptionError, match=rf"^--out {out}: .*file can't be written to; choose"):
        ablation.run(BASE, str(photos), out, FIRST, ablation.AblationOptions())
    with pytest.raises(DataError, match="no such folder"):
        ablate(tmp_path / "nowhere", tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(OptionError, match="is no ablation"):
        ablate(photos, tmp_path)
    assert not runs.done


def test_intervals_equal_those_of_scipys_t_test():
    a = {"seed 0": 0.91, "seed 1": 0.95, "seed 2": 0.90, "seed 9": 0.1}
    b = {"seed 0": 0.90, "seed 1": 0.92, "seed 2": 0.88}
    found = table.difference(a, b)
    reference = stats.ttest_rel([0.91, 0.95, 0.90], list(b.values())).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(reference))
    assert found.runs == 3
    assert table.interval([0.5]).mean == 0.5
    assert str(table.interval([0.5]).half) == str(table.interval([]).mean) == "nan"


def figures(rows=FIRST, seeds=3):
    """Trials whose accuracy increases from row to row; the last row failed."""
    trials = {
        row.name: {
            f"seed {s}": ablation.AblationRun(
                "k", 20.0, 0.8 + 0.02 * i + 0.001 * (s * s - i * s), 0.99, 0.5, 24, 6
            )
            for s in range(seeds)
        }
        for i, row in enumerate(rows)
    }  # fmt: skip
    failed = ablation.AblationRun("k", 1.0, error="the loss is nan | lower lr")
    trials[rows[-1].name] = dict.fromkeys(trials[rows[-1].name], failed)
    return trials


def test_the_tables_on_screen_in_markdown_and_in_csv_agree(tmp_path, capsys):
    found = table.lines(FIRST, figures())
    how = table.about(BASE, "some/photos", figures(), "cpu")
    assert "resnet34 at 224 px, 2 epochs, on 24 photos of `photos`, validated on 6" in how
    table.write(found, tmp_path, "Ablation", how)
    table.show(found)
    screen = capsys.readouterr().out
    page = (tmp_path / "ablation.md").read_text()
    with (tmp_path / "ablation.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert list(rows) == [row.name for row in FIRST]
    for line in found[:-1]:
        accuracy = f"{100 * line.accuracy.mean:.2f} ± {100 * line.accuracy.half:.2f}"
        assert accuracy in screen
        assert accuracy in page
        assert float(rows[line.row]["accuracy"]) == pytest.approx(line.accuracy.mean, abs=1e-6)
        assert rows[line.row]["against"] == line.against
    assert "deep_head: the loss is nan | lower lr" in screen
    assert "`deep_head` failed: the loss is nan" in page
    assert rows["deep_head"]["accuracy"] == rows["deep_head"]["difference"] == ""
    assert rows["features"]["difference"] == ""
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_accuracy_axis_is_limited_to_possible_values(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda self, path, **_: seen.append(self) or path.write_bytes(b"x"),
    )

    def picture(*accuracies):
        trials = {FIRST[0].name: {
            f"seed {i}": ablation.AblationRun("k", 1.0, value) for i, value in enumerate(accuracies)
        }}  # fmt: skip
        table.write(table.lines(FIRST[:1], trials), tmp_path, "x", "y")
        left = seen.pop().axes[0]
        return left.get_xlim(), [x for bar in left.collections for x, _ in bar.get_segments()[0]]

    (low, high), ends = picture(0.60, 0.95)  # the interval is -144 to 299
    assert ends == pytest.approx([0, 100])
    assert (low, high) == (-0.5, 100.5)
    (low, high), ends = picture(0.90, 0.92)  # 78 to 100
    assert (low, high) == (84, 98)
    assert ends == pytest.approx([91 - 12.7062, 100])
    (low, high), ends = picture(0.98)
    assert low < 98 < high <= 100.5
    assert ends == []


def test_one_epoch_and_one_thread_are_singular(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = BASE.model_copy(update={"stage": (BASE.stage[0].model_copy(update={"cycle_len": 1}),)})
    how = table.about(one, "photos", figures(), "cpu")
    assert " px, 1 epoch, on" in how
    assert "Measured on 1 CPU thread, torch" in how


def test_every_row_can_be_compared_with_one_row():
    found = table.lines(FIRST, figures(), "bn_eval")
    assert [line.against for line in found] == ["bn_eval", "", *["bn_eval"] * 5]
    for line in found[2:-1]:
        assert line.difference.mean == pytest.approx(line.accuracy.mean - found[1].accuracy.mean)


def test_the_ablate_command_writes_its_files_and_names_unknown_rows(photos, tmp_path, capsys):
    weights = tmp_path / "w.pth"
    torch.save(small_network().state_dict(), weights)
    words = [
        "ablate", "training/recipes/tricks.toml", "--data", str(photos), "--seeds", "2",
        "--rows", "tta", "--out", str(tmp_path / "out"), "--weights", str(weights),
        "arch=mobilenet_v2", "arch_args.width_mult=0.25",
        f"arch_args.inverted_residual_setting={BLOCKS}", "preprocess.size=32", "batch_size=8",
        "stage.all.cycle_len=1",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fledge.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines()] == ["row", "bn_fixed", "tta"]
    assert "failed" not in output.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"trials", "ablation.csv", "ablation.md", "ablation.png"}
    with (tmp_path / "out" / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["runs"], row["against"]) for row in rows] == [("2", ""), ("2", "bn_fixed")]
    assert fledge.main([*words, "--against", "deep_head"]) == 2
    assert "--against deep_head: not among the rows that are run; add it: --rows tta,deep_head" in (
        capsys.readouterr().err
    )
    assert fledge.main([*words, "--against", "deep_hat"]) == 2
    assert "--against: no row 'deep_hat'; did you mean 'deep_head'?" in capsys.readouterr().err
