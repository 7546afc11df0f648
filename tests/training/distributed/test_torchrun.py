"""Data-parallel training: gloo on a CPU, in processes started by torchrun."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from serving.errors import DataError
from serving.utils import progress
from tests.training.conftest import RECIPE, coloured
from tests.training.engine.test_resume import result
from training.config import load
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.distributed.torchrun import STEP_TIMEOUT, init_process_group, sync_batchnorms
from training.engine import finetune
from training.models.classifier import create_classifier
from training.run import checkpoint

ROOT = Path(__file__).parents[3]

# Runs `fledge` with a fault: a process is killed or fails; validation results are written down.
WORKER = """
import hashlib, json, os, signal, sys
import fledge
from serving.errors import WorkError
from training.engine import epoch as trainer

fault, folder = os.environ["FAULT"], os.environ["NOTES"]
rank = os.environ["RANK"]
train_epoch, validate, find_lr = trainer.train_epoch, trainer.validate, trainer.find_lr

def note(what):
    with open(f"{folder}/{rank}.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")

def epoch_with_fault(classifier, stage, recipe, optimizer, feed, epoch, *rest):
    if stage.name == "all" and epoch == 1 and fault == "fail" and rank == "1":
        raise WorkError("rose.jpg can't be read any more: mend it")
    if stage.name == "all" and epoch == 1 and fault == "kill":
        step = trainer.optimizer_step
        trainer.optimizer_step = lambda *args: (step(*args), os.kill(os.getpid(), signal.SIGKILL))
    return train_epoch(classifier, stage, recipe, optimizer, feed, epoch, *rest)

def noted_validate(classifier, *rest):
    known = hashlib.sha256()
    for value in classifier.state_dict().values():
        known.update(value.contiguous().numpy().tobytes())
    found = validate(classifier, *rest)
    note([known.hexdigest(), *found])
    return found

def noted_find_lr(*args):
    curve = find_lr(*args)
    note([curve.rates, curve.losses, curve.valley])
    return curve

