"""A run that was killed and resumed ends with the same bits as an uninterrupted run.

A kill leaves in the run folder what is there at that moment, and between two flushes or renames of
files nothing changes there that a resumed run reads. So the folder is copied before each flush and
before and after each rename, and a run is resumed from the copies. Some real kills come on top.
"""

import csv
import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from serving.errors import DataError, OptionError
from serving.utils.files import partial_of
from tests.training import forked
from tests.training.conftest import coloured, recipe_text, small_network
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


STAGE_NAMES = ("head", "tail", "all")
SHORT = """
[[stage]]
name = "head"
lr = 0.01
views = 2
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.01
cycle_len = 2
augment = { mixup = 0.4 }
"""


def folder_of(tmp_path_factory, stages, photos, *overrides):
    """Photos, weights and recipe in a folder: (recipe, photos, overrides)."""
    root = tmp_path_factory.mktemp("resume")
    coloured(root / "photos", dict.fromkeys(("blue", "green", "red"), photos))
    torch.manual_seed(0)
    torch.save(small_network().state_dict(), root / "w.pth")
    (root / "tiny.toml").write_text(recipe_text(stages))
    return root / "tiny.toml", str(root / "photos"), (*overrides, f"weights={root / 'w.pth'}")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return folder_of(tmp_path_factory, STAGES, 15, *OVERRIDES)


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    """The result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    start_or_resume(*settings, folder)
    assert not (folder / LAST_FOLDER).exists()
    return result(folder)


def start_or_resume(path, photos, overrides, out, log=lambda line: None):
    """Start or resume a run."""
    if (out / RUN_FILE).exists():
        finetune.resume(out, log=log)
    else:
        shutil.rmtree(out, ignore_errors=True)
        finetune.run(load.read(path, overrides), photos, out=out, device="cpu", log=log)


def logging(path, photos, overrides, out):
    """`start_or_resume` in a child process; writes its log to a file."""

    def log(line):
        with out.with_suffix(".log").open("a") as file:
            file.write(f"{line}\n")

    start_or_resume(path, photos, overrides, out, log)


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
    files = ["best.safetensors", "steps.csv"]
    files += [f"stages/{path.name}" for path in sorted((folder / "stages").glob("*.safetensors"))]
    return {
        "metrics": metrics,
        "pictures": sorted(path.name for path in folder.glob("*.png")),
        "best": json.loads((folder / "best.json").read_text()),
        **{name: (folder / name).read_bytes() for name in files},
    }


# ---- every moment of a kill


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """(settings, copies of the run folder of an uninterrupted run, its result).

    A copy is named after what the run does next: "1 rename best.json" comes before the rename of
    this file after one epoch in metrics.csv. The copies after a rename are those of the next
    moment, or of the run's end.
    """
    settings = folder_of(tmp_path_factory, SHORT, 8, "optimizer.ema=0.8")
    root = tmp_path_factory.mktemp("moments")
    run, copies = root / "run", {}

    def copy(what, path):
        path = Path(path)
        if run not in path.parents or not run.exists():
            return
        metrics = run / "metrics.csv"
        done = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        file = partial_of(path.name) or path.name.strip(".")
        file = file.removesuffix(".partial").partition(".out.")[0]
        name = f"{done} {what} {file}"
        while name in copies:
            name += ", again"
        copies[name] = shutil.copytree(run, root / str(len(copies)))

    fsync, replace, rename = os.fsync, os.replace, os.rename

    def copying_fsync(file):
        copy("flush", os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def copying_replace(source, target):
        copy("rename", source)
        replace(source, target)

    def copying_rename(source, target):
        copy("rename", source)
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", copying_fsync)
        patch.setattr(os, "replace", copying_replace)
        patch.setattr(os, "rename", copying_rename)
        start_or_resume(*settings, run)
    return settings, copies, result(run)


NAMED = (
    "0 flush best.safetensors",
    "0 rename best.json",
    "1 flush events",
    "1 flush state.safetensors",
    "1 rename state.safetensors",
    "1 flush head.safetensors",
    "1 rename state.safetensors, again",
    "3 flush all.safetensors",
    "3 rename report.html",
    "3 rename last",
)


def content(folder):
    """The files of a run folder, without those that are being written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        (p.relative_to(folder), p.read_bytes()) for p in files if not p.name.startswith(".")
    )


