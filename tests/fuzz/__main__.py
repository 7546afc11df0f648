"""Coverage-guided fuzzing of everything that parses input.

    python -m tests.fuzz --list
    python -m tests.fuzz tar --seconds 60
    python -m tests.fuzz --all --seconds 20 --jobs 2
    python -m tests.fuzz tar --replay build/fuzz/tar/FILE

Laws for each input of at most 64 KB: no exception but those of `serving.errors`; at most 1 s of CPU
time and 300 MB of memory; no file outside of the target's folder is opened, and no process
started. An input that breaks one is saved; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import resource
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.fuzz import campaign
from tests.fuzz.guard import ROOT
from tests.fuzz.target import NAMES, load

_MAX_DATA = 8 * 2**30


def main() -> int:
    options = _parser().parse_args()
    if options.list:
        print("\n".join(NAMES))
        return 0
    if options.write_seeds:
        return _write_seeds(options.targets[0], options.write_seeds)
    if options.run:
        return _run_here(options.targets[0], Path(options.run[0]), Path(options.run[1]))
    if options.replay:
        return _replay(options.targets, options.replay)
    names = NAMES if options.all else tuple(dict.fromkeys(options.targets))
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        print(f"no target {unknown[0]!r}" if unknown else "name a target, or --all", end="; ")
        print(f"there are {', '.join(NAMES)}")
        return 2
    if importlib.util.find_spec("atheris") is None:
        print("Atheris is not installed; `make fuzz` installs it (on Linux, its only platform)")
        return 2
    return _fuzz(names, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--all", action="store_true", help="all targets")
    parser.add_argument("--list", action="store_true", help="print the names of the targets")
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="for each target")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="targets at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--failures", type=Path, default=ROOT / "build" / "fuzz", metavar="DIR")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one saved input")
    parser.add_argument("--write-seeds", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    return parser


def _fuzz(names: tuple[str, ...], options: argparse.Namespace) -> int:
    def one(name: str) -> campaign.Result:
        return campaign.fuzz(name, options.seconds, options.seed, options.failures, _log)

    results = []
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        for done in as_completed([pool.submit(one, name) for name in names]):
            results.append(done.result())
            _log(str(results[-1]))
    results.sort(key=lambda result: names.index(result.target))
    _log("")
    for result in results:
        _log(str(result))
        for fault, path in result.faults:
            _log(f"    {fault.kind} in {fault.place}: {path}")
    faults = sum(len(result.faults) for result in results)
    total = sum(result.executions for result in results)
    cpu = sum(result.cpu for result in results)
    _log(f"{len(results)} targets, {total} executions, {cpu:.0f} s of CPU time, {faults} faults")
    return 1 if faults or any(result.failure for result in results) else 0


def _log(line: str) -> None:
    print(line, flush=True)


def _write_seeds(name: str, folder: Path) -> int:
    for data in load(name).seeds():
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return 0


def _run_here(name: str, path: Path, folder: Path) -> int:
    """Run one input in this process; `campaign.replay` reads the output."""
    from tests.fuzz.laws import MEMORY, SLOW, Checker

    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_DATA, _MAX_DATA))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (campaign.CPU_SECONDS, campaign.CPU_SECONDS + 5))
    data = path.read_bytes()
    checker = Checker(load(name), folder)
    fault = checker.run(data)
    if fault and fault.kind in (SLOW, MEMORY):
        fault = checker.run(data)  # the first input of a process also pays for late imports
    line = f"FAULT {json.dumps(vars(fault))}" if fault else "HELD"
    print(line, file=sys.__stdout__, flush=True)  # a target may have redirected its own output
    return 0


def _replay(names: list[str], path: Path) -> int:
    name = names[0] if names else path.absolute().parent.name
    if name not in NAMES:
        print(f"which target? python -m tests.fuzz TARGET --replay {path}")
        return 2
    fault = campaign.replay(name, path)
    print(campaign.describe(fault) if fault else f"{name}: no fault")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
