"""Sweep the faults of jobs by hand.

`python -m tests.faults score-csv` sweeps a job and prints what it found; without a name it lists
the jobs. `--all` fails each operation with each error number; without it, the error number changes
from operation to operation. `--operations` lists a job's operations with their numbers.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.faults.jobs import JOBS, create
from tests.faults.sweep import Sweep, sweep


def main() -> None:
    """Sweep jobs by hand, or those that a test names on stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--all", action="store_true", help="each operation with each error number")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="each N-th operation")
    parser.add_argument("--kinds", default="errors,kills", help="default: errors,kills")
    parser.add_argument("--operations", action="store_true", help="only list the operations")
    parser.add_argument("--serve", action="store_true", help="sweep the jobs named on stdin")
    options = parser.parse_args()
    for line in sys.stdin if options.serve else ():
        name, step = line.split()
        report = sweep(name, create(name), step=int(step), every_error=options.all)
        print(json.dumps(asdict(report)), flush=True)
    if not (options.jobs or options.serve):
        print(*JOBS, sep="\n")
    for name in options.jobs:
        if options.operations:
            _list_operations(name)
            continue
        report = sweep(
            name,
            create(name),
            step=options.step,
            every_error=options.all,
            kinds=options.kinds.split(","),
        )
        values = asdict(report)
        print(*values.pop("found"), values, sep="\n", flush=True)


def _list_operations(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Sweep(name, create(name), Path(folder).resolve())
        run.start()
        for number, (kind, path) in enumerate(run.operations):
            print(number, kind, path)


if __name__ == "__main__":
    main()
