"""Cancel the handler of a request whose client has closed the connection.

    LimitedHttpProtocol --scope[DISCONNECT]--> App: `task` is set while the request is answered
    LimitedHttpProtocol.connection_lost --> Disconnect.report --> the task is cancelled

ASGI tells an app of a lost connection only when the app calls `receive`, so that a task for each
request would have to wait for it.
"""

from __future__ import annotations

import asyncio
import select
import socket
from typing import Any, Final

DISCONNECT: Final = "fledge.disconnect"
"""Key of the ASGI scope."""

_HANGUP: Final = getattr(select, "POLLRDHUP", 0)  # only on Linux


class Disconnect:
    """Whether the client of one request has closed the connection, and whom to tell.

    Attributes:
        happened: Whether the connection was lost before the response was complete.
        task: Task that is cancelled then. None: no task.
    """

    __slots__ = ("happened", "task")

    def __init__(self) -> None:
        self.happened = False
        self.task: asyncio.Task[Any] | None = None

    def report(self) -> None:
        """Note that the connection is lost, and cancel the task."""
        self.happened = True
        if self.task is not None:
            self.task.cancel()


def is_closed_by_client(connection: socket.socket | None) -> bool:
    """Return whether the client has closed a connection that is not read at the moment.

    The event loop notices that only of connections that it reads. Returns False where the system
    can't tell (macOS).
    """
    if connection is None or not _HANGUP or connection.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(connection.fileno(), _HANGUP)
    return bool(poll.poll(0))
