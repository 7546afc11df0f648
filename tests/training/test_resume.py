"""A run that was killed, and went on, ends as one that was not."""

import csv
import json
import multiprocessing
import random
import shutil
from pathlib import Path

import pytest

from serving.errors import DataError, OptionError
from training import checkpoint, config, journal, recipe, run_folder, state, trainer

# Everything that has a state: lr_find, cached views, momentum, dropout, moving average, patience,
# plateau, mixing, accumulation, another size.
STAGES = """
[[stage]]
name = "head"
cycle_len = 2
views = 2
[[stage]]
name = "tail"
unfreeze = 1
lr = 0.02
schedule = "plateau"
cycle_len = 4
patience = 2
batchnorm = "train"
[[stage]]
name = "all"
unfreeze = "all"
lr = { low = 0.001, high = 0.01 }
schedule = "one_cycle"
cycle_len = 2
frozen_batchnorm = "train"
image_size = 40
augment = { mixup = 0.4, cutmix = 1.0, erase = 0.3 }
"""
OVERRIDES = (
    "optimizer.ema=0.8",
    "optimizer.accumulate=2",
    "optimizer.clip_norm=1.0",
    "tta.count=2",
)


@pytest.fixture
def request_of(recipe, photos, weights):
    return recipe(STAGES), str(photos), (*OVERRIDES, f"weights={weights}")


def go(path, photos, overrides, out):
    """Begin a run, or go on with it."""
    if (out / run_folder.RUN).exists():
        recipe.resume(out, say=_quiet)
    else:
        shutil.rmtree(out, ignore_errors=True)
        recipe.run(config.read(path, overrides), photos, out=out, device="cpu", say=_quiet)


def _quiet(_line):
    pass


def result(folder):
    """All that must be the same, whatever happened on the way."""
    with (folder / "metrics.csv").open() as file:
        metrics = [[v for k, v in row.items() if k != "seconds"] for row in csv.DictReader(file)]
    files = [checkpoint.BEST, "steps.csv", *(f"stages/{n}.safetensors" for n in STAGE_NAMES)]
    return {
        "metrics": metrics,
        "best": json.loads((folder / "best.json").read_text()),
        **{name: (folder / name).read_bytes() for name in files},
    }


STAGE_NAMES = ("head", "tail", "all")


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(request_of, tmp_path):
    # A server that has torch loaded: a child of it begins in milliseconds.
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["training.recipe", "training.report"])
    dice = random.Random(20)

    def start(out):
        child = spawn.Process(target=go, args=(*request_of, out))
        child.start()
        return child

    reference = tmp_path / "reference"
    whole = start(reference)
    whole.join(300)
    assert whole.exitcode == 0
    expected = result(reference)
    kills, compared, number = 0, 0, 0
    while kills < 20 or not compared:
        number += 1
        folder, finished = tmp_path / f"run-{number}", False
        while not finished:
            child = start(folder)
            child.join(None if kills >= 20 else dice.uniform(0.05, 1.5))
            if child.is_alive():
                child.kill()
                kills += 1
            child.join()
            finished = child.exitcode == 0
            assert finished or child.exitcode == -9
        found = result(folder)
        for name, value in expected.items():
            assert found[name] == value, name
        compared += 1
    assert not (reference / run_folder.LAST).exists()


@pytest.fixture
def interrupted(request_of, tmp_path, monkeypatch):
    """A run that somebody stopped in its second stage."""
    path, photos, overrides = request_of
    original, lines = trainer.train_epoch, []

    def stop(classifier, stage, *rest):
        if stage.name == "tail" and rest[3] == 1:
            raise KeyboardInterrupt
        return original(classifier, stage, *rest)

    monkeypatch.setattr(trainer, "train_epoch", stop)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        recipe.run(config.read(path, overrides), photos, out=out, device="cpu", say=lines.append)
    monkeypatch.undo()
    return out, lines


def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(interrupted):
    folder, lines = interrupted
    assert lines[-1] == (
        f"interrupted: 3 finished epochs are kept; go on with: fledge train --resume {folder}"
    )
    said = []
    recipe.resume(folder, say=said.append)
    assert f"{folder}: going on after 3 finished epochs" in said
    assert len(checkpoint.read_info(folder / "best.json").classes) == 3
    recipe.resume(folder, say=said.append)
    assert "is finished already" in said[-1]


def test_resume_refuses_other_photos(interrupted, photos):
    folder, _ = interrupted
    victim = next((photos / "red").iterdir())
    victim.write_bytes((photos / "blue" / "1.jpg").read_bytes() + b"more")
    with pytest.raises(DataError, match="no longer those that the run began with"):
        recipe.resume(folder, say=_quiet)


def test_resume_says_what_is_wrong_with_a_folder(interrupted, tmp_path):
    folder, _ = interrupted
    with pytest.raises(DataError, match=r"run\.json is missing.*start it anew"):
        recipe.resume(tmp_path / "nothing", say=_quiet)
    (folder / "last" / state.STATE).write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"can't be read.*start the run anew"):
        recipe.resume(folder, say=_quiet)


def test_a_folder_in_use_names_the_way_on(interrupted, request_of):
    folder, _ = interrupted
    path, photos, overrides = request_of
    with pytest.raises(OptionError, match=f"--resume {folder}"):
        recipe.run(config.read(path, overrides), photos, out=folder, say=_quiet)


def test_going_on_drops_what_a_kill_left(tmp_path):
    rows = [trainer.Epoch("a", n, 0.1, 1.0, 1.0, 0.5, 2.0) for n in (1, 2)]
    steps = [trainer.Step("a", n, 1, 1.0, 0.9, (0.1, 0.2)) for n in (1, 2)]
    book = journal.Journal(tmp_path, [])
    for row, step in zip(rows, steps, strict=True):
        book.add(row, [step])
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("a,3,1,0.")  # cut short
    assert journal.Journal(tmp_path, rows[:1]).steps == 1
    assert journal.read_steps(tmp_path) == steps[:1]
    assert Path(tmp_path, "metrics.csv").read_text().count("\n") == 2
