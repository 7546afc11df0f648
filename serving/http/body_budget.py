"""Memory for the bodies of requests, from their first byte to their answer."""

from __future__ import annotations

import asyncio
from typing import Final

from serving.errors import Overloaded

COPIES: Final = 2
"""Bytes of memory per byte of a body: the chunks are joined; a form is split into its parts, or the
images of JSON are decoded from base64, which takes three quarters of the text."""

SMALL: Final = 2**20
LARGE_SHARE: Final = 0.75
"""Bodies above `SMALL` bytes may take this share of the budget, so that uploads which are held open
leave room for usual photos."""

SLOW_SECONDS: Final = 5.0
"""Time after which a body that is still incomplete may be ended to make room for others."""


class Upload:
    """What one body has taken from a `BodyBudget`, and how to end it.

    Attributes:
        timeout: Entered by the task that reads the body.
        started: `loop.time()` when the reading began.
        taken: Bytes that are taken from the budget now.
        ended: Whether the budget has ended the upload. It may take no more bytes then.
    """

    __slots__ = ("ended", "started", "taken", "timeout")

    def __init__(self, timeout: asyncio.Timeout, started: float) -> None:
        self.timeout, self.started = timeout, started
        self.taken = 0
        self.ended = False


class BodyBudget:
    """Bytes that the bodies of all requests in progress may take together.

    Only what has arrived counts, because a client may state a length and send nothing. Where there
    is no room, bodies that are incomplete after `SLOW_SECONDS` are ended, the oldest first: their
    readers get a `TimeoutError`, and their bytes are free at once. A complete body is never ended.
    The methods may be called only in the thread of the event loop, because there is no lock.

    Attributes:
        total: All bytes of the budget.
        used: Bytes that are taken now.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._incomplete: dict[Upload, None] = {}  # that have taken bytes, the oldest first

    @property
    def most(self) -> int:
        """Largest body that fits into the budget, in bytes; at least `SMALL`."""
        return max(int(LARGE_SHARE * self.total) // COPIES, SMALL)

    def check(self, stated: int, now: float) -> None:
        """Check whether there is room for a body of a stated length, before it is read.

        Args:
            stated: Length of the body, in bytes.
            now: `loop.time()`.

        Raises:
            Overloaded: There is no room, and ending slow uploads would not make enough.
        """
        needed = COPIES * stated
        if self.used and self.used + needed > self._limit(stated):
            used = self.used - sum(upload.taken for upload in self._slow(now))
            if used and used + needed > self._limit(stated):
                raise Overloaded(_MESSAGE)

    def take(self, upload: Upload, size: int, *, complete: bool) -> None:
        """Take bytes for a chunk of a body.

        One body is accepted however small the budget is.

        Args:
            upload: The body, which must not have ended.
            size: Length of the chunk, in bytes.
            complete: Whether this is the last chunk.

        Raises:
            Overloaded: There is no room.
        """
        needed = COPIES * size
        limit = self._limit(upload.taken // COPIES + size)
        if self.used > upload.taken and self.used + needed > limit:
            self._end_slow(upload, limit - needed)
            if self.used > upload.taken and self.used + needed > limit:
                raise Overloaded(_MESSAGE)
        self.used += needed
        upload.taken += needed
        if complete:
            self._incomplete.pop(upload, None)
        elif upload.taken:
            self._incomplete[upload] = None

    def give_back(self, upload: Upload) -> None:
        """Give back all that an upload has taken."""
        self._incomplete.pop(upload, None)
        self.used -= upload.taken
        upload.taken = 0

    def _end_slow(self, newcomer: Upload, most: int) -> None:
        """End slow uploads until at most `most` bytes are used, but none after `newcomer`."""
        now = asyncio.get_running_loop().time()
        for upload in self._slow(now):
            if self.used <= most or upload is newcomer:
                return
            self.give_back(upload)
            upload.ended = True
            if not upload.timeout.expired():
                upload.timeout.reschedule(now)

    def _slow(self, now: float) -> list[Upload]:
        return [one for one in self._incomplete if now - one.started > SLOW_SECONDS]

    def _limit(self, body: int) -> int:
        return self.total if body <= SMALL else int(LARGE_SHARE * self.total)


_MESSAGE: Final = "the requests in progress fill the memory for bodies; try again later"
