"""`benchmarks.scoring`: rates, tables, folders of photos, and the resource usage of a command."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import PEERS_FOLDER
from benchmarks.scoring import memory, photos, processes
from benchmarks.scoring.measurement import Row
from benchmarks.scoring.peers import PEERS
from benchmarks.scoring.processes import Usage
from benchmarks.scoring.tables import Results, markdown


def row(peer: str, setting: str, number: int, rate: float, **values: Any) -> Row:
    """A job that takes 1 s to start, and 1 ms of CPU time per image."""
    fields = {
        **{"images": 800, "seconds": 1 + 800 / rate, "cpu": 2.8},
        **{"short_images": 100, "short_seconds": 1 + 100 / rate, "short_cpu": 2.1},
        **{"peak": 100.0, "others": 0},
    }
    return Row(peer, setting, number, **{**fields, **values})


def test_the_rate_excludes_start_and_end() -> None:
    one = row("fledge", "default", 0, 200)
    assert (one.rate, one.start, one.cpu_ms) == pytest.approx((200, 1, 1))


def test_tables_show_the_fastest_setting_and_ratios_within_a_round() -> None:
    rates = (90, 60, 300)
    rows = [row("fledge-fp32", "default", number, rate) for number, rate in enumerate(rates)]
    rows += [row("timm", "slow", number, rate) for number, rate in enumerate((20, 20, 500))]
    rows += [
        row("timm", "fast", number, rate, images=400, seconds=1 + 400 / rate, others=number)
        for number, rate in enumerate((30, 30, 60))
    ]
    assert Results(rows).fastest("timm") == "fast"
    page = markdown(rows, "int8")
    assert "| timm, fp32 | 3.00 (2.00 to 5.00) |" in page
    assert "- timm, fp32: slow: 20; **fast: 30**" in page
    # 1 s and 1,000 photos at 30 a second; 3 of 1,200 labels.
    assert "| timm | 3 | 30 | 1.0 | 34.3 |" in page
    assert "| 0.2 % |" in page


def test_fledge_is_compared_with_the_limit_of_its_own_precision() -> None:
    names = ("fledge-fp32", "limit-fp32", "torch", "fledge", "limit")
    page = markdown([row(name, "x", 0, 100) for name in names], "int8")
    of_fp32, by_default = page.split("Ratios of Fledge by default to each")
    assert "Ratios of Fledge in fp32 to each" in of_fp32
    assert by_default.count("in-process limit") == 1
    assert "| *in-process limit*, int8 | 1.00 |" in by_default
    assert "| plain torch `DataLoader`, fp32 | 1.00 |" in by_default


def test_photos_are_spread_evenly_and_repeated_for_more(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / "in" / str(number % 2) / f"{number}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * number)
    (tmp_path / "in" / "notes.txt").touch()
    paths = photos.find(tmp_path / "in")
    assert len(paths) == 10
    assert photos.spread(paths, 5) == paths[::2]
    assert photos.spread(paths, 25) == paths + paths + paths[::2]
    folder = photos.link(paths, 25, tmp_path / "out")
    links = sorted(folder.iterdir())
    assert [path.resolve() for path in links] == photos.spread(paths, 25)
    assert photos.link(paths, 25, tmp_path / "out") == folder
    with pytest.raises(SystemExit, match="no JPEG"):
        photos.find(tmp_path / "none")


def test_usage_of_a_command_includes_its_children(tmp_path: Path) -> None:
    code = """
import subprocess, sys, time
busy = "import time; data = bytearray(80_000_000); end = time.process_time() + 0.4\\n"
busy += "while time.process_time() < end: pass"
subprocess.run([sys.executable, "-c", busy], check=True)
print("done")
"""
    usage = processes.run([sys.executable, "-c", code], os.environ, tmp_path / "logs" / "log")
    assert (tmp_path / "logs" / "log").read_text() == "done\n"
    assert 0.4 <= usage.cpu <= usage.seconds + 0.1
    assert usage.peak > 80
    assert usage.memory[-1][0] <= usage.seconds


def test_a_failing_command_raises_and_its_children_are_killed(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
sys.exit("no such photo")
"""
    with pytest.raises(processes.Failed, match=r"(?s)status 1.*no such photo"):
        processes.run([sys.executable, "-c", code], os.environ, tmp_path / "log")
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    deadline = time.monotonic() + 5
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_memory_report_has_the_peak_of_each_tenth_of_the_time() -> None:
    samples = [(at / 10, 100.0 + (20 if at == 55 else 0) + at / 10) for at in range(101)]
    assert memory.by_tenths(samples) == [101, 102, 103, 104, 105, 125.5, 107, 108, 109, 110]
    assert memory.by_tenths([(0.0, 50.0), (9.0, 60.0)])[:9] == [50.0] * 9
    page = memory.report(Usage(10, 20, tuple(samples)), 90, 1000)
    assert "126 MB at most, 36 MB more" in page
    assert "grew by 6 MB" in page


def test_all_peer_programs_exist() -> None:
    commands = [setting.command for peer in PEERS.values() for setting in peer.settings]
    programs = [word for command in commands for word in command if word.endswith(".py")]
    assert all(Path(program).is_file() for program in programs if program[0] != "{")
    assert any(program.startswith(str(PEERS_FOLDER)) for program in programs)
