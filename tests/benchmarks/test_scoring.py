"""The pure parts of `benchmarks/scoring/race.py`, and its way to run and weigh a command."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its modules find each other as when it runs."""
    from benchmarks.scoring import run

    return run


def row(bench: ModuleType, peer: str, setting: str, turn: int, rate: float, **values: Any) -> Any:
    """Of a job that takes a second to start and a millisecond of processor an image."""
    facts = {
        **{"images": 800, "seconds": 1 + 800 / rate, "cpu": 2.8},
        **{"short_images": 100, "short_seconds": 1 + 100 / rate, "short_cpu": 2.1},
        **{"peak": 100.0, "others": 0},
    }
    return bench.Row(peer, setting, turn, **{**facts, **values})


def test_starting_and_ending_are_no_part_of_the_rate(bench: ModuleType) -> None:
    one = row(bench, "fledge", "as it comes", 0, 200)
    assert (one.rate, one.start, one.cpu_ms) == pytest.approx((200, 1, 1))


def test_the_fastest_setting_counts_and_ratios_are_within_a_round(bench: ModuleType) -> None:
    from benchmarks.scoring.tables import Results, markdown

    rates = (90, 60, 300)
    rows = [row(bench, "fledge-fp32", "as it comes", turn, rate) for turn, rate in enumerate(rates)]
    rows += [row(bench, "timm", "slow", turn, rate) for turn, rate in enumerate((20, 20, 500))]
    rows += [
        row(bench, "timm", "fast", turn, rate, images=400, seconds=1 + 400 / rate, others=turn)
        for turn, rate in enumerate((30, 30, 60))
    ]
    assert Results(rows).fastest("timm") == "fast"
    page = markdown(rows, "int8")
    assert "| timm, fp32 | 3.00 (2.00 to 5.00) |" in page
    assert "- timm, fp32: slow: 20; **fast: 30**" in page
    # 1 s and 1,000 photos at 30 a second; 3 of 1,200 labels.
    assert "| timm | 3 | 30 | 1.0 | 34.3 |" in page
    assert "| 0.2 % |" in page


def test_only_the_like_is_a_limit(bench: ModuleType) -> None:
    from benchmarks.scoring.tables import markdown

    names = ("fledge-fp32", "limit-fp32", "torch", "fledge", "limit")
    page = markdown([row(bench, name, "x", 0, 100) for name in names], "int8")
    of_fp32, by_default = page.split("Fledge by default to each")
    assert "Fledge in fp32 to each" in of_fp32
    assert by_default.count("in-process limit") == 1
    assert "| *in-process limit*, int8 | 1.00 |" in by_default
    assert "| plain torch `DataLoader`, fp32 | 1.00 |" in by_default


def test_photos_are_spread_and_then_repeated(bench: ModuleType, tmp_path: Path) -> None:
    from benchmarks.scoring import photos as score_photos

    for number in range(10):
        path = tmp_path / "in" / str(number % 2) / f"{number}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * number)
    (tmp_path / "in" / "notes.txt").touch()
    photos = score_photos.find(tmp_path / "in")
    assert len(photos) == 10
    assert score_photos.spread(photos, 5) == photos[::2]
    assert score_photos.spread(photos, 25) == photos + photos + photos[::2]
    folder = score_photos.linked(photos, 25, tmp_path / "out")
    made = sorted(folder.iterdir())
    assert [path.resolve() for path in made] == score_photos.spread(photos, 25)
    assert score_photos.linked(photos, 25, tmp_path / "out") == folder
    with pytest.raises(SystemExit, match="no JPEG"):
        score_photos.find(tmp_path / "none")


def test_a_command_is_timed_and_weighed_with_its_children(
    bench: ModuleType, tmp_path: Path
) -> None:
    from benchmarks.scoring import processes as score_process

    code = """
import subprocess, sys, time
busy = "import time; held = bytearray(80_000_000); end = time.process_time() + 0.4\\n"
busy += "while time.process_time() < end: pass"
subprocess.run([sys.executable, "-c", busy], check=True)
print("done")
"""
    ran = score_process.run([sys.executable, "-c", code], os.environ, tmp_path / "logs" / "log")
    assert (tmp_path / "logs" / "log").read_text() == "done\n"
    assert 0.4 <= ran.cpu <= ran.seconds + 0.1
    assert ran.peak > 80
    assert ran.memory[-1][0] <= ran.seconds


def test_a_command_that_fails_is_told_and_leaves_nobody_behind(
    bench: ModuleType, tmp_path: Path
) -> None:
    from benchmarks.scoring import processes as score_process

    code = f"""
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
sys.exit("no such photo")
"""
    with pytest.raises(score_process.Failed, match=r"(?s)status 1.*no such photo"):
        score_process.run([sys.executable, "-c", code], os.environ, tmp_path / "log")
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    until = time.monotonic() + 5
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_memory_is_told_by_tenths_of_the_time(bench: ModuleType) -> None:
    from benchmarks.scoring import memory as score_memory
    from benchmarks.scoring.processes import Ran

    memory = [(at / 10, 100.0 + (20 if at == 55 else 0) + at / 10) for at in range(101)]
    assert score_memory.by_tenths(memory) == [101, 102, 103, 104, 105, 125.5, 107, 108, 109, 110]
    assert score_memory.by_tenths([(0.0, 50.0), (9.0, 60.0)])[:9] == [50.0] * 9
    page = score_memory.told(Ran(10, 20, tuple(memory)), 90, 1000)
    assert "126 MB at most, 36 MB more" in page
    assert "grew by 6 MB" in page


def test_the_programs_that_are_named_are_there(bench: ModuleType) -> None:
    from benchmarks.scoring.peers import ALL, PROGRAMS

    commands = [setting.command for peer in ALL.values() for setting in peer.settings]
    programs = [word for command in commands for word in command if word.endswith(".py")]
    assert all(Path(program).is_file() for program in programs)
    assert any(program.startswith(str(PROGRAMS)) for program in programs)
