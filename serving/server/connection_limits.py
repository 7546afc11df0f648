"""Limits on connections: how many there are, and how long and how fast a client may send.

`ConnectionLimits` is the table of a worker's connections. The connections themselves are
`serving.server.http_protocol.LimitedHttpProtocol`, which counts bytes as they arrive; this module
looks at all connections twice a second and closes those that are overdue, so that an ordinary
request sets no timer.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

HEAD_BYTES: Final = 65_536
"""Largest head of a request: request line and fields. The trailers of a chunked body, and the
extensions of a chunk, are limited alike."""
FRAMING_BYTES: Final = 2**16
"""Largest number of bytes around the chunks of a body, in addition to a quarter of the body. Chunks
of one byte cost a hundred times as much time as large ones: half a microsecond each."""
HEAD_FIELDS: Final = 100
"""Largest number of fields in a head, and of trailers."""
HEAD_SECONDS: Final = 10.0
"""Time for a head, TLS handshake included, from the moment the connection is made; for later
requests of a connection, from the first byte of the head."""
BODY_SECONDS: Final = 15.0
"""Period over which the speed of a body is measured."""
BODY_BYTES_PER_SECOND: Final = 1000
"""Least speed of a body, as the mean over `BODY_SECONDS` in which the service was ready to read."""
UNREAD_SECONDS: Final = 10.0
UNREAD_BYTES: Final = 64 * 2**20
"""Limits on the rest of a body after the response to its request, such as one to an unknown path.
"""
WRITE_SECONDS: Final = 30.0
"""Time for which a client may read nothing of a response, once the buffers are full."""
RESPONSE_SECONDS: Final = 60.0
"""Time for which a client may be behind with reading, for all responses that it waits for."""
MAX_BLOCKED: Final = 64
MAX_UNREAD_BYTES: Final = 16 * 2**20
"""Largest number of connections whose client is behind with reading, and of bytes that wait for
them in this process. Those that have been behind for the longest time are closed first."""
SEND_BUFFER: Final = 65_536
SEND_BUFFER_BYTES: Final = 140 * 1024
"""Size of the kernel's buffer of a connection, as it is set and as it was measured. By default the
kernel lets it grow to 4 MB."""
WRITE_BUFFER: Final = 16_384
"""Bytes of a response in this process above which the client is behind with reading."""
MAX_PIPELINED: Final = 1000
"""Largest number of requests of a connection that wait for the response to an earlier one."""
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 2**20
"""Limits on what is read and dropped after a refusal. Closing a connection that has unread bytes
resets it, and the client might not see the response."""

MAX_CONNECTIONS: Final = 4096
MAX_TLS_CONNECTIONS: Final = 1024
"""Largest default of the number of connections; less where the process may have few descriptors."""
CONNECTION_BYTES: Final = 5 * 1024
TLS_BYTES: Final = 46 * 1024
"""Memory of a silent connection, and what TLS adds to it."""
FREE_HEAD_BYTES: Final = 16_384
"""Bytes of a connection's heads that are not counted: most heads are smaller, and are never refused
because of others."""
SHARED_HEAD_BYTES: Final = 32 * 2**20
"""Memory for all incomplete heads and pipelined requests of a worker, beyond `FREE_HEAD_BYTES`."""
_MAX_DESCRIPTORS: Final = 65_536
_MAX_BACKLOG: Final = 2048
_SWEEP_SECONDS: Final = 0.5
_LEAST_BUSY: Final = 1.0  # seconds that a connection has for a body before it may make room
_LOG_SECONDS: Final = 10.0

_REASONS: Final = {
    "invalid": "with a request that is not valid HTTP",
    "connection-limit": "closed to stay within the largest number of connections",
    "head-size": f"with a head of more than {HEAD_BYTES} bytes or {HEAD_FIELDS} fields",
    "head-time": f"without a whole head within {HEAD_SECONDS:g} s",
    "head-memory": "closed because incomplete heads took too much memory",
    "body-speed": f"with a body slower than {BODY_BYTES_PER_SECOND} bytes a second",
    "body-framing": "with too many bytes around the chunks of the body",
    "unread-body": "whose body went on after the answer",
    "unread-response": f"whose client read nothing for {WRITE_SECONDS:g} s, or too slowly",
    "pipelined": f"with more than {MAX_PIPELINED} requests in advance",
    "tls": "whose TLS handshake failed",
    "silent": "without a byte",
}
REASONS: Final = tuple(_REASONS)
"""Labels of the metric that counts refused connections."""
_UNLOGGED: Final = ("silent", "tls")  # browsers and health checks connect in advance

_log = logging.getLogger("bentoml.fledge")


class Connection(Protocol):
    """What `ConnectionLimits` needs of a connection."""

    def check(self, now: float) -> None:
        """Refuse or close the connection if it is overdue."""

    def drop(self) -> None:
        """Close the connection at once."""


class ConnectionLimits:
    """The connections of this process, and how many there may be.

    Attributes:
        now: `loop.time()` at the last look at all connections; exact to half a second, and free.
        head_bytes: Bytes of incomplete heads and pipelined requests of all connections.
    """

    def __init__(self, most: int, count: Callable[[str], None]) -> None:
        """Create an empty table.

        Args:
            most: Largest number of connections.
            count: Called with a label of `REASONS` for each connection that is refused or closed.
        """
        self.most = most
        self.now = 0.0
        self.head_bytes = 0
        self._count = count
        self._open: set[Connection] = set()
        # Without a request in progress, the longest first.
        self._waiting: OrderedDict[Connection, None] = OrderedDict()
        # Whose request is incomplete, with the time since when, the longest first.
        self._incomplete: OrderedDict[Connection, float] = OrderedDict()
        # Whose client is behind with reading, with the time since when, and the bytes.
        self._blocked: dict[Connection, tuple[float, int]] = {}
        self._unlogged: Counter[str] = Counter()
        self._logged = -_LOG_SECONDS

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at all connections from now on, twice a second."""
        loop.call_later(_SWEEP_SECONDS, self.start, loop)
        self.now = loop.time()
        for connection in list(self._open):
            try:
                connection.check(self.now)
            except Exception:  # the others must still be checked
                _log.exception("a connection can't be checked")
                connection.drop()
        if self._unlogged and self.now - self._logged >= _LOG_SECONDS:
            self._logged = self.now
            causes = (f"{n} {_REASONS[reason]}" for reason, n in self._unlogged.most_common())
            _log.warning("refused connections: %s", "; ".join(causes))
            self._unlogged.clear()

    def admit(self, connection: Connection) -> bool:
        """Take a new connection, which has no request yet, into the table.

        If the table is full, another connection is closed: the one that has been without a request
        for the longest time; else the one whose body has been incomplete, or whose response unread,
        for the longest time, if that is more than a second. Returns False if there is none: the new
        connection must be closed.
        """
        if len(self._open) >= self.most:
            self.refused("connection-limit")
            oldest = self._dispensable()
            if oldest is None:
                return False
            self.remove(oldest)
            oldest.drop()
        self._open.add(connection)
        self._waiting[connection] = None
        return True

    def _dispensable(self) -> Connection | None:
        if self._waiting:
            return next(iter(self._waiting))
        since = {one: at for one, (at, _) in self._blocked.items()}
        if self._incomplete:
            first = next(iter(self._incomplete))
            since[first] = self._incomplete[first]
        oldest = min(since, key=since.__getitem__, default=None)
        if oldest is None or self.now - since[oldest] < _LEAST_BUSY:
            return None
        return oldest

    def busy(self, connection: Connection) -> None:
        """Note that a connection has a request in progress, whose body is incomplete."""
        self._waiting.pop(connection, None)
        if connection in self._open:
            self._incomplete[connection] = self.now

    def complete(self, connection: Connection) -> None:
        """Note that the request of a connection is complete."""
        self._incomplete.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """Note that a connection has no request in progress; it may be closed to make room."""
        self._incomplete.pop(connection, None)
        if connection in self._open:
            self._waiting[connection] = None

    def blocked(self, connection: Connection, since: float, size: int) -> None:
        """Note that the client of a connection is behind with reading, and make room for its bytes.

        Args:
            connection: The connection.
            since: When the client was first behind.
            size: Bytes that wait for the client in this process.
        """
        self._blocked[connection] = (since, size)
        unread = sum(size for _, size in self._blocked.values())
        while len(self._blocked) > MAX_BLOCKED or (
            unread > MAX_UNREAD_BYTES and len(self._blocked) > 1
        ):
            oldest = min(self._blocked, key=lambda one: self._blocked[one][0])
            unread -= self._blocked.pop(oldest)[1]
            self.refused("unread-response")
            oldest.drop()

    def unblocked(self, connection: Connection) -> None:
        """Note that the client of a connection is no longer behind with reading."""
        self._blocked.pop(connection, None)

    def remove(self, connection: Connection) -> None:
        """Remove a connection from the table; does nothing if it is not there."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)
        self._incomplete.pop(connection, None)
        self._blocked.pop(connection, None)

    def refused(self, reason: str) -> None:
        """Count a refused connection; a line in the log follows, at most one in ten seconds."""
        self._count(reason)
        if reason not in _UNLOGGED:
            self._unlogged[reason] += 1


def limit_buffers(transport: asyncio.Transport) -> None:
    """Limit what waits for the client of a connection, in this process and in the kernel.

    The kernel keeps the rest of a response after the connection was closed. On Linux it gives up
    after `RESPONSE_SECONDS` in which the client took nothing.
    """
    transport.set_write_buffer_limits(high=WRITE_BUFFER)
    _set_option(transport, socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if option := getattr(socket, "TCP_USER_TIMEOUT", 0):
        _set_option(transport, socket.IPPROTO_TCP, option, int(1000 * RESPONSE_SECONDS))


def reset_when_closed(transport: asyncio.Transport) -> None:
    """Make the kernel forget what waits for the client when the connection is closed."""
    _set_option(transport, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _set_option(transport: asyncio.Transport, level: int, option: int, value: int | bytes) -> None:
    connection = transport.get_extra_info("socket")
    with suppress(OSError):  # a Unix socket has fewer options
        if connection is not None:
            connection.setsockopt(level, option, value)


def raise_descriptor_limit() -> int:
    """Raise the limit on open files to the hard limit, at most 65,536; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = possible_descriptors(soft, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # macOS allows less than it states
        return soft
    return most


def possible_descriptors(soft: int, hard: int) -> int:
    """Return the limit on open files that `raise_descriptor_limit` sets, or leaves as it is."""
    soft, hard = (
        _MAX_DESCRIPTORS if one == resource.RLIM_INFINITY else one for one in (soft, hard)
    )
    return max(soft, min(hard, _MAX_DESCRIPTORS))


def connections_for(descriptors: int, wanted: int) -> tuple[int, int]:
    """Return the largest number of connections, and the length of the queue of the kernel.

    A quarter of the descriptors, at least 64, is left: for files, and for connections that the
    kernel has accepted and the table has not seen yet.

    Args:
        descriptors: Limit on the open files of this process.
        wanted: The number that the user has set, or the default.
    """
    reserve = max(64, min(descriptors // 4, _MAX_BACKLOG * 2))
    possible = max(descriptors - reserve, 16)
    return min(wanted, possible), min(_MAX_BACKLOG, max(reserve // 2, 16))


def install(
    server: Any,
    wanted: int | None,
    count: Callable[[str], None],
    context: ssl.SSLContext | None = None,
) -> ConnectionLimits:
    """Make a uvicorn server, which does not listen yet, apply the limits to its connections.

    Args:
        server: A `uvicorn.Server` whose loop runs.
        wanted: Largest number of connections; None: as many as the limit on open files allows.
        count: See `ConnectionLimits`.
        context: See `bentoml_compat.use_protocol`.
    """
    from serving.server import bentoml_compat

    default = MAX_CONNECTIONS if (context or server.config.ssl) is None else MAX_TLS_CONNECTIONS
    most, backlog = connections_for(raise_descriptor_limit(), wanted or default)
    if wanted and most < wanted:
        _log.warning(
            "FLEDGE_MAX_CONNECTIONS = %d: the limit on open files allows %d; raise it (ulimit -n)",
            wanted,
            most,
        )
    limits = ConnectionLimits(most, count)
    limits.start(asyncio.get_running_loop())
    bentoml_compat.use_protocol(server, limits, backlog, context)
    return limits
