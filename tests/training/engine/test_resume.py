"""A run that was killed, and went on, ends as one that was not."""

import csv
import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from serving.errors import DataError, OptionError
from training.config import load
from training.engine import epoch, finetune, stages
from training.evaluation import evaluate
from training.run import checkpoint, resume_state
from training.run.folder import LAST_FOLDER, RUN_FILE
from training.run.history import Epoch, Step
from training.run.metric_log import MetricLog, read_steps

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
    "lr_find.steps=20",
    "data.presize=1.25",
)


@pytest.fixture
def request_of(recipe, photos, weights):
    return recipe(STAGES), str(photos), (*OVERRIDES, f"weights={weights}")


def go(path, photos, overrides, out, training=None):
    """Begin a run, or go on with it; set the event `training` when it is about to train."""

    def log(_line):
        if training is not None and (out / RUN_FILE).exists():
            training.set()

    if (out / RUN_FILE).exists():
        finetune.resume(out, log=log)
    else:
        shutil.rmtree(out, ignore_errors=True)
        finetune.run(load.read(path, overrides), photos, out=out, device="cpu", log=log)


def _quiet(_line):
    pass


def epochs(folder):
    """How many epochs the last state holds."""
    found = resume_state.load(folder / LAST_FOLDER, torch.device("cpu"))
    return len(found[0].history) if found else 0


def result(folder):
    """All that must be the same, whatever happened on the way."""
    with (folder / "metrics.csv").open() as file:
        metrics = [[v for k, v in row.items() if k != "seconds"] for row in csv.DictReader(file)]
    files = [checkpoint.BEST, "steps.csv", *(f"stages/{n}.safetensors" for n in STAGE_NAMES)]
    return {
        "metrics": metrics,
        "pictures": sorted(path.name for path in folder.glob("*.png")),
        "best": json.loads((folder / "best.json").read_text()),
        **{name: (folder / name).read_bytes() for name in files},
    }


STAGE_NAMES = ("head", "tail", "all")


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(request_of, tmp_path):
    # A server that has torch loaded: a child of it begins in milliseconds.
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["training.engine.finetune", "matplotlib.backends.backend_agg"])
    dice = random.Random(20)

    def start(out, training=None):
        child = spawn.Process(target=go, args=(*request_of, out, training))
        child.start()
        return child

    reference = tmp_path / "reference"
    training = spawn.Event()
    whole = start(reference, training)
    assert training.wait(300)
    began = time.perf_counter()
    whole.join(300)
    span = time.perf_counter() - began
    assert whole.exitcode == 0
    expected = result(reference)
    kills, compared, number = 0, 0, 0
    done = set()  # how many epochs were finished when a kill came

    def enough():
        return kills >= 60 or (kills >= 20 and len(done - {0}) >= 3)

    while not enough() or not compared:
        number += 1
        folder, finished = tmp_path / f"run-{number}", False
        while not finished:
            training = spawn.Event()
            child = start(folder, training)
            if not enough():
                if dice.random() < 0.8:  # most while it trains, the others while it begins
                    training.wait(60)
                child.join(dice.uniform(0, 0.6 * span))
            else:
                child.join()
            if child.is_alive():
                child.kill()
                child.join()
                kills += 1
                done.add(epochs(folder))
            child.join()
            finished = child.exitcode == 0
            assert finished or child.exitcode == -9
        found = result(folder)
        for name, value in expected.items():
            assert found[name] == value, name
        compared += 1
    assert len(done - {0}) >= 3, (done, span)  # kills before the first epoch resume nothing
    assert not (reference / LAST_FOLDER).exists()


@pytest.fixture
def interrupted(request_of, tmp_path, monkeypatch):
    """A run that somebody stopped in its second stage."""
    return stopped(*request_of, tmp_path / "stopped", monkeypatch)


