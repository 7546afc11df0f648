"""Write log lines in a thread, from a bounded queue, so that logging never stops the service.

A log that goes to a pipe blocks its writer as soon as the pipe is full and its reader has stopped
reading. `QueueHandler` only puts a line into a queue; a thread writes it. When the queue is full,
lines are dropped and counted, and a line in the log says how many.

Libraries in C print to stderr themselves. `unblock_stderr` makes such a write fail where it would
block: what finds no room is lost, and the rest, such as the message of an abort, is where stderr
is.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

MAX_LINES: Final = 10_000
"""Largest number of lines that wait."""
MAX_BYTES: Final = 4 * 2**20
"""Largest size of the lines that wait."""
MAX_LINE: Final = 65_536
"""Bytes after which a line is cut; tracebacks are a few thousand."""
GATHER_SECONDS: Final = 0.02
"""Time in which lines are gathered for one write. A write, and the switch to the thread and back,
for each line would cost a request more than all else that it needs apart from the model."""
FLUSH_SECONDS: Final = 1.0
"""Time for which the end of the process waits for the lines that are left."""
_POLL_MS: Final = 1000
_STDERR: Final = 2


class LogWriter:
    """A thread that writes lines to a file descriptor, and the queue in front of it.

    Attributes:
        dropped: Number of lines that were dropped since the start.
    """

    def __init__(self, descriptor: int) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition(threading.Lock())
        self._idle = True
        threading.Thread(target=self._run, name="fledge-log", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Take a line, or drop and count it."""
        with self._changed:
            if len(self._lines) >= MAX_LINES or self._bytes + len(line) > MAX_BYTES:
                self.dropped += 1
                _count_dropped()
                return
            self._lines.append(line)
            self._bytes += len(line)
            if self._idle:
                self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until all lines are written, at most for a time."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle and not self._lines, seconds)

    def _run(self) -> None:
        told = 0
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines)
                self._idle = False
            time.sleep(GATHER_SECONDS)
            with self._changed:
                data = b"".join(self._lines)
                self._lines.clear()
                self._bytes = 0
                dropped = self.dropped
            _write(self._descriptor, data)
            if dropped > told:
                _write(self._descriptor, _dropped_line(dropped - told))
                told = dropped


def _dropped_line(count: int) -> bytes:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"time": now, "code": "log-dropped", "lines": count}).encode() + b"\n"


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # `unblock_stderr`, or another process that has the pipe
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll(_POLL_MS)
        except OSError:  # the reader is gone: nothing can be written any more
            return


class QueueHandler(logging.Handler):
    """A handler that formats a record and gives the line to a `LogWriter`."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace")
        except Exception:  # a record whose arguments don't fit its text
            self.handleError(record)
            return
        self._writer.put(line[:MAX_LINE] + b"\n")

    def createLock(self) -> None:
        """Use no lock: the queue has one."""
        self.lock = None


_writers: dict[int, LogWriter] = {}
_count_dropped: Callable[[], object] = lambda: None  # noqa: E731


def handler(stream: Any) -> logging.Handler | None:
    """Return a handler that writes to a text stream in a thread; None for one without a file."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return QueueHandler(_writer(descriptor))


def _writer(descriptor: int) -> LogWriter:
    if descriptor not in _writers:
        if not _writers:
            atexit.register(flush)
        _writers[descriptor] = LogWriter(descriptor)
    return _writers[descriptor]


def flush(seconds: float = FLUSH_SECONDS) -> None:
    """Wait until all lines are written, at most for a time."""
    until = time.monotonic() + seconds
    for writer in _writers.values():
        writer.flush(max(0.0, until - time.monotonic()))


def on_drop(count: Callable[[], object]) -> None:
    """Call `count` for each line that is dropped from now on."""
    global _count_dropped
    _count_dropped = count


def _restart_after_fork() -> None:
    for descriptor, writer in _writers.items():  # a fork copies no threads
        LogWriter.__init__(writer, descriptor)


os.register_at_fork(after_in_child=_restart_after_fork)


def install() -> None:
    """Make all handlers that write to stdout or stderr write in a thread, and `unblock_stderr`.

    Handlers of other kinds, and streams to other files, are left as they are.
    """
    unblock_stderr()
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for old in getattr(logger, "handlers", ()):
            if type(old) is not logging.StreamHandler or old.stream not in _standard_streams():
                continue
            new = handler(old.stream)
            if new is not None:
                new.setFormatter(old.formatter)
                new.setLevel(old.level)
                new.filters = list(old.filters)
                logger.removeHandler(old)  # type: ignore[union-attr]
                logger.addHandler(new)  # type: ignore[union-attr]


def unblock_stderr() -> None:
    """Make writes to the file descriptor of stderr fail where they would block.

    The descriptor is opened anew, because other processes have the open file too, such as the shell
    in the same terminal, and would find it changed. A socket can't be opened anew, nor can a pipe
    of another user: these are changed, and a terminal is left as it is then.
    """
    try:
        mode = os.fstat(_STDERR).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)):
            return  # a file never blocks
        flags = fcntl.fcntl(_STDERR, fcntl.F_GETFL)
        if flags & os.O_NONBLOCK:
            return
    except OSError:  # closed
        return
    try:
        if not sys.platform.startswith("linux"):  # elsewhere it is the same open file
            raise OSError
        flags = flags & os.O_APPEND | os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(f"/proc/self/fd/{_STDERR}", flags)
    except OSError:
        if not stat.S_ISCHR(mode):
            os.set_blocking(_STDERR, False)
        return
    os.dup2(descriptor, _STDERR)
    os.close(descriptor)


def _standard_streams() -> tuple[Any, ...]:
    return (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
