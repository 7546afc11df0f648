"""Exit without waiting for threads; process ids."""

import os
import subprocess
import sys

import pytest

from serving.utils.process import is_running
from tests.support.live_server import ROOT

CODE = """
import atexit, sys, threading, time
from serving.utils.process import exit_process
threading.Thread(target=time.sleep, args=(60,)).start()
atexit.register(print, "exit handler")
sys.stdout.write("text without a line break; ")
exit_process(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_exit_handlers_run_and_output_is_flushed_and_threads_are_not_waited_for(
    status: int,
) -> None:
    command = [sys.executable, "-c", CODE, str(status)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout == "text without a line break; exit handler\n"


def test_output_that_can_not_be_written_is_exit_status_1() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "0"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == "fledge: the output can't be written: Broken pipe\n"


def test_a_process_is_running_until_it_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert is_running(os.getpid())
    assert is_running(os.getppid())
    assert not is_running(ended.pid)
    assert not is_running(2**64)
