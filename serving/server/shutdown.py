"""How a worker leaves: the door is shut first, then whoever is inside is answered.

BentoML's launcher holds the listening socket open until its workers have ended. Until then the
kernel would let callers in whom nobody answers any more, and reset them at the end. So a worker
that is told to stop shuts that socket, for all processes: who comes later is refused at once, and
can ask another replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

import uvicorn

LINGER: Final = 0.3
"""Seconds between the shut door and the server's own end: whoever came through has then said what
he wants, and callers who keep their connection have been told to leave."""

_TURNS: Final = 1000
_MOMENT: Final = 0.02


class GracefulShutdown:
    """Listens to the signals that stop a worker.

    begun: from now on every answer says `Connection: close`.
    """

    begun = False

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the signals from uvicorn, and hand them on later; nothing in other processes."""
        handler = signal.getsignal(signal.SIGTERM)
        server = getattr(handler, "__self__", None)
        if not isinstance(server, uvicorn.Server):
            return

        def end() -> None:
            # Of a second SIGINT uvicorn would make an end without answers.
            server.handle_exit(signal.SIGTERM, None)

        def leave(*_: Any) -> None:
            loop.call_soon_threadsafe(self._shut, loop, server, end, _TURNS)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, leave)

    def _shut(
        self,
        loop: asyncio.AbstractEventLoop,
        server: uvicorn.Server,
        end: Callable[[], None],
        turns: int,
    ) -> None:
        if self.begun:  # told before: by the launcher, too, or by whoever signals a whole group
            return
        if not server.started:  # it opens the door yet
            loop.call_later(_MOMENT, self._shut, loop, server, end, turns)
            return
        doors = [door for one in server.servers for door in one.sockets]
        if turns and _somebody_is_at(doors):  # the loop lets him in at its next turn
            loop.call_soon(self._shut, loop, server, end, turns - 1)
            return
        self.begun = True
        # Closing a server closes its socket here, but not the launcher's.
        held = [socket.socket(fileno=os.dup(door.fileno())) for door in doors]
        for one in server.servers:
            one.close()
        for door in held:
            with contextlib.suppress(OSError):  # another worker was first
                door.shutdown(socket.SHUT_RDWR)
            door.close()
        loop.call_later(LINGER, end)


def _somebody_is_at(doors: Iterable[socket.socket]) -> bool:
    poll = select.poll()
    for door in doors:
        poll.register(door, select.POLLIN)
    return any(event == select.POLLIN for _, event in poll.poll(0))
