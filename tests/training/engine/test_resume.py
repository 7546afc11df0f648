"""A run that was killed and resumed ends with the same bits as an uninterrupted run."""

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

# Everything with a state: lr_find, cached views, momentum, dropout, moving average, early stopping,
# plateau schedule, mixup, accumulation, another image size.
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


def start_or_resume(path, photos, overrides, out, training=None):
    """Start or resume a run; sets the event `training` when training begins."""

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
    """Number of epochs in the resume state."""
    found = resume_state.load(folder / LAST_FOLDER, torch.device("cpu"))
    return len(found[0].history) if found else 0


def result(folder):
    """Everything that must equal that of an uninterrupted run."""
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


def test_runs_killed_at_random_times_end_with_the_same_bits(request_of, tmp_path):
    # A fork server that has imported torch starts a child process in milliseconds.
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["training.engine.finetune", "matplotlib.backends.backend_agg"])
    dice = random.Random(20)

    def start(out, training=None):
        child = spawn.Process(target=start_or_resume, args=(*request_of, out, training))
        child.start()
        return child

    reference = tmp_path / "reference"
    training = spawn.Event()
    uninterrupted = start(reference, training)
    assert training.wait(300)
    began = time.perf_counter()
    uninterrupted.join(300)
    span = time.perf_counter() - began
    assert uninterrupted.exitcode == 0
    expected = result(reference)
    kills, compared, number = 0, 0, 0
    done = set()  # numbers of finished epochs at the kills

    def enough():
        return kills >= 60 or (kills >= 20 and len(done - {0}) >= 3)

    while not enough() or not compared:
        number += 1
        folder, finished = tmp_path / f"run-{number}", False
        while not finished:
            training = spawn.Event()
            child = start(folder, training)
            if not enough():
                if dice.random() < 0.8:  # most kills during training, others during the start
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
    assert len(done - {0}) >= 3, (done, span)  # a kill before the first epoch has nothing to resume
    assert not (reference / LAST_FOLDER).exists()


@pytest.fixture
def interrupted(request_of, tmp_path, monkeypatch):
    """A run that was interrupted in its second stage."""
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


def test_an_interrupt_saves_finished_epochs_and_logs_the_resume_command(interrupted, request_of):
    folder, lines = interrupted
    assert lines[-1] == (
        f"interrupted: 3 finished epochs are saved; resume with: fledge train --resume {folder}"
    )
    messages = []
    finetune.resume(folder, log=messages.append)
    assert f"{folder}: resuming after 3 finished epochs" in messages
    uninterrupted = folder.parent / "uninterrupted"
    start_or_resume(*request_of, uninterrupted)
    assert result(folder) == result(uninterrupted)
    finetune.resume(folder, log=messages.append)
    assert "is finished already" in messages[-1]


def test_only_epochs_on_disk_are_counted_as_saved(request_of, tmp_path, monkeypatch):
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
    messages = []
    finetune.resume(out, log=messages.append)
    assert [line for line in messages if f"resuming after {count} finished" in line]


def test_a_run_without_resume_state_and_report_is_an_error(interrupted):
    folder, _ = interrupted
    shutil.rmtree(folder / LAST_FOLDER)
    with pytest.raises(DataError, match="last/ is missing, and the run is not finished; start a n"):
        finetune.resume(folder, log=_quiet)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_state_of_every_optimizer_is_resumed(kind, request_of, tmp_path, monkeypatch):
    path, photos, overrides = request_of
    own = (*overrides, f"optimizer.kind={kind}", "optimizer.momentum=0")
    folder, _ = stopped(path, photos, own, tmp_path / "stopped", monkeypatch)
    finetune.resume(folder, log=_quiet)
    start_or_resume(path, photos, own, tmp_path / "uninterrupted")
    assert result(folder) == result(tmp_path / "uninterrupted")


def test_averages_of_layers_that_a_later_stage_freezes_are_resumed(
    recipe, photos, weights, tmp_path, monkeypatch
):
    """Averages of layers that an earlier stage trained still approach the frozen weights."""
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
    start_or_resume(*request, tmp_path / "uninterrupted")
    for name in ("metrics.csv", "best.json"):
        assert _without_times(folder / name) == _without_times(tmp_path / "uninterrupted" / name)


def _without_times(path):
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


def test_a_run_is_resumed_with_moved_photos(interrupted, photos, tmp_path):
    folder, _ = interrupted
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError):
        finetune.resume(folder, log=_quiet)
    finetune.resume(folder, root=tmp_path / "elsewhere", log=_quiet)
    info = checkpoint.read_info(folder / "best.json")
    assert info.data["root"] == str(tmp_path / "elsewhere")
    assert evaluate.evaluate(folder).accuracy == info.metrics["accuracy"]


def test_changed_photos_are_an_error(interrupted, photos):
    folder, _ = interrupted
    victim = next((photos / "red").iterdir())
    victim.write_bytes((photos / "blue" / "1.jpg").read_bytes() + b"more")
    with pytest.raises(DataError, match="have changed since the run was started"):
        finetune.resume(folder, log=_quiet)


def test_missing_and_damaged_files_are_errors(interrupted, tmp_path):
    folder, _ = interrupted
    with pytest.raises(DataError, match=r"run\.json is missing.*start it with fledge train"):
        finetune.resume(tmp_path / "nothing", log=_quiet)
    (folder / "last" / resume_state.STATE_FILE).write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"can't be read.*start the run again"):
        finetune.resume(folder, log=_quiet)


def test_an_out_folder_with_a_run_is_an_error_that_names_resume(interrupted, request_of):
    folder, _ = interrupted
    path, photos, overrides = request_of
    with pytest.raises(OptionError, match=f"--resume {folder}"):
        finetune.run(load.read(path, overrides), photos, out=folder, log=_quiet)


def test_rows_of_epochs_after_the_resume_point_are_removed(tmp_path):
    rows = [Epoch("a", n, 0.1, 1.0, 1.0, 0.5, 2.0) for n in (1, 2)]
    steps = [Step("a", n, 1, 1.0, 0.9, (0.1, 0.2)) for n in (1, 2)]
    with MetricLog(tmp_path, []) as metric_log:
        for row, step in zip(rows, steps, strict=True):
            metric_log.add(row, [step])
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("a,3,1,0.")  # cut short by a kill
    with MetricLog(tmp_path, rows[:1]) as metric_log:
        assert metric_log.steps == 1
    assert read_steps(tmp_path) == steps[:1]
    assert Path(tmp_path, "metrics.csv").read_text().count("\n") == 2
