"""Memory for the bodies of requests, from their first byte to their answer."""

from __future__ import annotations

from typing import Final

from serving.errors import Overloaded

COPIES: Final = 2
"""Bytes of memory per byte of a body: the chunks are joined, and a form is split into its parts."""

SMALL: Final = 2**20
LARGE_SHARE: Final = 0.75
"""Bodies above `SMALL` bytes may take this share of the budget, so that uploads which are held open
leave room for usual photos."""


class BodyBudget:
    """Bytes that the bodies of all requests in progress may take together.

    Only what has arrived counts, because a client may state a length and send nothing. The methods
    may be called only in the thread of the event loop, because there is no lock.

    Attributes:
        total: All bytes of the budget.
        used: Bytes that are taken now.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0

    def check(self, stated: int) -> None:
        """Check whether there is room for a body of a stated length, before it is read.

        Raises:
            Overloaded: There is no room.
        """
        if self.used and self.used + COPIES * stated > self._limit(stated):
            raise Overloaded(_MESSAGE)

    def take(self, size: int, body: int) -> int:
        """Take bytes for a chunk of a body; return the bytes taken, for `give_back`.

        One body is accepted however small the budget is.

        Args:
            size: Length of the chunk, in bytes.
            body: Length of what has arrived of the body, with the chunk.

        Raises:
            Overloaded: There is no room.
        """
        taken = COPIES * size
        others = self.used - COPIES * (body - size)
        if others > 0 and self.used + taken > self._limit(body):
            raise Overloaded(_MESSAGE)
        self.used += taken
        return taken

    def give_back(self, taken: int) -> None:
        """Give back what `take` has returned, summed over the chunks of a body."""
        self.used -= taken

    def _limit(self, body: int) -> int:
        return self.total if body <= SMALL else int(LARGE_SHARE * self.total)


_MESSAGE: Final = "the requests in progress fill the memory for bodies; try again later"
