"""Refuse and record access to files and processes outside of a target's folder."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# What the interpreter and packages read when a module is imported late, and facts of the system.
_READABLE = tuple(
    os.path.join(os.path.realpath(folder), "")
    for folder in {
        sys.prefix,
        sys.base_prefix,
        *sysconfig.get_paths().values(),
        *(str(ROOT / package) for package in ("serving", "training", "export", "tests")),
        *("/proc", "/sys/devices", "/sys/fs/cgroup", "/usr/lib", "/lib", "/etc/ssl"),
    }
)
_READABLE_FILES = frozenset({"/dev/null", "/dev/urandom", str(ROOT), "/etc/localtime"})

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset(
    {
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink"),
        *("os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"),
    }
)
_READS = frozenset({"os.listdir", "os.scandir", "os.chdir", "os.walk", "glob.glob"})
_NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"),
    *("os.kill", "os.killpg", "socket.connect", "socket.bind", "socket.getaddrinfo"),
    *("pickle.find_class", "webbrowser.open", "urllib.Request", "ftplib.connect"),
)


class Forbidden(BaseException):
    """Access that the guard refuses. No `except Exception` of the parser hides it."""


class Guard:
    """Audit hook that checks events while it is active. A process has one, for good.

    Attributes:
        violation: The first refused event since `active` began; "" if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.join(os.path.realpath(folder), "")
        self._active = False
        self.violation = ""
        sys.addaudithook(self._hook)

    @contextmanager
    def active(self) -> Iterator[None]:
        self.violation, self._active = "", True
        try:
            yield
        finally:
            self._active = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and bool(flags & _WRITING)
            self._check(event, path, writes=writes)
        elif event in _CHANGES:
            for path in args:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._check(event, path, writes=True)
        elif event in _READS:
            self._check(event, args[0], writes=False)
        elif event in _NEVER:
            self._refuse(f"{event} {args!r:.200}")

    def _check(self, event: str, path: Any, *, writes: bool) -> None:
        if path is None or isinstance(path, int):  # the current folder, or an open file
            return
        # No link in the folder can lead out of it: making such a link would be refused.
        if os.path.abspath(os.fsdecode(path)).startswith(self._folder):
            return
        self._active = False  # `realpath` causes events of its own
        try:
            real = os.path.realpath(os.fsdecode(path))
        except ValueError:  # a NUL, at which the call itself will fail
            return
        finally:
            self._active = True
        if os.path.join(real, "").startswith(self._folder):
            return
        if not writes and (real in _READABLE_FILES or os.path.join(real, "").startswith(_READABLE)):
            return
        if writes and real == "/dev/null":
            return
        self._refuse(f"{event} {'for writing ' if writes else ''}{real}")

    def _refuse(self, what: str) -> None:
        self.violation = self.violation or what
        raise Forbidden(what)
