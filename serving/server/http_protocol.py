"""HTTP connections with limits on the head, the body and the time of each request.

uvicorn's protocol for httptools has no limits of its own: a head, the trailers of a chunked body
and the number of requests that a client sends in advance are kept in memory without bound, and a
silent client stays connected for ever. `LimitedHttpProtocol` adds the limits of
`serving.server.connection_limits`. It counts bytes in `data_received`, before and after the parser
has seen them; what depends on time is checked by `ConnectionLimits`, twice a second.
"""

from __future__ import annotations

from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.server.connection_limits import (
    BODY_BYTES_PER_SECOND,
    BODY_SECONDS,
    FRAMING_BYTES,
    FREE_HEAD_BYTES,
    HEAD_BYTES,
    HEAD_FIELDS,
    HEAD_SECONDS,
    LINGER_BYTES,
    LINGER_SECONDS,
    MAX_PIPELINED,
    RESPONSE_SECONDS,
    SHARED_HEAD_BYTES,
    UNREAD_BYTES,
    UNREAD_SECONDS,
    WRITE_SECONDS,
    ConnectionLimits,
    limit_buffers,
    reset_when_closed,
)
from serving.server.disconnect import DISCONNECT, Disconnect, is_closed_by_client
from serving.server.refusals import Refused, head_too_large, invalid, small_chunks, too_many_heads

_PIPELINED_COST: Final = 4096  # bytes of memory for a small request that waits
_FIELD_COST: Final = 130  # and for a field, beyond its length
_SLICE: Final = HEAD_BYTES


