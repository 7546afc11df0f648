"""Fuzz one target in this process: `python -m tests.fuzz.worker TARGET FOLDER SECONDS SEED`.

FOLDER has the subfolders `corpus` (inputs that reached new code) and `work` (the target's folder).
A process ends at the end of its time, or by a crash, after which `tests.fuzz.campaign` starts the
next one.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import signal
import sys
from pathlib import Path

import atheris

from tests.fuzz import known, records
from tests.fuzz.laws import Checker
from tests.fuzz.target import MAX_LENGTH, Target, load

INSTRUMENTED = ["serving", "training", "python_multipart", "tarfile", "tomllib", "gzip"]
"""Packages whose branches guide the fuzzer: ours, and parsers that are written in Python."""

MAX_RESIDENT_MB = 2048
"""Memory at which libFuzzer ends the process."""
MAX_DATA = 6 * 2**30
"""Bytes that the process may allocate, so that one input can't take the machine's memory."""
HANG_SECONDS = 60
"""Wall time of one input at which libFuzzer ends the process: an endless loop in C."""

_STRUCTURED = 0.6  # share of the changes that are made by the target's `mutate`
_REPAIRED = 0.9


class Worker:
    """Passes inputs from libFuzzer to the checker, and records faults, each once."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self._folder = target, folder
        self._checker = Checker(target, folder / "work")
        self._seen = {fault.key for fault in records.read_faults(folder)}
        self._current = records.CurrentInput(folder)

    def one(self, data: bytes) -> None:
        if len(data) > MAX_LENGTH or known.skipped(self._target.name, data):
            return
        self._current.set(data)
        fault = self._checker.run(data)
        if fault is not None and fault.key not in self._seen:
            self._seen.add(fault.key)
            records.add_fault(self._folder, fault, data)

    def mutate(self, data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = None
        if self._target.mutate and rng.random() < _STRUCTURED:
            changed = self._target.mutate(rng, data)
        if changed is None or changed == data or len(changed) > limit:
            changed = atheris.Mutate(data, limit)
        if self._target.repair and rng.random() < _REPAIRED:
            repaired = self._target.repair(changed)
            changed = repaired if len(repaired) <= limit else changed
        return changed


def main() -> None:
    name, folder, seconds, seed = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    for module in ("tarfile", "gzip"):  # imported already, without instrumentation
        sys.modules.pop(module, None)
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = load(name)
        worker = Worker(target, folder)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA, MAX_DATA))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    arguments = [
        *("fuzz", f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MAX_LENGTH}"),
        *("-print_final_stats=1", f"-rss_limit_mb={MAX_RESIDENT_MB}", f"-timeout={HANG_SECONDS}"),
        *(f"-dict={words}", "-report_slow_units=100000", f"-artifact_prefix={folder}/ended-"),
        *("-close_fd_mask=3", str(folder / "corpus")),  # decoders print; libFuzzer keeps its output
    ]
    atheris.Setup(arguments, worker.one, custom_mutator=worker.mutate)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # libFuzzer keeps a handler that is there. Its own would not show the Python frames.
    faulthandler.enable((folder / records.CRASH_LOG).open("w"))
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02X}" for byte in word)


if __name__ == "__main__":
    main()
