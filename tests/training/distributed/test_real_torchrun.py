"""Two runs started by torchrun itself: one ends well, one fails in one of its processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import coloured, recipe_text
from training.distributed.torchrun import STEP_TIMEOUT

ROOT = Path(__file__).parents[3]
STAGES = """
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.01
cycle_len = 2
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command line of a run, without --out."""
    root = tmp_path_factory.mktemp("torchrun")
    coloured(root / "photos", {"blue": 10, "red": 10})
    (root / "tiny.toml").write_text(recipe_text(STAGES))
    return "train", str(root / "tiny.toml"), "--data", str(root / "photos"), "--device", "cpu"


def torchrun(*words):
    """Run a module in two processes; returns the ended process of torchrun, and its lines."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, "-m", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=STEP_TIMEOUT.total_seconds() / 2,  # shorter than the timeout of a hanging process
        check=False,
    )
    return done, done.stderr.splitlines()


@pytest.mark.process
def test_a_run_of_two_processes_started_by_torchrun_ends_well(words, tmp_path):
    done, lines = torchrun("fledge", *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert sum(", 2 processes" in line for line in lines) == 1
    assert sum("next: fledge export" in line for line in lines) == 1
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.process
def test_torchrun_ends_after_an_error_in_one_process_and_the_error_is_reported_once(
    words, tmp_path
):
    folder = tmp_path / "run"
    worker = "tests.training.distributed.worker"
    done, lines = torchrun(worker, "fail", tmp_path, *words, "--out", folder)
    assert done.returncode != 0
    ours = [line for line in lines if line.startswith(("fledge:", "stopped:", "interrupted:"))]
    assert ours == [
        "stopped: 1 finished epoch is saved; resume with: torchrun --standalone "
        f"--nproc-per-node 2 -m fledge train --resume {folder}",
        "fledge: rose.jpg can't be read any more: mend it",
    ]
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
