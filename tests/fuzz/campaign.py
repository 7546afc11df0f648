"""Fuzz one target for some time: start processes, restart them after crashes, verify the faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz import records
from tests.fuzz.guard import ROOT
from tests.fuzz.laws import CRASH, HANG, MEMORY, PACKAGES, SLOW, Fault

CPU_SECONDS = 60
"""CPU time at which the process of one input is ended by the system."""
_REPLAY_SECONDS = 900  # wall time; a busy machine may need long to import torch
_START_SECONDS = 1800  # until a process that doesn't end is killed, beyond its time
_MAX_CRASHES = 20

_STATUS = re.compile(r"^#\d+\s.* cov: (\d+) ft: (\d+) corp: (\d+)/", re.MULTILINE)
_EXECUTED = re.compile(r"^stat::number_of_executed_units: (\d+)", re.MULTILINE)
_LAST = re.compile(r"^#(\d+)\s", re.MULTILINE)


@dataclass
class Result:
    """Result of one target.

    Attributes:
        target: Name of the target.
        executions: Number of inputs that were run.
        seconds: Wall time of the fuzzing, without the start of the processes.
        cpu: CPU seconds of all processes.
        edges, features: Coverage as libFuzzer counts it.
        corpus: Number of inputs in the corpus at the end.
        faults: Faults, with the file of the input.
        dismissed: Faults of time or memory that a fresh process did not confirm.
        failure: Why the target could not run; "" if it did.
    """

    target: str
    executions: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    edges: int = 0
    features: int = 0
    corpus: int = 0
    faults: list[tuple[Fault, Path]] = field(default_factory=list)
    dismissed: list[Fault] = field(default_factory=list)
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"{self.target:<11} {self.failure}"
        rate = self.executions / max(self.seconds, 1e-9)
        more = f", {len(self.dismissed)} not confirmed" if self.dismissed else ""
        return (
            f"{self.target:<11} {self.executions:>9} executions {rate:>7.0f}/s "
            f"{self.cpu:>6.0f} s CPU {self.edges:>6} edges {self.features:>6} features "
            f"{self.corpus:>5} inputs  {len(self.faults)} faults{more}"
        )


def fuzz(
    name: str, seconds: float, seed: int, failures: Path, log: Callable[[str], None] = print
) -> Result:
    """Fuzz a target for `seconds` of wall time, and return the result.

    Args:
        name: Name of the target.
        seconds: Time, without the start of the first process.
        seed: Seed of the fuzzer.
        failures: Folder for inputs that reveal a fault.
        log: Called with each line of output.
    """
    result = Result(name)
    with tempfile.TemporaryDirectory(prefix=f"fledge-fuzz-{name}-") as temporary:
        folder = Path(temporary)
        (folder / "corpus").mkdir()
        (folder / "work").mkdir()
        try:
            _write_seeds(name, folder / "corpus")
            _run_for(seconds, folder, seed, result, log)
        except CouldNotStart as error:
            result.failure = f"could not start: {error}"
        result.corpus = len(list((folder / "corpus").iterdir()))
        _verify(name, folder, failures, result, log)
    return result


class CouldNotStart(Exception):
    """A target can't be imported or prepared."""


def _run_for(
    seconds: float, folder: Path, seed: int, result: Result, log: Callable[[str], None]
) -> None:
    """Run processes, one after another, until the time is over."""
    left, crashes = seconds, 0
    while left >= 1 and crashes < _MAX_CRASHES:
        used, ended = _run(result.target, folder, left, seed + crashes, result)
        left -= used
        if ended is None:
            break
        crashes += 1
        log(f"{result.target}: the process ended: {ended}")
        _record_crash(result.target, folder, ended)


def _write_seeds(name: str, corpus: Path) -> None:
    # In a process of its own: building seeds may need large packages.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--write-seeds", str(corpus)],
        cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CouldNotStart(f"no seeds\n{done.stderr}")


def _environment() -> dict[str, str]:
    # One thread for each library: CPU time is a law. No telemetry: the network is out of bounds.
    return {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "ORT_DISABLE_TELEMETRY": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONFAULTHANDLER": "1",
    }