def resumed(moments, name, folder):
    """The result of a run that is resumed from a copy."""
    settings, copies, _ = moments
    shutil.copytree(copies[name], folder)
    for partial in folder.rglob(".*.partial"):
        if name.split()[1] == "flush" and partial.is_file():  # the kill came while it was written
            partial.write_bytes(partial.read_bytes()[: partial.stat().st_size // 2])
    start_or_resume(*settings, folder)
    return result(folder)


@pytest.mark.parametrize("name", NAMED)
def test_a_run_killed_at_a_flush_or_rename_ends_with_the_same_bits(moments, name, tmp_path):
    assert resumed(moments, name, tmp_path / "run") == moments[2]


@pytest.mark.process
def test_a_run_killed_at_any_flush_or_rename_ends_with_the_same_bits(moments, tmp_path):
    _, copies, expected = moments
    different = {content(copies[name]): name for name in (*copies, *NAMED)}
    left = [name for name in different.values() if name not in NAMED]
    assert len(left) > 12
    for number, name in enumerate(left):
        assert resumed(moments, name, tmp_path / str(number)) == expected, name


@pytest.mark.process
def test_a_run_killed_again_and_again_ends_with_the_same_bits(settings, tmp_path):
    """Each process is killed at a random time in the epoch after those that it has saved."""
    # In a forked process too: what other tests have imported here may round differently.
    whole = tmp_path / "whole"
    child = forked.start(tmp_path / "uninterrupted", logging, *settings, whole)
    child.join()
    assert child.exitcode == 0
    dice, folder, finished = random.Random(20), tmp_path / "run", []
    for number in itertools.count():
        log = folder.with_suffix(".log")
        log.write_text("")
        child = forked.start(tmp_path / str(number), logging, *settings, folder)
        before = epochs(folder)
        seen = [time.monotonic()]
        while child.is_alive() and len(seen) <= 2:
            time.sleep(0.01)
            seen += [time.monotonic()] * (log.read_text().count(" accuracy ") - len(seen) + 1)
        child.join(dice.uniform(0, seen[-1] - seen[-2]) if len(seen) > 2 else None)
        child.kill()
        child.join()
        if child.exitcode == 0 or not (folder / LAST_FOLDER).exists():  # killed after its end
            break
        assert child.exitcode == -9, (tmp_path / str(number) / "stderr").read_text()
        finished.append(epochs(folder))
        assert finished[-1] > before
    assert len(finished) >= 2
    assert result(folder) == result(whole)


# ---- interrupts and errors


def stopped(path, photos, overrides, out):
    """Interrupt a run in the second epoch of its stage "tail"; returns the folder and the log."""
    original, lines = epoch.train_epoch, []

    def stop(classifier, stage, *rest):
        if stage.name == "tail" and rest[3] == 1:
            raise KeyboardInterrupt
        return original(classifier, stage, *rest)

    recipe = load.read(path, overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(recipe, photos, out=out, device="cpu", log=lines.append)
    return out, lines


@pytest.fixture(scope="module")
def stopped_run(settings, tmp_path_factory):
    return stopped(*settings, tmp_path_factory.mktemp("stopped") / "run")


@pytest.fixture
def interrupted(stopped_run, tmp_path):
    """A copy of a run that was interrupted in its second stage."""
    return shutil.copytree(stopped_run[0], tmp_path / "stopped")


def moved(folder, photos):
    """Write another folder of photos into the run's description, as if they had been there."""
    path = folder / RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "root": str(photos)}))


def test_an_interrupt_saves_finished_epochs_and_logs_the_resume_command(
    stopped_run, interrupted, uninterrupted
):
    folder, lines = stopped_run
    assert lines[-1] == (
        f"interrupted: 3 finished epochs are saved; resume with: fledge train --resume {folder}"
    )
    messages = []
    finetune.resume(interrupted, log=messages.append)
    assert f"{interrupted}: resuming after 3 finished epochs" in messages
    assert result(interrupted) == uninterrupted
    assert all(f"stages/{name}.safetensors" in uninterrupted for name in STAGE_NAMES)
    finetune.resume(interrupted, log=messages.append)
    assert "is finished already" in messages[-1]


