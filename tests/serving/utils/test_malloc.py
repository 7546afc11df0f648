"""Memory that glibc keeps after a free, measured in a separate process."""

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

if sys.argv[1] == "fixed":
    malloc.return_large_blocks()
large = bytearray(30 * 2**20)  # freeing it raises the threshold
del large
before, small = resident(), []
for _ in range(10):
    photos = [bytearray(b"x") * (6 * 2**20) for _ in range(8)]
    small.append([bytes(2000) for _ in range(100)])  # allocated after them on the heap
    del photos
print(resident() - before)
"""


def grown(setting: str) -> float:
    command = [sys.executable, "-c", CODE, setting]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_blocks_are_returned_to_the_system():
    assert grown("fixed") < 12
    assert grown("default") > 24  # the default must be worse, or the setting is useless
