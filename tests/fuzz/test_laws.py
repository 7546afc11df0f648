"""The laws of the fuzzer: what breaks one is found, and what breaks none is not."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import campaign, records
from tests.fuzz.guard import ROOT
from tests.fuzz.laws import Fault
from tests.fuzz.target import MAX_LENGTH, NAMES, load

# In a process of its own: the guard and the timer stay for good.
SCRIPT = """
import json, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
from serving.errors import DataError
from tests.fuzz import laws
from tests.fuzz.target import Target

laws.MAX_SECONDS, laws.GIVE_UP_SECONDS, laws.MAX_GROWTH = 0.5, 1.5, 20 * 10**6

def check(data):
    match data:
        case b"error": raise DataError("no list")
        case b"own": Path("a").write_text("a"); Path("a").rename("b"); Path("b").unlink()
        case b"import": import sqlite3
        case b"key": return {}["a"]
        case b"deep": return check_deep()
        case b"exit": sys.exit(3)
        case b"slow":
            start = time.process_time()
            while time.process_time() < start + 0.7: pass
        case b"endless":
            while True: pass
        case b"big": bytearray(b"a") * (40 * 10**6)
        case b"read": Path("/etc/passwd").read_text()
        case b"up": Path("../a").read_text()
        case b"write": Path("../a").write_text("a")
        case b"move": Path("/tmp/no-such-file").rename("a")
        case b"link": Path("c").symlink_to("/etc/passwd")
        case b"hidden":
            with suppress(BaseException): Path("/etc/passwd").read_text()
        case b"list": list(Path("/etc").iterdir())
        case b"spawn": subprocess.run(["true"])

def check_deep():
    return check_deep()

checker = laws.Checker(Target("t", check, list), Path(sys.argv[1]))
for word in sys.argv[2:]:
    fault = checker.run(word.encode())
    print(json.dumps([word, fault and fault.kind]))
"""


def kinds_of(folder: Path, *words: str) -> dict[str, str | None]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [word for word, _ in lines] == list(words)
    assert len({tuple(line) for line in lines}) == len(set(words))  # the same each time
    return dict(lines)


def test_each_law_finds_what_breaks_it_and_nothing_else(tmp_path: Path) -> None:
    allowed = ("", "error", "own", "import")
    broken = {
        **{"key": "KeyError", "deep": "RecursionError", "exit": "SystemExit"},
        **{"slow": "slow", "endless": "slow", "big": "memory"},
        **dict.fromkeys(("read", "up", "write", "move", "link", "list", "spawn"), "access"),
        "hidden": "access",
    }
    (tmp_path / "folder").mkdir()
    held = bytearray(b"a") * (200 * 10**6)  # what this process has must not hide the child's growth
    found = kinds_of(tmp_path / "folder", *allowed, *broken, *allowed)
    del held
    assert found == dict.fromkeys(allowed) | broken
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_saved_input_is_run_again_and_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"tta=1\nmultipart/form-data; boundary=b\n")
    assert campaign.replay("form", path) is None


def test_faults_of_a_process_are_read_back_and_its_input_survives_it(tmp_path: Path) -> None:
    fault = Fault("form", "KeyError", "serving/http/forms.py:parse", "'a'")
    assert records.read_faults(tmp_path) == []
    records.add_fault(tmp_path, fault, b"data")
    assert records.read_faults(tmp_path) == [fault]
    assert (tmp_path / fault.file_name).read_bytes() == b"data"
    current = records.CurrentInput(tmp_path)
    for data in (b"x" * MAX_LENGTH, b"", b"last"):
        current.set(data)
        assert records.read_current(tmp_path) == data


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("state", "checkpoint")])
def test_seeds_are_small_and_a_changed_input_depends_on_the_random_numbers_alone(name: str) -> None:
    target = load(name)
    seeds = list(target.seeds())
    assert seeds
    assert max(map(len, seeds)) <= MAX_LENGTH // 2
    changed = 0
    for number in range(40):
        seed = seeds[number % len(seeds)]
        mutate = target.mutate or (lambda rng, data: data + b"x")
        first, again = (mutate(random.Random(number), seed) for _ in range(2))
        assert first == again
        if target.repair:
            assert target.repair(target.repair(first)) == target.repair(first)
        changed += first != seed
    assert changed >= 20