trainer.train_epoch = epoch_with_fault
trainer.validate, trainer.find_lr = noted_validate, noted_find_lr
sys.exit(fledge.main(sys.argv[1:]))
"""


def torchrun(*words, **env):
    """Run a command in two processes by torchrun."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=STEP_TIMEOUT.total_seconds() / 2,  # shorter than the timeout of a hanging process
        check=False,
    )


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with photos, weights with trained BatchNorm statistics, and the worker script."""
    root = tmp_path_factory.mktemp("distributed")
    coloured(root / "photos", {"blue": 28, "green": 28, "red": 28})
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(width_mult=0.25).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(16, 3, 32, 32))
    torch.save(network.state_dict(), root / "w.pth")
    (root / "worker.py").write_text(WORKER)
    return root


def write(setting, name, stages, *overrides):
    """(recipe file, overrides of all its runs)."""
    path = setting / f"{name}.toml"
    path.write_text(RECIPE.format(stages=stages))
    return path, (f"weights={setting / 'w.pth'}", "data.valid=0.5", *overrides)


def rows(folder, name):
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def stderr_lines(done):
    """The lines on stderr."""
    return [line for line in done.stderr.splitlines() if line]


def worker(setting, folder, fault, *words):
    """(completed process of a run with a fault, notes of each of its processes)."""
    notes = folder.with_name(f"{folder.name}-notes")
    notes.mkdir(exist_ok=True)
    done = torchrun(setting / "worker.py", *words, FAULT=fault, NOTES=str(notes))
    paths = [notes / f"{rank}.jsonl" for rank in (0, 1)]
    return done, [path.read_text().splitlines() if path.exists() else [] for path in paths]


# 42 training photos in batches of 13: shards of 7 and 6 photos, and a last batch of 3, which is too
# small to be split. 42 validation photos: 32 and 10.
EQUAL = """
[[stage]]
name = "head"
lr = 0.01
cycle_len = 2
views = 2
[[stage]]
name = "all"
unfreeze = "all"
lr = { low = 0.001, high = 0.01 }
schedule = "one_cycle"
cycle_len = 2
"""
EXACT = (
    *("head.kind=linear", "head.dropout=0.0", "batch_size=13", "label_smoothing=0.1"),
    *("optimizer.ema=0.8", "optimizer.accumulate=2", "optimizer.clip_norm=1.0"),
)


@pytest.fixture(scope="module")
def equal_runs(setting):
    """(folder of a run in one process, of the same run in two, completed process of the latter)."""
    path, overrides = write(setting, "equal_runs", EQUAL, *EXACT)
    one, two = setting / "one", setting / "two"
    request = load.read(path, overrides)
    finetune.run(request, str(setting / "photos"), out=one, device="cpu", log=lambda line: None)
    words = ("train", path, "--data", setting / "photos", "--out", two, "--device", "cpu")
    done = torchrun("-m", "fledge", *words, *overrides)
    assert done.returncode == 0, done.stderr
    return one, two, done


def test_losses_with_two_processes_equal_those_with_one(equal_runs):
    one, two, _ = equal_runs
    for name, columns in {
        "steps.csv": ("loss",),
        "metrics.csv": ("train_loss", "valid_loss"),
    }.items():
        expected, found = rows(one, name), rows(two, name)
        assert len(expected) == len(found) == (8 if name == "steps.csv" else 4)
        for a, b in zip(expected, found, strict=True):
            for column in columns:
                assert float(b[column]) == pytest.approx(float(a[column]), rel=1e-5)
            same = set(a) - set(columns) - {"seconds"}
            assert {key: a[key] for key in same} == {key: b[key] for key in same}
    ours, theirs = (checkpoint.load(folder)[0].state_dict() for folder in (one, two))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-6), name


def test_only_one_process_writes_files_and_log_lines(equal_runs):
    one, two, done = equal_runs
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert len(list((two / "events").iterdir())) == 1
    for name, key in (
        ("steps.csv", ("stage", "epoch", "step")),
        ("metrics.csv", ("stage", "epoch")),
    ):
        seen = [tuple(row[k] for k in key) for row in rows(two, name)]
        assert len(seen) == len(set(seen))
    lines = stderr_lines(done)
    assert len(lines) == len(set(lines)), done.stderr
    assert sum(", 2 processes" in line for line in lines) == 1
    assert sum("next: fledge export" in line for line in lines) == 1
    assert done.stdout == ""


MOVING = """
[[stage]]
name = "head"
lr = "find"
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.001
cycle_len = 6
"""


def test_with_trained_batchnorms_two_processes_reach_the_accuracy_of_one(setting):
    """lr_find picks the same rate in all processes, and all have the same weights."""
    network = ("arch=resnet18", "arch_args={}", "weights=none", "optimizer.kind=adamw")
    path, overrides = write(setting, "moving", MOVING, "lr_find.steps=30", "optimizer.ema=0.5")
    overrides += network
    one, two = setting / "moving-one", setting / "moving-two"
    request = load.read(path, overrides)
    finetune.run(request, str(setting / "photos"), out=one, device="cpu", log=lambda line: None)
    words = ("train", path, "--data", setting / "photos", "--out", two, "--device", "cpu")
    done, (first, second) = worker(setting, two, "none", *words, *overrides)
    assert done.returncode == 0, done.stderr
    assert len(first) == 8  # one curve and seven epochs
    assert first == second
    picked = json.loads(first[0])[2]
    assert float(rows(two, "steps.csv")[0]["lr"].split()[-1]) == pytest.approx(picked)
    a, b = (float(rows(folder, "metrics.csv")[-1]["accuracy"]) for folder in (one, two))
    # Two standard errors of the difference of two accuracies on 42 photos.
    p = min(max((a + b) / 2, 0.1), 0.9)
    assert abs(a - b) <= 2 * (2 * p * (1 - p) / 42) ** 0.5, (a, b)
    assert b > 0.8


# Everything with a state in each process: dropout masks, BatchNorm statistics, averages.
STATES = """
[[stage]]
name = "head"
cycle_len = 1
lr = 0.02
views = 2
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.02
cycle_len = 3
batchnorm = "train"
augment = { mixup = 0.4 }
[[stage]]
name = "tail"
lr = 0.01
"""
STATE_OVERRIDES = ("batch_size=9", "optimizer.ema=0.8", "head.dropout=0.5")


@pytest.fixture(scope="module")
def reference_run(setting):
    """(command, folder) of an uninterrupted run in two processes."""
    path, overrides = write(setting, "states", STATES, *STATE_OVERRIDES)
    words = ("train", path, "--data", setting / "photos", "--device", "cpu", *overrides)
    done = torchrun("-m", "fledge", *words, "--out", setting / "reference_run")
    assert done.returncode == 0, done.stderr
    return words, setting / "reference_run"


def test_a_killed_run_is_resumed_to_the_same_bits(reference_run, setting):
    words, reference = reference_run
    folder = setting / "killed"
    done, _ = worker(setting, folder, "kill", *words, "--out", folder)
    assert done.returncode != 0
    assert len(rows(folder, "metrics.csv")) == 2
    done = torchrun("-m", "fledge", "train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert sum("resuming after 2 finished epochs" in line for line in stderr_lines(done)) == 1
    assert result(folder) == result(reference)


def test_an_error_in_one_process_ends_the_run_with_one_message(reference_run, setting):
    words, _ = reference_run
    folder = setting / "failed"
    done, _ = worker(setting, folder, "fail", *words, "--out", folder)
    assert done.returncode != 0
    ours = [
        line
        for line in stderr_lines(done)
        if line.startswith(("fledge:", "stopped:", "interrupted:"))
    ]
    assert ours == [
        "stopped: 2 finished epochs are saved; resume with: torchrun … -m fledge train "
        f"--resume {folder}",
        "fledge: rose.jpg can't be read any more: mend it",
    ]
    lines = []
    finetune.resume(folder, log=lines.append)  # in one process
    warning = (
        "warning: the run was started with 2 processes and continues with 1: the weights will not "
        "be bit-equal"
    )
    assert warning in lines
    assert len(rows(folder, "metrics.csv")) == 5


def test_an_error_in_all_processes_is_reported_once(setting):
    path, overrides = write(setting, "wrong", EQUAL, *EXACT)
    words = ("-m", "fledge", "train", path, "--data", setting / "photos", *overrides)
    done = torchrun(*words, "batch_size=3")
    assert [line for line in stderr_lines(done) if "fledge:" in line] == [
        "fledge: batch_size = 3: it is split among 2 processes, with at least 2 photos each: use 4 "
        "or more, or fewer processes"
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("photos", [2, 3, 4, 5, 15, 16, 17, 33])
def test_shards_make_up_a_batch_and_their_weighted_losses_its_mean(size, photos):
    index, values = torch.arange(photos) * 10, torch.rand(photos, dtype=torch.float64)
    parts = [ProcessGroup(rank, size).shard(index) // 10 for rank in range(size)]
    assert all(len(part) >= 2 for part in parts)
    if photos >= 2 * size:
        assert sorted(torch.cat(parts).tolist()) == list(range(photos))
    weighted = [values[p].mean() * ProcessGroup(0, size).loss_weight(len(p), photos) for p in parts]
    assert torch.stack(weighted).mean().item() == pytest.approx(values.mean().item(), rel=1e-12)


def test_a_single_process_copies_and_wraps_nothing(tmp_path):
    net, values = torch.nn.Linear(2, 2), torch.ones(3)
    assert SINGLE_PROCESS.wrap(net) is net
    assert SINGLE_PROCESS.total(values) is values
    assert SINGLE_PROCESS.mean(values) is values
    assert SINGLE_PROCESS.global_loss(values, 3) is values
    with SINGLE_PROCESS.broadcast_files(tmp_path, ("a",)) as here:
        assert here == tmp_path
    with init_process_group() as process_group:
        assert process_group is SINGLE_PROCESS


def test_sync_batchnorms_replaces_all_but_frozen_ones():
    torch.manual_seed(0)
    classifier = create_classifier("mobilenet_v2", 3, arch_args={"width_mult": 0.25})
    classifier.freeze(2)
    images = torch.randn(2, 3, 32, 32)
    before = classifier.eval()(images)
    keys, prefix = list(classifier.state_dict()), classifier.freezing.prefix
    tensors = {k: v.data_ptr() for k, v in classifier.state_dict().items()}
    sync_batchnorms(classifier)
    assert list(classifier.state_dict()) == keys
    assert {k: v.data_ptr() for k, v in classifier.state_dict().items()} == tensors
    assert torch.equal(classifier.eval()(images), before)
    kinds = [
        {type(m).__name__ for m in part.modules() if "BatchNorm" in type(m).__name__}
        for part in (classifier.body[:prefix], classifier.body[prefix:], classifier.head)
    ]
    assert kinds == [{"BatchNorm2d"}, {"SyncBatchNorm"}, {"SyncBatchNorm"}]
    classifier.train()
    held = [name for name in classifier.freezing.eval_modules if name.startswith(f"{prefix}")]
    assert not any(classifier.body.get_submodule(name).training for name in held)


def test_a_difference_between_processes_is_named(monkeypatch):
    monkeypatch.setattr(
        ProcessGroup, "broadcast_object", lambda self, choose: {"the recipe": "other"}
    )
    with pytest.raises(
        DataError, match=r"the recipe on .* \(process 1\) is not what process 0 has"
    ):
        ProcessGroup(1, 2).check_same({"the recipe": "own"})


def test_only_the_first_process_shows_progress_bars(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for rank, visible in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert progress.progress_bar().disable is not visible
