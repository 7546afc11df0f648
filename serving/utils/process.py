"""Functions about processes: how one starts and ends, and whether another runs.

`prepare` settles at the start of a command what every part of the program relies on:

    encoding         UTF-8 for paths and files, whatever the locale
    standard streams open, and never a reason to fail: see `_Output`
    current folder   exists
    cache folder     can be written to: else a folder for this user below TMPDIR
"""

from __future__ import annotations

import atexit
import codecs
import ctypes
import errno
import io
import locale
import os
import select
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

from serving.errors import OptionError
from serving.terminal import show

_PR_SET_PDEATHSIG: Final = 1

_USER_NAMES: Final = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Environment variables in which Python and other libraries look for the name of the user."""

_note: str = ""
"""What `tell_cache_folder` has to tell; "" if nothing."""


def prepare() -> None:
    """Prepare this process; it may be replaced by one with the same id.

    Raises:
        OptionError: The current folder was deleted.
    """
    opened = _open_closed_streams()
    _use_utf8()
    for name in ("stdout", "stderr"):
        _replace_output(name)
    if 0 in opened:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    _check_current_folder()
    _choose_cache_folder()


def tell_cache_folder() -> None:
    """Say on stderr, once, if caches are not where they are by default. Call this before use."""
    global _note
    line, _note = _note, ""
    if line and os.environ.get("LOCAL_RANK", "0") == "0":
        show(line, sys.stderr, flush=True)


def _open_closed_streams() -> list[int]:
    """Open /dev/null for each standard stream that is closed.

    Otherwise the next file that is opened would get the number of the stream, and receive what is
    printed.

    Returns:
        The numbers of these streams.
    """
    closed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(number, True)
    return closed


def _use_utf8() -> None:
    """Run this command anew in Python's UTF-8 mode, if paths or files have another encoding.

    The mode can only be chosen when an interpreter starts. By default, Python has it in the locales
    C and POSIX, but not in those with an encoding such as ISO-8859-1, or with PYTHONUTF8=0.
    """
    found = sys.getfilesystemencoding(), locale.getpreferredencoding(False)
    if sys.flags.utf8_mode or all(map(_is_utf8, found)) or not sys.executable:
        return
    # In this encoding, each word has the bytes that it came with.
    words = [os.fsencode(word) for word in sys.orig_argv[1:]]
    command = [os.fsencode(sys.executable), b"-X", b"utf8", *words]
    os.execve(sys.executable, command, {**os.environb, b"PYTHONUTF8": b"1"})


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


class _Output(io.FileIO):
    """A standard stream for output. What nobody can read any more is dropped.

    The reader of a pipe may end early (`| head`), and a terminal may be closed. The work goes on.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._gone = (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)

    def write(self, data: Any, /) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                if error.errno not in self._gone:
                    error.filename = "standard output" if self.fileno() == 1 else "standard error"
                    raise
                return memoryview(data).nbytes
            if written is not None:
                return written
            select.select((), (self,), ())  # a pipe that another process has made non-blocking


def _replace_output(name: str) -> None:
    """Replace `sys.stdout` or `sys.stderr` by a stream that never fails for want of a reader.

    Files and pipes get UTF-8, and a terminal the encoding of the locale, unless PYTHONIOENCODING
    sets another. Characters that the encoding lacks are written as escapes.
    """
    old = getattr(sys, name)
    number = 1 if name == "stdout" else 2
    encoding = "utf-8"
    if isinstance(old, io.TextIOWrapper) and os.environ.get("PYTHONIOENCODING"):
        encoding = old.encoding
    elif os.isatty(number) and codecs.lookup(locale.getencoding()).name != "ascii":
        encoding = locale.getencoding()
    if old is not None:
        with suppress(OSError):
            old.flush()
    lines = old is None or name == "stderr" or old.line_buffering or old.write_through
    stream = io.TextIOWrapper(
        io.BufferedWriter(_Output(number)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=lines,
    )
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise OptionError(
            "the current folder was deleted; change to one that exists, as with: cd /"
        ) from error
    except OSError:  # one of its parents can't be read; relative paths work nevertheless
        pass


def _choose_cache_folder() -> None:
    """Set HOME, XDG_CACHE_HOME and MPLCONFIGDIR where the defaults can't be used.

    A container may run under a user id without a name and without a home, or with a home that can't
    be written to. Caches then go to a folder below TMPDIR.
    """
    global _note
    home, has_name = _home()
    if not has_name and not any(map(os.environ.get, _USER_NAMES)):
        os.environ["USER"] = f"uid-{os.getuid()}"
    caches = os.environ.get("XDG_CACHE_HOME") or (home and os.path.join(home, ".cache"))
    settings = os.environ.get("XDG_CONFIG_HOME") or (home and os.path.join(home, ".config"))
    if caches and settings and can_write(Path(caches)) and can_write(Path(settings)):
        return
    folder = _private_folder()
    if not home:
        os.environ["HOME"] = folder or "/"
    if folder is None:
        return
    if not (settings and can_write(Path(settings))):
        os.environ.setdefault("MPLCONFIGDIR", os.path.join(folder, "matplotlib"))
    if caches and can_write(Path(caches)):
        return
    os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
    why = f"{caches} can't be written to" if caches else f"user id {os.getuid()} has no home folder"
    _note = f"warning: {why}: caches go to {folder}; set XDG_CACHE_HOME to keep them elsewhere"


def _home() -> tuple[str, bool]:
    """Return the home folder of this user, "" if there is none, and whether the user has a name."""
    import pwd

    named = os.environ.get("HOME", "")
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        return named, False
    return named or entry.pw_dir, True


def can_write(folder: Path) -> bool:
    """Return whether files can be written to a folder, which may not exist yet."""
    for path in (folder.absolute(), *folder.absolute().parents):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and os.access(path, os.W_OK | os.X_OK)
    return False


def _private_folder() -> str | None:
    """Return a folder below TMPDIR for this user alone; the same one each time, where possible."""
    import tempfile  # takes time to import

    try:
        path = os.path.join(tempfile.gettempdir(), f"fledge-{os.getuid()}")
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            status = os.lstat(path)
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if not is_own or status.st_mode & 0o077:  # someone else may write to it
                return tempfile.mkdtemp(prefix=f"fledge-{os.getuid()}-")
        return path
    except OSError:
        return None


def exit_process(status: int) -> NoReturn:
    """Run the `atexit` handlers, flush stdout and stderr, and exit without waiting for threads.

    The teardown of loaded modules is skipped, because with torch it takes a second.

    Args:
        status: Exit status. If it is 0 and flushing fails, for example because the disk is full,
            the exit status is 1.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BlockingIOError:  # nobody reads stderr, which `log_queue` has unblocked
        os._exit(status)
    except (OSError, RuntimeError) as error:  # a full disk; an interrupted write
        where = getattr(error, "filename", None) or "the output can't be written"
        reason = getattr(error, "strerror", None) or error
        with suppress(OSError):
            if status == 0:  # otherwise an error was told already
                show(f"fledge: {where}: {reason}", sys.stderr, flush=True)
        os._exit(status or 1)
    os._exit(status)


def end_with_parent() -> None:
    """Have this process killed when the thread that started it ends; only on Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def be_ended_first() -> None:
    """Have this process killed first when the memory of the container runs out; only on Linux."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def is_running(pid: int) -> bool:
    """Return whether a process with this process id is running on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