def test_only_epochs_on_disk_are_counted_as_saved(settings, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    original, lines = stages._save_state, []
    saves = iter([original, original, stop])
    monkeypatch.setattr(stages, "_save_state", lambda *given: next(saves)(*given))
    path, photos, overrides = settings
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        finetune.run(load.read(path, overrides), photos, out=out, device="cpu", log=lines.append)
    (count,) = (int(line.split()[1]) for line in lines if line.startswith("interrupted: "))
    assert count == epochs(out) == 2


def test_a_run_without_resume_state_and_report_is_an_error(interrupted):
    shutil.rmtree(interrupted / LAST_FOLDER)
    with pytest.raises(DataError, match="last/ is missing, and the run is not finished; start a n"):
        finetune.resume(interrupted, log=_quiet)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_state_of_every_optimizer_is_resumed(kind, recipe, photos, tmp_path):
    stage = '[[stage]]\nname = "tail"\nunfreeze = "all"\nlr = 0.01\ncycle_len = 3\n'
    own = recipe(stage), str(photos), (f"optimizer.kind={kind}", "optimizer.momentum=0")
    folder, _ = stopped(*own, tmp_path / "stopped")
    finetune.resume(folder, log=_quiet)
    start_or_resume(*own, tmp_path / "uninterrupted")
    assert result(folder) == result(tmp_path / "uninterrupted")


def test_averages_of_layers_that_a_later_stage_freezes_are_resumed(
    recipe, photos, weights, tmp_path
):
    """Averages of layers that an earlier stage trained still approach the frozen weights."""
    stages = """
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.01
cycle_len = 1
[[stage]]
name = "tail"
lr = 0.01
cycle_len = 2
"""
    request = recipe(stages), str(photos), ("optimizer.ema=0.98", f"weights={weights}")
    folder, _ = stopped(*request, tmp_path / "stopped")
    finetune.resume(folder, log=_quiet)
    start_or_resume(*request, tmp_path / "uninterrupted")
    for name in ("metrics.csv", "best.json"):
        assert _without_times(folder / name) == _without_times(tmp_path / "uninterrupted" / name)


def _without_times(path):
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


def test_a_run_is_resumed_with_moved_photos(interrupted, settings, tmp_path):
    moved(interrupted, tmp_path / "nowhere")
    with pytest.raises(DataError):
        finetune.resume(interrupted, log=_quiet)
    elsewhere = shutil.copytree(settings[1], tmp_path / "elsewhere")
    finetune.resume(interrupted, root=elsewhere, log=_quiet)
    info = checkpoint.read_info(interrupted / "best.json")
    assert info.data["root"] == str(elsewhere)
    assert evaluate.evaluate(interrupted).accuracy == info.metrics["accuracy"]


def test_changed_photos_are_an_error(interrupted, settings, tmp_path):
    photos = shutil.copytree(settings[1], tmp_path / "photos")
    moved(interrupted, photos)
    victim = next((photos / "red").iterdir())
    victim.write_bytes((photos / "blue" / "1.jpg").read_bytes() + b"more")
    with pytest.raises(DataError, match="have changed since the run was started"):
        finetune.resume(interrupted, log=_quiet)


def test_missing_and_damaged_files_are_errors(interrupted, tmp_path):
    with pytest.raises(DataError, match=r"run\.json is missing.*start it with fledge train"):
        finetune.resume(tmp_path / "nothing", log=_quiet)
    (interrupted / "last" / resume_state.STATE_FILE).write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"can't be read.*start the run again"):
        finetune.resume(interrupted, log=_quiet)


def test_an_out_folder_with_a_run_is_an_error_that_names_resume(interrupted, settings):
    path, photos, overrides = settings
    with pytest.raises(OptionError, match=f"--resume {interrupted}"):
        finetune.run(load.read(path, overrides), photos, out=interrupted, log=_quiet)


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
