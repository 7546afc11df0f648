"""Run functions in forked child processes, so that each starts from the same imported modules."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """What a child process did.

    Attributes:
        status: Exit status of the child; 0 if `function` returned.
        value: What `function` returned, or None.
        output: What `function` printed on stdout and stderr.
        trace: Traceback of an exception that `function` did not catch, or "".
        pid: Process id of the child.
    """

    status: int
    value: Any
    output: str
    trace: str
    pid: int


def call(function: Callable[[], Any]) -> Outcome:
    """Call a function in a forked child process; its return value must be picklable."""
    read, write = os.pipe()
    gc.freeze()  # else the children's collections would copy all memory that they share
    pid = os.fork()
    if not pid:
        os.close(read)
        _run(function, write)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    _, code = os.waitpid(pid, 0)
    value, output, trace = pickle.loads(data) if data else (None, "", "")
    return Outcome(os.waitstatus_to_exitcode(code), value, output, trace, pid)


def _run(function: Callable[[], Any], pipe: int) -> None:
    status, value, trace = 0, None, ""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            value = function()
    except BaseException:
        status, trace = 1, traceback.format_exc()
    data = pickle.dumps((value, text.getvalue(), trace))
    while data:
        data = data[os.write(pipe, data) :]
    os._exit(status)
