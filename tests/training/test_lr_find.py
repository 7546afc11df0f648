import math

import pytest

import fledge
from serving.errors import OptionError
from training import config
from training import recipe as fine_tune
from training.lr_find import PICKS, lr_find

TWO = '[[stage]]\nname = "head"\n[[stage]]\nname = "tail"\nunfreeze = 1\n'


def _quiet(_line):
    pass


def test_every_suggestion_is_trained_from_the_same_start(recipe, photos, tmp_path, weights):
    curve, trials = lr_find(
        config.read(recipe(TWO), [f"weights={weights}", "lr_find.steps=30", "lr_find.low=0.001"]),
        str(photos),
        out=tmp_path / "curve.png",
        device="cpu",
        compare=1,
        say=_quiet,
    )
    assert [trial.pick for trial in trials] == list(PICKS)
    assert [trial.lr for trial in trials] == [curve.pick(name) for name in PICKS]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    by_rate = {}
    for trial in trials:
        same = by_rate.setdefault(trial.lr, trial)
        assert (same.valid_loss, same.accuracy) == (trial.valid_loss, trial.accuracy)
    assert all(0 <= trial.accuracy <= 1 for trial in trials if not math.isnan(trial.accuracy))


def test_a_rate_that_diverges_is_shown_as_such(recipe, photos, tmp_path, weights, monkeypatch):
    from training import lr_finder

    original = lr_finder.Curve.pick
    monkeypatch.setattr(
        lr_finder.Curve,
        "pick",
        lambda self, name: 1e30 if name == "minimum" else original(self, name),
    )
    _, trials = lr_find(
        config.read(recipe(TWO), [f"weights={weights}", "lr_find.steps=30", "lr_find.low=0.001"]),
        str(photos),
        out=tmp_path / "curve.png",
        compare=1,
        say=_quiet,
    )
    assert math.isnan(trials[-1].valid_loss)
    assert not math.isnan(trials[0].valid_loss)


def test_a_later_stage_starts_from_what_came_before(recipe, photos, tmp_path, weights):
    path, said = recipe(TWO.replace('"head"', '"head"\nlr = 0.01')), []
    settings = config.read(
        path, [f"weights={weights}", "lr_find.steps=30", "lr_find.low=0.001", "stage.tail.lr=0.01"]
    )
    run = _train(settings, photos, tmp_path)
    options = {"stage": "tail", "out": tmp_path / "c.png", "say": said.append}
    untrained, _ = lr_find(settings, str(photos), **options)
    assert "the stages before tail have not been trained" in " ".join(said)
    start = run / "stages" / "head.safetensors"
    trained, _ = lr_find(settings, str(photos), start=start, **options)
    assert trained.losses != untrained.losses
    with pytest.raises(OptionError, match="--stage nose: the recipe has head, tail"):
        lr_find(settings, str(photos), **{**options, "stage": "nose"})
    other = config.read(path, ["arch=squeezenet1_1", "arch_args={}", "weights=none"])
    with pytest.raises(OptionError, match=r"--from .*: it is mobilenet_v2 with 3 cl"):
        lr_find(other, str(photos), start=start, **options)


def _train(settings, photos, tmp_path):
    return fine_tune.run(settings, str(photos), out=tmp_path / "run", device="cpu", say=_quiet)


def test_the_command_prints_what_can_be_taken(
    recipe, photos, tmp_path, weights, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = ["lr-find", str(recipe(TWO)), "--data", str(photos), "--weights", str(weights)]
    # Rates that are large enough to be told from the noise of so few photos.
    assert fledge.main([*words, "--compare", "lr_find.steps=60", "lr_find.low=0.001"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == list(PICKS)
    assert "a trap" in lines[3]
    assert lines[5].startswith("after 1 epoch ")
    assert len(lines) == 10
    assert "stage.head.lr=" in printed.err
    assert (tmp_path / "lr_find-head.png").exists()
