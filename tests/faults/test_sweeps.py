"""Each file operation of a job fails once, and the process ends once before it.

After every fault the old result is whole or the new one is, the exit status and the one line of
error are right, and the job run again ends with the same result and no other files. With
`FLEDGE_FAULTS=all` each operation fails with each of the three error numbers, and not with one of
them in turn.
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


@pytest.fixture(scope="module")
def sweeper():
    """A process that sweeps the jobs whose names it reads; it imports what they need once."""
    # The thousands of forked children would write a file of coverage data each.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-m", "tests.faults.sweep", "--serve"]
    if os.environ.get("FLEDGE_FAULTS") == "all":
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
    print(job, file=sweeper.stdin, flush=True)
    report = json.loads(sweeper.stdout.readline())
    for name in ("operations", "errors", "kills", "kill_runs", "seconds"):
        record_property(name, report[name])
    print({name: value for name, value in report.items() if name != "found"})
    assert report["job"] == job
    assert report["errors"] >= report["operations"] == report["kills"] > 0
    assert not report["found"], "\n".join(report["found"])