def stopped(path, photos, overrides, out, monkeypatch):
    original, lines = epoch.train_epoch, []

    def stop(classifier, stage, *rest):
        if stage.name == "tail" and rest[3] == 1:
            raise KeyboardInterrupt
        return original(classifier, stage, *rest)

    monkeypatch.setattr(epoch, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(load.read(path, overrides), photos, out=out, device="cpu", log=lines.append)
    monkeypatch.setattr(epoch, "train_epoch", original)
    return out, lines


def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(interrupted, request_of):
    folder, lines = interrupted
    assert lines[-1] == (
        f"interrupted: 3 finished epochs are saved; resume with: fledge train --resume {folder}"
    )
    said = []
    finetune.resume(folder, log=said.append)
    assert f"{folder}: resuming after 3 finished epochs" in said
    whole = folder.parent / "whole"
    go(*request_of, whole)
    assert result(folder) == result(whole)
    finetune.resume(folder, log=said.append)
    assert "is finished already" in said[-1]


def test_an_epoch_counts_when_it_is_on_the_disk(request_of, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    original, lines = stages._save_state, []
    saves = iter([original, original, stop])
    monkeypatch.setattr(stages, "_save_state", lambda *given: next(saves)(*given))
    path, photos, overrides = request_of
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        finetune.run(load.read(path, overrides), photos, out=out, device="cpu", log=lines.append)
    monkeypatch.setattr(stages, "_save_state", original)
    (count,) = (int(line.split()[1]) for line in lines if line.startswith("interrupted: "))
    said = []
    finetune.resume(out, log=said.append)
    assert [line for line in said if f"resuming after {count} finished" in line]


def test_a_run_without_its_state_is_not_called_finished(interrupted):
    folder, _ = interrupted
    shutil.rmtree(folder / LAST_FOLDER)
    with pytest.raises(DataError, match="last/ is missing, and the run is not finished; start a n"):
        finetune.resume(folder, log=_quiet)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_optimiser_goes_on_as_it_was(kind, request_of, tmp_path, monkeypatch):
    path, photos, overrides = request_of
    own = (*overrides, f"optimizer.kind={kind}", "optimizer.momentum=0")
    folder, _ = stopped(path, photos, own, tmp_path / "stopped", monkeypatch)
    finetune.resume(folder, log=_quiet)
    go(path, photos, own, tmp_path / "whole")
    assert result(folder) == result(tmp_path / "whole")


def test_averages_of_what_is_frozen_later_are_validated_as_they_move(
    recipe, photos, weights, tmp_path, monkeypatch
):
    """An earlier stage trained what this one freezes: its averages are still on their way."""
    stages = """
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.01
cycle_len = 2
[[stage]]
name = "tail"
lr = 0.01
cycle_len = 3
"""
    request = recipe(stages), str(photos), ("optimizer.ema=0.98", f"weights={weights}")
    folder, _ = stopped(*request, tmp_path / "stopped", monkeypatch)
    finetune.resume(folder, log=_quiet)
    go(*request, tmp_path / "whole")
    for name in ("metrics.csv", "best.json"):
        assert _without_times(folder / name) == _without_times(tmp_path / "whole" / name)


def _without_times(path):
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


def test_photos_may_have_moved(interrupted, photos, tmp_path):
    folder, _ = interrupted
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError):
        finetune.resume(folder, log=_quiet)
    finetune.resume(folder, root=tmp_path / "elsewhere", log=_quiet)
    info = checkpoint.read_info(folder / "best.json")
    assert info.data["root"] == str(tmp_path / "elsewhere")
    assert evaluate.evaluate(folder).accuracy == info.metrics["accuracy"]


def test_resume_refuses_other_photos(interrupted, photos):
    folder, _ = interrupted
    victim = next((photos / "red").iterdir())
    victim.write_bytes((photos / "blue" / "1.jpg").read_bytes() + b"more")
    with pytest.raises(DataError, match="have changed since the run was started"):
        finetune.resume(folder, log=_quiet)


def test_resume_says_what_is_wrong_with_a_folder(interrupted, tmp_path):
    folder, _ = interrupted
    with pytest.raises(DataError, match=r"run\.json is missing.*start it with fledge train"):
        finetune.resume(tmp_path / "nothing", log=_quiet)
    (folder / "last" / resume_state.STATE_FILE).write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"can't be read.*start the run again"):
        finetune.resume(folder, log=_quiet)


def test_a_folder_in_use_names_the_way_on(interrupted, request_of):
    folder, _ = interrupted
    path, photos, overrides = request_of
    with pytest.raises(OptionError, match=f"--resume {folder}"):
        finetune.run(load.read(path, overrides), photos, out=folder, log=_quiet)


def test_going_on_drops_what_a_kill_left(tmp_path):
    rows = [Epoch("a", n, 0.1, 1.0, 1.0, 0.5, 2.0) for n in (1, 2)]
    steps = [Step("a", n, 1, 1.0, 0.9, (0.1, 0.2)) for n in (1, 2)]
    with MetricLog(tmp_path, []) as metric_log:
        for row, step in zip(rows, steps, strict=True):
            metric_log.add(row, [step])
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("a,3,1,0.")  # cut short
    with MetricLog(tmp_path, rows[:1]) as metric_log:
        assert metric_log.steps == 1
    assert read_steps(tmp_path) == steps[:1]
    assert Path(tmp_path, "metrics.csv").read_text().count("\n") == 2
