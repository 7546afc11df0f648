"""Data-parallel training: gloo on a CPU, in two processes with the environment of torchrun."""

import csv
import json

import pytest
import torch

import fledge
from serving.errors import DataError
from serving.utils import progress
from tests.training.conftest import coloured, recipe_text, small_network
from tests.training.distributed import worker
from tests.training.engine.test_resume import result
from tests.training.forked import two_processes
from training.config import load
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.distributed.torchrun import init_process_group, sync_batchnorms
from training.engine import finetune
from training.models.classifier import create_classifier
from training.run import checkpoint


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with photos, and weights with trained BatchNorm statistics."""
    root = tmp_path_factory.mktemp("distributed")
    coloured(root / "photos", {"blue": 28, "green": 28, "red": 28})
    torch.manual_seed(0)
    network = small_network().train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(16, 3, 32, 32))
    torch.save(network.state_dict(), root / "w.pth")
    return root


def write(setting, name, stages, *overrides):
    """(recipe file, overrides of all its runs)."""
    path = setting / f"{name}.toml"
    path.write_text(recipe_text(stages))
    return path, (f"weights={setting / 'w.pth'}", "data.valid=0.5", *overrides)


def rows(folder, name):
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def run_two(folder, *words, fault=None):
    """Run a command in two processes; returns (both ended processes, the lines of their stderr).

    With a fault the command is run by `worker`, and each process has notes: see `notes`.
    """
    words = [str(word) for word in words]
    if fault is None:
        done = two_processes(folder, _command, *words)
    else:
        folder.mkdir()
        done = two_processes(folder, worker.main, fault, str(folder), *words)
    return done, [line for one in done for line in one.stderr.splitlines() if line]


def _command(*words):
    return fledge.main(words)


def ended_well(done):
    assert [one.status for one in done] == [0, 0], done


def notes(folder):
    """The lines that each process of a run with a fault has noted."""
    return [(folder / f"{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]


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


def test_an_error_in_all_processes_is_reported_once(setting):
    path, overrides = write(setting, "wrong", EQUAL, *EXACT)
    words = ("train", path, "--data", setting / "photos", *overrides)
    done, lines = run_two(setting / "both", *words, "batch_size=3")
    assert [one.status for one in done] == [2, 2]
    assert lines == [
        "fledge: batch_size = 3: it is split among 2 processes, with at least 2 photos each: use 4 "
        "or more, or fewer processes"
    ]


@pytest.fixture(scope="module")
def equal_runs(setting):
    """(folder of a run in one process, of the same run in two, ended processes and their lines)."""
    path, overrides = write(setting, "equal_runs", EQUAL, *EXACT)
    one, two = setting / "one", setting / "two"
    request = load.read(path, overrides)
    finetune.run(request, str(setting / "photos"), out=one, device="cpu", log=lambda line: None)
    words = ("train", path, "--data", setting / "photos", "--out", two, "--device", "cpu")
    done, lines = run_two(setting / "equal", *words, *overrides)
    ended_well(done)
    return one, two, done, lines


def test_losses_with_two_processes_equal_those_with_one(equal_runs):
    one, two, *_ = equal_runs
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
    one, two, done, lines = equal_runs
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert len(list((two / "events").iterdir())) == 1
    for name, key in (
        ("steps.csv", ("stage", "epoch", "step")),
        ("metrics.csv", ("stage", "epoch")),
    ):
        seen = [tuple(row[k] for k in key) for row in rows(two, name)]
        assert len(seen) == len(set(seen))
    assert len(lines) == len(set(lines)), lines
    assert sum(", 2 processes" in line for line in lines) == 1
    assert sum("next: fledge export" in line for line in lines) == 1
    assert [one.stdout for one in done] == ["", ""]


MOVING = """
[[stage]]
name = "head"
lr = "find"
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.005
cycle_len = 10
"""


@pytest.mark.process
def test_with_trained_batchnorms_two_processes_reach_the_accuracy_of_one(setting):
    """lr_find picks the same rate in all processes, and all have the same weights."""
    path, overrides = write(setting, "moving", MOVING, "lr_find.steps=20", "optimizer.ema=0.5")
    overrides += ("weights=none", "optimizer.kind=adamw")
    one, two = setting / "moving-one", setting / "moving-two"
    request = load.read(path, overrides)
    finetune.run(request, str(setting / "photos"), out=one, device="cpu", log=lambda line: None)
    words = ("train", path, "--data", setting / "photos", "--out", two, "--device", "cpu")
    done, _ = run_two(setting / "moving", *words, *overrides, fault="none")
    ended_well(done)
    first, second = notes(setting / "moving")
    assert len(first) == 12  # one curve and eleven epochs
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
cycle_len = 2
batchnorm = "train"
augment = { mixup = 0.4 }
[[stage]]
name = "tail"
lr = 0.01
"""
STATE_OVERRIDES = ("data.valid=0.75", "batch_size=9", "optimizer.ema=0.8", "head.dropout=0.5")


@pytest.fixture(scope="module")
def reference_run(setting):
    """(command, folder) of an uninterrupted run in two processes."""
    path, overrides = write(setting, "states", STATES, *STATE_OVERRIDES)
    words = ("train", path, "--data", setting / "photos", "--device", "cpu", *overrides)
    done, _ = run_two(setting / "states", *words, "--out", setting / "reference_run")
    ended_well(done)
    return words, setting / "reference_run"


def test_a_killed_run_is_resumed_to_the_same_bits(reference_run, setting):
    words, reference = reference_run
    folder = setting / "killed"
    done, _ = run_two(setting / "kill", *words, "--out", folder, fault="kill")
    assert [one.status for one in done] == [-9, -9]
    assert len(rows(folder, "metrics.csv")) == 2
    done, lines = run_two(setting / "resumed", "train", "--resume", folder)
    ended_well(done)
    assert sum("resuming after 2 finished epochs" in line for line in lines) == 1
    assert result(folder) == result(reference)


def test_an_error_in_one_process_ends_the_run_with_one_message(reference_run, setting):
    words, _ = reference_run
    folder = setting / "failed"
    done, lines = run_two(setting / "fail", *words, "--out", folder, fault="fail")
    assert [one.status for one in done] == [1, 1]
    assert done[0].stderr.splitlines() == lines[:-2]
    assert lines[-2:] == [
        "stopped: 2 finished epochs are saved; resume with: torchrun --standalone "
        f"--nproc-per-node 2 -m fledge train --resume {folder}",
        "fledge: rose.jpg can't be read any more: mend it",
    ]
    lines = []
    finetune.resume(folder, log=lines.append)  # in one process
    warning = (
        "warning: the run was started with 2 processes and continues with 1: the weights will not "
        "be bit-equal"
    )
    assert warning in lines
    assert len(rows(folder, "metrics.csv")) == 4


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