def _run(
    name: str, folder: Path, seconds: float, seed: int, result: Result
) -> tuple[float, str | None]:
    """Run one process. Returns the seconds that it fuzzed, and how it ended; None: in time."""
    output = folder / "log"
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(folder)]
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, str(max(1, round(seconds))), str(seed)],
            cwd=ROOT, env=_environment(), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        status, usage, fuzzed = _wait(process, output, seconds)
    text = output.read_text(errors="replace")
    result.cpu += usage
    result.seconds += fuzzed
    counted = _EXECUTED.findall(text) or _LAST.findall(text) or ["0"]
    result.executions += int(counted[-1])
    for edges, features, _ in _STATUS.findall(text)[-1:]:
        result.edges = max(result.edges, int(edges))
        result.features = max(result.features, int(features))
    if status == 0:
        return seconds, None
    if "INFO: Seed" not in text:
        raise CouldNotStart(text[-3000:])
    return max(1.0, fuzzed), _reason(status, text)


def _wait(
    process: subprocess.Popen[bytes], output: Path, seconds: float
) -> tuple[int, float, float]:
    """Wait for a process: exit status, CPU seconds, seconds since it began to fuzz."""
    started = time.monotonic()
    begun: float | None = None
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if begun is None and "INFO: Seed" in output.read_text(errors="replace")[:100_000]:
            begun = time.monotonic()
        if pid:
            break
        if time.monotonic() - (begun or started) > seconds + _START_SECONDS:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
    fuzzed = time.monotonic() - begun if begun else 0.0
    return process.returncode, usage.ru_utime + usage.ru_stime, fuzzed


def _reason(status: int, text: str) -> str:
    for line in text.splitlines():
        if "ERROR: libFuzzer:" in line:
            return line.partition("libFuzzer: ")[2]
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _record_crash(name: str, folder: Path, ended: str) -> None:
    kind = HANG if "timeout" in ended else MEMORY if "out-of-memory" in ended else CRASH
    fault = Fault(name, kind, _place((folder / records.CRASH_LOG).read_text(), kind), ended)
    if fault.key not in {one.key for one in records.read_faults(folder)}:
        records.add_fault(folder, fault, records.read_current(folder))


def _place(log: str, default: str) -> str:
    """Return the innermost frame of our packages in the output of `faulthandler`."""
    frames = re.findall(r'File "(.*)", line \d+ in (\S+)', log)
    ours = [(file, name) for file, name in frames if file.startswith(PACKAGES)]
    if not frames:
        return default
    file, name = (ours or frames)[0]
    return f"{os.path.relpath(file, ROOT)}:{name}"


def _verify(
    name: str, folder: Path, failures: Path, result: Result, log: Callable[[str], None]
) -> None:
    """Run the input of each fault in a fresh process, without instrumentation.

    A fault of time or memory counts only if it is found again, as instrumented code is slower.
    """
    seen: set[tuple[str, str, str]] = set()
    for fault in records.read_faults(folder):
        source = folder / fault.file_name
        again = replay(name, source)
        if again is None and fault.kind in (SLOW, MEMORY, HANG):
            result.dismissed.append(fault)
            continue
        found = again or Fault(*fault.key, f"only in the fuzzing process: {fault.detail}")
        if found.key in seen:
            continue
        seen.add(found.key)
        saved = failures / name / found.file_name
        saved.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, saved)
        result.faults.append((found, saved))
        log(f"{describe(found)}\n    replay: python -m tests.fuzz {name} --replay {saved}")


def describe(fault: Fault) -> str:
    return f"{fault.target}: {fault.kind} in {fault.place}: {fault.detail}"


def replay(name: str, path: Path) -> Fault | None:
    """Run one saved input in a fresh process, and return the fault that it reveals."""
    with tempfile.TemporaryDirectory(prefix="fledge-fuzz-") as folder:
        command = [sys.executable, "-m", "tests.fuzz", name, "--run", str(path.absolute()), folder]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=_environment(), capture_output=True, text=True,
                errors="replace", timeout=_REPLAY_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Fault(name, HANG, HANG, f"not ended after {_REPLAY_SECONDS} s")
    found = re.search(r"^FAULT (.*)$", done.stdout, re.MULTILINE)
    if found:
        return Fault(**json.loads(found[1]))
    if "HELD" in done.stdout:
        return None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return Fault(name, HANG, HANG, f"ended after {CPU_SECONDS} s of CPU time")
    place = _place(done.stderr, CRASH)
    return Fault(name, CRASH, place, f"exit status {done.returncode}\n{done.stderr[-2000:]}")
