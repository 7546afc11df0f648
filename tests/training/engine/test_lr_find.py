import math

import pytest

import fledge
from serving.errors import OptionError
from tests.training.conftest import BLOCKS
from training.config import load
from training.engine import finetune
from training.engine.lr_find import PICKS, lr_find

TWO = '[[stage]]\nname = "head"\n[[stage]]\nname = "tail"\nunfreeze = 1\n'


def _quiet(_line):
    pass


def test_trials_of_all_suggestions_start_from_the_same_weights(recipe, photos, tmp_path, weights):
    curve, trials = lr_find(
        load.read(recipe(TWO), [f"weights={weights}", "lr_find.steps=30", "lr_find.low=0.001"]),
        str(photos),
        out=tmp_path / "curve.png",
        device="cpu",
        compare=1,
        log=_quiet,
    )
    assert [trial.pick for trial in trials] == list(PICKS)
    assert [trial.lr for trial in trials] == [curve.pick(name) for name in PICKS]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    by_rate = {}
    for trial in trials:
        same = by_rate.setdefault(trial.lr, trial)
        assert (same.valid_loss, same.accuracy) == (trial.valid_loss, trial.accuracy)
    assert all(0 <= trial.accuracy <= 1 for trial in trials if not math.isnan(trial.accuracy))


def test_a_trial_that_diverges_has_nan_losses(recipe, photos, tmp_path, weights, monkeypatch):
    from training.optim import lr_range_test

    original = lr_range_test.Curve.pick
    monkeypatch.setattr(
        lr_range_test.Curve,
        "pick",
        lambda self, name: 1e30 if name == "minimum" else original(self, name),
    )
    _, trials = lr_find(
        load.read(recipe(TWO), [f"weights={weights}", "lr_find.steps=30", "lr_find.low=0.001"]),
        str(photos),
        out=tmp_path / "curve.png",
        compare=1,
        log=_quiet,
    )
    assert math.isnan(trials[-1].valid_loss)
    assert not math.isnan(trials[0].valid_loss)


def test_a_later_stage_starts_from_a_checkpoint(recipe, photos, tmp_path, weights):
    path, lines = recipe(TWO.replace('"head"', '"head"\nlr = 0.01')), []
    settings = load.read(
        path, [f"weights={weights}", "lr_find.steps=30", "lr_find.low=0.001", "stage.tail.lr=0.01"]
    )
    run = _train(settings, photos, tmp_path)
    options = {"stage": "tail", "out": tmp_path / "c.png", "log": lines.append}
    untrained, _ = lr_find(settings, str(photos), **options)
    assert "stage tail starts without the stages before it" in " ".join(lines)
    start = run / "stages" / "head.safetensors"
    trained, _ = lr_find(settings, str(photos), start=start, **options)
    assert trained.losses != untrained.losses
    with pytest.raises(OptionError, match="--stage nose: no such stage; the recipe has head, tail"):
        lr_find(settings, str(photos), **{**options, "stage": "nose"})
    for changes, message in (
        (["arch=squeezenet1_1", "arch_args={}"],
         "arch is mobilenet_v2 there, squeezenet1_1 here, "
         "arch_args.width_mult is 0.25 there, none here, "
         f"arch_args.inverted_residual_setting is {BLOCKS} there, none here"),
        (["arch_args.width_mult=0.5"], "arch_args.width_mult is 0.25 there, 0.5 here"),
        (["head.hidden=[8, 8]"], "head.hidden is [16] there, [8, 8] here"),
    ):  # fmt: skip
        other = load.read(path, [*changes, "weights=none"])
        with pytest.raises(OptionError) as caught:
            lr_find(other, str(photos), start=start, **options)
        assert str(caught.value) == f"--from {start} does not fit: {message}"


def _train(settings, photos, tmp_path):
    return finetune.run(settings, str(photos), out=tmp_path / "run", device="cpu", log=_quiet)


def test_the_command_prints_all_suggestions_and_trials(
    recipe, photos, tmp_path, weights, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = ["lr-find", str(recipe(TWO)), "--data", str(photos), "--weights", str(weights)]
    # Small rates would not differ from the noise of so few photos.
    assert fledge.main([*words, "--compare", "lr_find.steps=60", "lr_find.low=0.001"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == list(PICKS)
    assert "a trap" in lines[3]
    assert lines[5].startswith("after 1 epoch ")
    assert len(lines) == 10
    assert "stage.head.lr=" in printed.err
    assert (tmp_path / "runs/lr-find-tiny/lr_find-head.png").exists()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "--epochs", "0"], "--epochs 0: use 1 or more"),
        (["--compare", "--epochs", "-1"], "--epochs -1: use 1 or more"),
        (["--epochs", "3"], "--epochs 3 has no effect without --compare; add it"),
        (["--out", "none/x.png"], "--out none/x.png: there is no folder none; make it first"),
        (["--out", "x.txt"], "--out x.txt: use a name that ends in .png"),
    ],
)
def test_wrong_options_are_errors_before_the_work_begins(
    recipe, photos, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.engine.lr_find.load_dataset", None)
    assert fledge.main(["lr-find", str(recipe()), "--data", str(photos), *words]) == 2
    assert capsys.readouterr().err == f"fledge: {message}\n"