class LimitedHttpProtocol(HttpToolsProtocol):
    """A connection of uvicorn with limits.

    Attributes:
        cycle: uvicorn's latest request and its response. `held`: bytes of memory of the request.
    """

    cycle: Any

    def __init__(self, limits: ConnectionLimits, since: float = 0.0, **options: Any) -> None:
        """Create the protocol of a connection.

        Args:
            limits: The table of connections.
            since: `loop.time()` when the connection was made; 0: when the transport is known.
            options: Arguments of uvicorn's protocol.
        """
        super().__init__(**options)
        self._limits = limits
        self._head_since = since  # when the head in progress began
        self._head_bytes = 0  # bytes of the head in progress that the parser has seen
        self._head_open = False  # the parser is inside a head
        self._body_open = False  # the parser is behind a head and not at the end of its body
        self._body_bytes = 0  # of the request in progress
        self._chunks = self._extra_bytes = 0  # of its body, and around them, trailers included
        self._extra_run = 0  # of these, since the last byte of the body
        self._head_held = 0  # bytes of the head in progress that are held
        self._requests_held = 0  # bytes of requests that are not answered yet
        self._held = 0  # the part of `limits.head_bytes` that is this connection's
        self._body_at = 0.0  # when the last byte of the body arrived
        self._period_since, self._period_bytes = 0.0, 0
        self._answered_since = 0.0
        self._unread_bytes = 0
        self._behind_since = 0.0  # when the client was first behind with reading; 0: it is not
        self._blocked_since = 0.0  # when it last read something, if the buffer is full; 0: it isn't
        self._blocked_bytes = 0  # in the buffer then
        self._linger_until = 0.0  # after a refusal; 0: none
        self._closing_since = 0.0  # when the transport was first seen to be closing; 0: it is not
        self._stopped = False  # what the client sends is dropped
        self._answering: Any = None  # the cycle whose request `App` has; not the pipelined ones

    # Connection

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if not self._limits.admit(self):
            self._stopped = True
            transport.abort()
            return
        self._head_since = self._head_since or self._limits.now
        super().connection_made(transport)
        limit_buffers(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.remove(self)
        self._requests_held = 0
        self._hold(0)
        super().connection_lost(exc)
        self.pipeline.clear()
        cycle = self._answering
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # uvicorn does so for the latest of pipelined requests only
            cycle.message_event.set()
            cycle.scope[DISCONNECT].report()

    def drop(self) -> None:
        """Close the connection at once."""
        self._stopped = True
        if self._behind_since:  # else the kernel would keep what is in its buffer
            reset_when_closed(self.transport)
        self.transport.abort()

    def pause_writing(self) -> None:
        self._blocked_since = now = self._limits.now
        self._behind_since = self._behind_since or now
        self._blocked_bytes = self.transport.get_write_buffer_size()
        super().pause_writing()
        self._limits.blocked(self, self._behind_since, self._blocked_bytes)

    def resume_writing(self) -> None:
        self._blocked_since = 0.0
        self._limits.unblocked(self)
        super().resume_writing()
        self._catch_up()

    def _catch_up(self) -> None:
        """Note that the client has read what was sent, unless more is to come."""
        if not self._blocked_since and self.cycle is not None and self.cycle.response_complete:
            self._behind_since = 0.0
            self._limits.idle(self)

    # Bytes

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._stopped:
            self._unread_bytes += len(data)
            if self._unread_bytes > LINGER_BYTES:
                self.drop()
            return
        if len(data) + self._head_bytes <= _SLICE:
            self._feed(data)
            return
        view, start = memoryview(data), 0
        while start < len(view) and not self._stopped and not self.transport.is_closing():
            size = _SLICE - (0 if self._body_open else self._head_bytes)
            self._feed(view[start : start + size])
            start += size

    def _feed(self, data: bytes | memoryview) -> None:
        body_open, cycle, seen = self._body_open, self.cycle, self._body_bytes
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            refusal = error.__context__
            self._refuse(refusal if isinstance(refusal, Refused) else invalid(error))
            return
        if self._body_open:
            if body_open and cycle is self.cycle:
                self._check_body(len(data), self._body_bytes - seen)
            if self._held and self.cycle is not self._answering:
                self._check_held()
            return
        if not body_open and cycle is self.cycle:  # nothing but a part of a head
            self._head_begins(self._head_bytes + len(data))
        elif self._head_open:  # behind the end of another request
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            self._head_bytes = 0
            self._head_begins(size + 1)

    def _parse(self, data: bytes | memoryview) -> None:
        """Parse bytes, and ignore `Upgrade`, which curl and Java send with a request as an offer.

        httptools ends its request there, and would take the body for the next request. A new parser
        gets the same head without the field, then the rest.
        """
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = memoryview(data)[upgrade.args[0] :]
                line = self.parser.get_method(), self.url, self.parser.get_http_version().encode()
            fields = (b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade")
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
            self.parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (*line, b"".join(fields)))

    def _head_begins(self, size: int) -> None:
        """Note that a head is incomplete after `size` bytes, and refuse it if that is too much."""
        if not self._head_bytes and self.cycle is not None:
            self._head_since = self._limits.now
        self._head_bytes = size
        if size >= HEAD_BYTES or (self._head_open and len(self.headers) > HEAD_FIELDS):
            self._refuse(head_too_large())
            return
        self._hold(size)
        self._check_held()

    def _check_body(self, size: int, body: int) -> None:
        """Check the request in progress after `size` bytes, of which `body` were of its body."""
        self._extra_bytes += size - body
        most = FRAMING_BYTES + self._body_bytes // 4
        self._extra_run = 0 if body else self._extra_run + size
        if self.cycle.response_complete:
            self._unread_bytes += size
            if self._unread_bytes > UNREAD_BYTES:
                self._limits.refused("unread-body")
                self.drop()
        elif self._extra_run > HEAD_BYTES or self._extra_bytes > most:
            self._refuse(small_chunks())
        elif self._extra_bytes and len(self.headers) > HEAD_FIELDS:  # trailers
            self._refuse(head_too_large())

    def _hold(self, head: int) -> None:
        """Note how many bytes of a head in progress are held, beside those of the requests."""
        self._head_held = head
        counted = max(0, head + self._requests_held - FREE_HEAD_BYTES)
        self._limits.head_bytes += counted - self._held
        self._held = counted

    def _check_held(self) -> None:
        if self._held and self._limits.head_bytes > SHARED_HEAD_BYTES:
            if self._body_open:  # of a request that waits for the response to an earlier one
                self._limits.refused("head-memory")
                self.drop()
            else:
                self._refuse(too_many_heads())

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        self._head_open = True
        HttpToolsProtocol.on_message_begin(self)

    def on_headers_complete(self) -> None:
        if len(self.headers) > HEAD_FIELDS:
            raise head_too_large()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise Refused("invalid", 400, "CONNECT is not supported: this is no proxy")
            return  # `_parse` starts again
        before = self.cycle
        held = self._admit(waits=before is not None and not before.response_complete)
        HttpToolsProtocol.on_headers_complete(self)  # raises for an invalid URL
        self.cycle.held = held
        self._limits.busy(self)
        self._head_open, self._body_open = False, True
        self._head_bytes = self._body_bytes = self._period_bytes = 0
        self._extra_bytes = self._extra_run = self._chunks = 0
        self._body_at = self._period_since = self._limits.now
        self.headers = []  # trailers must not become fields of the request

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        cycle.scope[DISCONNECT] = Disconnect()
        self._answering = cycle
        HttpToolsProtocol._start_asgi_task(self, cycle, app)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_at = self._limits.now
        if self.cycle is not self._answering:  # it waits for the response to an earlier request
            self._requests_held += len(body)
            self.cycle.held += len(body)
            self._hold(0)
        HttpToolsProtocol.on_body(self, body)

    def on_chunk_header(self) -> None:
        self._chunks += 1  # each with at least 5 bytes around it
        if 5 * self._chunks > FRAMING_BYTES + self._body_bytes // 4:
            raise small_chunks()

    def on_message_complete(self) -> None:
        if self._head_open:  # with `Upgrade`
            return
        self._body_open = False
        self._limits.complete(self)
        HttpToolsProtocol.on_message_complete(self)
        if self.flow.read_paused and not self.pipeline:  # read, to notice when the client is gone
            self.flow.resume_reading()
        if self.cycle is not None and self.cycle.response_complete:  # answered before its end
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        self._requests_held -= self._answering.held
        HttpToolsProtocol.on_response_complete(self)
        self._answered_since, self._unread_bytes = self._limits.now, 0
        self._hold(self._head_held)
        self._catch_up()

    def _admit(self, *, waits: bool) -> int:
        """Count the memory of a request whose head is complete; return it.

        Args:
            waits: Whether the request waits for the response to an earlier one.
        """
        if waits and len(self.pipeline) >= MAX_PIPELINED:
            raise Refused("pipelined", 0, "")
        size = len(self.url) + sum(
            len(name) + len(value) + _FIELD_COST for name, value in self.headers
        )
        size += _PIPELINED_COST * waits
        self._requests_held += size
        self._hold(0)
        if self._held and self._limits.head_bytes > SHARED_HEAD_BYTES:
            raise Refused("head-memory", 0, "") if waits else too_many_heads()
        return size

    # Refusals

    def check(self, now: float) -> None:
        """Refuse or close the connection if it is overdue. Called twice a second."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            most = RESPONSE_SECONDS if self._blocked_since else WRITE_SECONDS
            if now - self._closing_since > most or self._is_unread(now):
                self.drop()
        elif self._linger_until:
            if now >= self._linger_until:
                self.transport.abort()
        elif self._is_unread(now):
            self._limits.refused("unread-response")
            self.drop()
        elif self.flow.read_paused and is_closed_by_client(self.transport.get_extra_info("socket")):
            self.drop()  # pipelined requests are not read before the first is answered
        elif self._body_open:
            self._check_speed(now)
        elif (self._head_bytes or self.cycle is None) and now - self._head_since > HEAD_SECONDS:
            if self._head_bytes:
                detail = f"the head took more than {HEAD_SECONDS:g} s"
                self._refuse(Refused("head-time", 408, detail))
            else:
                self._limits.refused("silent")
                self.transport.close()

    def _is_unread(self, now: float) -> bool:
        """Return whether the client reads nothing for too long, or has been behind for too long."""
        if self._blocked_since:
            left = self.transport.get_write_buffer_size()
            if left < self._blocked_bytes:
                self._blocked_since, self._blocked_bytes = now, left
            if now - self._blocked_since > WRITE_SECONDS:
                return True
        return self._behind_since > 0 and now - self._behind_since > RESPONSE_SECONDS

    def _check_speed(self, now: float) -> None:
        if self.cycle.response_complete:
            if now - self._answered_since > UNREAD_SECONDS:
                self._limits.refused("unread-body")
                self.drop()
        elif self.flow.read_paused:  # the service does not read now
            self._body_at = self._period_since = now
            self._period_bytes = self._body_bytes
        elif now - self._period_since > BODY_SECONDS:
            received, least = self._body_bytes - self._period_bytes, BODY_BYTES_PER_SECOND
            if now - self._body_at > BODY_SECONDS or received < least * BODY_SECONDS:
                speed = f"{least} bytes a second over {BODY_SECONDS:g} s"
                self._refuse(Refused("body-speed", 408, f"the body is slower than {speed}"))
            self._period_since, self._period_bytes = self._body_at, self._body_bytes

    def _refuse(self, refusal: Refused) -> None:
        """Send an error if no response is in progress, and drop what the client sends from now on.

        Requests that were complete before are still answered.
        """
        self._limits.refused(refusal.reason)
        self._stopped = True
        self._unread_bytes = self._head_bytes = 0
        if self._body_open and self.pipeline:  # its request waits, and is not answered
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering
            self._body_open = False
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not self._body_open or refusal.status == 0:
                cycle.keep_alive = False  # a complete request: close after its response
                return
            cycle.disconnected = True  # `App` gets no more of this body
            cycle.message_event.set()
            if cycle.response_started:
                self.drop()
                return
        self._respond(refusal)

    def _respond(self, refusal: Refused) -> None:
        self.parser = None  # type: ignore[assignment]  # with the memory of the head
        self.headers, self.url = [], b""
        self._requests_held = 0
        self._hold(0)
        self.transport.write(refusal.response())
        self._linger_until = self._limits.now + LINGER_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
