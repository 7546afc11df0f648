"""Watch the file operations of this process: opening, renaming, removing, making folders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, tuple[object, ...]], None]

_listeners: list[Listener] = []
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener` before each file operation within the block.

    Args:
        listener: Called with the name and the arguments of Python's audit event. File operations of
            the listener itself are not reported.
    """
    if not _installed:
        sys.addaudithook(_hook)  # it can't be removed
        _installed.append(True)
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


_installed: list[bool] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _listeners or event not in _EVENTS:
        return
    listeners, _listeners[:] = [*_listeners], []
    try:
        for listener in listeners:
            listener(event, arguments)
    finally:
        _listeners[:] = listeners
