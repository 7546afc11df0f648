"""TLS: the server's context, and handshakes within the limits on connections."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

from serving.errors import OptionError
from serving.server.connection_limits import HEAD_SECONDS, ConnectionLimits
from serving.server.http_protocol import LimitedHttpProtocol
from serving.settings import Settings


def context_of(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context of the settings, None for plain HTTP; see `server_context`."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return server_context(settings.tls_cert, settings.tls_key)


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the TLS context of a server: TLS 1.2 and 1.3, without client certificates.

    Args:
        certificate: PEM file with the certificate, followed by those of its authorities.
        key: PEM file with the private key, not encrypted.

    Raises:
        OptionError: A file can't be read, holds something else, or the two don't belong together.
    """
    for name, path in (("FLEDGE_TLS_CERT", certificate), ("FLEDGE_TLS_KEY", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise OptionError(f"{name} = {path}: {error.strerror}; name a PEM file") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key would otherwise be asked for on the terminal.
        context.load_cert_chain(certificate, key, lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise OptionError(
            f"FLEDGE_TLS_CERT = {certificate}: not a PEM certificate that belongs to the private"
            f" key FLEDGE_TLS_KEY = {key}, which must not be encrypted"
        ) from error
    return context


class TlsHandshake(asyncio.Protocol):
    """A connection until the end of its TLS handshake; then `LimitedHttpProtocol` takes over.

    With the `ssl` argument of `create_server`, the HTTP protocol learns of a connection only after
    the handshake: a client that stays silent would be counted by nobody for a minute.
    """

    def __init__(self, limits: ConnectionLimits, context: ssl.SSLContext, **options: Any) -> None:
        """Create the protocol of a connection; `options` are those of the HTTP protocol."""
        self._limits, self._context, self._options = limits, context, options
        self._since = limits.now
        # Bytes that arrive before the handshake begins; later, requests that arrive with its end.
        self._early = bytearray()
        self._lost = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if not self._limits.admit(self):
            transport.abort()
            return
        # uvicorn closes the connections of this set when it stops.
        self._options["server_state"].connections.add(self)
        self._task = asyncio.get_running_loop().create_task(self._shake_hands())

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    def check(self, now: float) -> None:
        """Do nothing: the handshake has a timer of its own."""

    def drop(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    shutdown = drop

    async def _shake_hands(self) -> None:
        transport = None
        loop = asyncio.get_running_loop()
        if self._early:
            loop.call_soon(self._replay, bytes(self._early))
            self._early.clear()
        try:
            transport = await loop.start_tls(
                self._transport,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=HEAD_SECONDS,
                ssl_shutdown_timeout=HEAD_SECONDS,
            )
        except OSError:  # no TLS, no common version, too late, or gone
            self._limits.refused("tls")
        finally:
            self._options["server_state"].connections.discard(self)
            self._limits.remove(self)
            if transport is None:
                self._transport.abort()
        # An aborted connection may end the handshake as if it had succeeded.
        if transport is None or self._lost or self._transport.is_closing():
            return
        protocol = LimitedHttpProtocol(self._limits, self._since, **self._options)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._early:
            protocol.data_received(bytes(self._early))

    def _replay(self, data: bytes) -> None:
        """Give the protocol of the handshake, which has just been set, what arrived before it."""
        # A buffered protocol, both that of asyncio and that of uvloop.
        protocol, rest = self._transport.get_protocol(), memoryview(data)
        while rest and not self._transport.is_closing():
            buffer = protocol.get_buffer(len(rest))
            size = min(len(buffer), len(rest))
            buffer[:size] = rest[:size]
            protocol.buffer_updated(size)
            rest = rest[size:]
