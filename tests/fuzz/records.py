"""Files by which a fuzzing process tells `tests.fuzz.campaign` what it found.

faults.jsonl     one line for each fault
KIND-...         the input of each fault
current          the input that is being run; it survives a crash or a kill
crash.log        Python frames at a crash
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from tests.fuzz.laws import Fault
from tests.fuzz.target import MAX_LENGTH

CRASH_LOG = "crash.log"
_FAULTS = "faults.jsonl"
_CURRENT = "current"
_HEAD = 4  # bytes of the input's length, which stand before it


def read_faults(folder: Path) -> list[Fault]:
    path = folder / _FAULTS
    lines = path.read_text().splitlines() if path.exists() else []
    return [Fault(**json.loads(line)) for line in lines]


def add_fault(folder: Path, fault: Fault, data: bytes) -> None:
    (folder / fault.file_name).write_bytes(data)
    with (folder / _FAULTS).open("a") as file:
        file.write(json.dumps(vars(fault)) + "\n")


class CurrentInput:
    """Keeps the input that is being run in a memory-mapped file, which costs no system call."""

    def __init__(self, folder: Path) -> None:
        with (folder / _CURRENT).open("w+b") as file:
            file.truncate(_HEAD + MAX_LENGTH)
            self._map = mmap.mmap(file.fileno(), 0)

    def set(self, data: bytes) -> None:
        self._map[: _HEAD + len(data)] = len(data).to_bytes(_HEAD, "little") + data


def read_current(folder: Path) -> bytes:
    data = (folder / _CURRENT).read_bytes()
    return data[_HEAD : _HEAD + int.from_bytes(data[:_HEAD], "little")]
