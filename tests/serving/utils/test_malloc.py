"""What glibc does with freed memory, in a process of its own."""

import subprocess
import sys

import pytest

from tests.support.live_server import ROOT

CODE = """
import sys
from serving.utils import malloc

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))

if sys.argv[1] == "steady":
    malloc.give_back()
large = bytearray(30 * 2**20)  # freeing it raises the threshold
del large
before, kept = resident(), []
for _ in range(10):
    photos = [bytearray(b"x") * (6 * 2**20) for _ in range(8)]
    kept.append([bytes(2000) for _ in range(100)])  # lie behind them on the heap
    del photos
print(resident() - before)
"""


def grown(how: str) -> float:
    command = [sys.executable, "-c", CODE, how]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_large_blocks_go_back_to_the_system():
    assert grown("steady") < 12
    assert grown("as it is") > 24  # else there is nothing to mend
