"""Each file operation of a job fails once, and the process ends once before it.

After every fault the old result is whole or the new one is, the exit status and the one line of
error are right, and the job run again ends with the same result and no other files.

The environment variable FLEDGE_FAULTS is for runs by hand: "every" takes every operation also of
the jobs in `STEPS`, "all" fails every operation with each of the three error numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.jobs import JOBS

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
FAULTS = os.environ.get("FLEDGE_FAULTS", "")
STEPS = {
    **{"train": 3, "resume": 4, "export": 3, "export-first": 6},
    **{"score-parquet": 2, "score-folder": 2, "score-copy": 2, "score-restart": 3},
    "pixels-evict": 2,
}
"""Jobs that take long or have the operations of other jobs: 3 is every third operation."""


@pytest.fixture(scope="module")
def sweeper():
    """A process that sweeps the jobs whose names it reads; it imports what they need once."""
    # The thousands of forked children would write a file of coverage data each.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-m", "tests.faults", "--serve"]
    if FAULTS == "all":
        command.append("--all")
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("job", JOBS)
def test_every_fault_of_a_job_leaves_a_whole_result_and_a_job_that_can_run_again(
    sweeper, job, record_property
):
    step = 1 if FAULTS else STEPS.get(job, 1)
    print(job, step, file=sweeper.stdin, flush=True)
    report = json.loads(sweeper.stdout.readline())
    assert report.pop("job") == job
    found = report.pop("found")
    for name, value in report.items():
        record_property(name, value)
    print(job, report)
    assert report["errors"] >= report["operations"] // step > 0
    assert report["kills"] > 0
    assert not found, "\n".join(found)
