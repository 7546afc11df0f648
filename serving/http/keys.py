"""API keys: check them, slow down whoever guesses, and limit how much a key may ask for."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from serving.errors import Unauthorized
from serving.http.messages import Request
from serving.http.problems import RateLimited

FREE_FAILURES: Final = 20
"""Wrong keys that a source may send before it is slowed down; one more each second."""
DELAY_SECONDS: Final = 1.0
"""Time for which a request of such a source waits before its key is looked at."""
MAX_DELAYED: Final = 8
"""Largest number of requests of a source that wait; the next one gets 429."""
MAX_SOURCES: Final = 10_000
"""Number of sources with wrong keys that are remembered, and of pairs of source and right key."""


def _now() -> float:
    return time.monotonic()


@dataclass
class _Bucket:
    """A token bucket.

    Attributes:
        rate: Tokens per second that are added.
        most: Largest number of tokens.
        tokens: Number of tokens at `at`; below 0 after a request that cost more than was left.
        at: `time.monotonic()`.
    """

    rate: float
    most: float
    tokens: float
    at: float = field(default_factory=lambda: _now())

    def refill(self) -> float:
        now = _now()
        self.tokens = min(self.most, self.tokens + (now - self.at) * self.rate)
        self.at = now
        return self.tokens


@dataclass
class _Source:
    """A source that has sent a wrong key.

    Attributes:
        failures: Wrong keys that are still free.
        delayed: Number of requests that wait.
    """

    failures: _Bucket
    delayed: int = 0


class ApiKeys:
    """The keys of the service."""

    def __init__(self, digests: frozenset[bytes], rate: float) -> None:
        """Store the keys.

        Args:
            digests: sha256 of each key; if empty, no key is needed.
            rate: Images per second that a key may send, in the long run; 0 for no limit.
        """
        self._digests = digests
        most = max(1.0, rate)
        self._buckets = {digest: _Bucket(rate, most, most) for digest in digests if rate}
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        # Sources with digests of right keys that came from them, also before the first wrong one:
        # honest callers behind the same address as a guesser are not slowed.
        self._known: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    async def authorise(self, request: Request, images: int = 0) -> None:
        """Check the key of a request, and count its images.

        Raises:
            Unauthorized: The key is missing or wrong.
            RateLimited: The key has sent too many images, or its source too many wrong keys.
        """
        if not self._digests:
            return
        scheme, _, key = request.headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        name = _source_of(request.client)
        known = (name, digest)
        source = None if known in self._known else self._sources.get(name)
        if source is not None and source.failures.refill() < 1:
            await _delay(source)
        # Compares with every key, each in constant time, so that the duration reveals nothing.
        matches = sum(hmac.compare_digest(digest, one) for one in self._digests)
        if scheme.lower() != b"bearer" or not matches:
            if key:
                self._fail(name)
            raise Unauthorized("send a valid key as `Authorization: Bearer KEY`")
        self._known[known] = None
        self._known.move_to_end(known)
        if len(self._known) > MAX_SOURCES:
            self._known.popitem(last=False)
        bucket = self._buckets.get(digest)
        if bucket is not None and images:
            if bucket.refill() < 1:
                wait = math.ceil((1 - bucket.tokens) / bucket.rate)
                raise RateLimited(f"more than {bucket.rate:g} images a second by this key", wait)
            bucket.tokens -= images

    def count(self, request: Request, images: int) -> None:
        """Count more images of a request that `authorise` has accepted."""
        key = request.headers.get(b"authorization", b"").partition(b" ")[2]
        bucket = self._buckets.get(hashlib.sha256(key.strip()).digest()) if self._buckets else None
        if bucket is not None:
            bucket.tokens -= images

    def _fail(self, name: str) -> None:
        source = self._sources.pop(name, None)
        if source is None:
            source = _Source(_Bucket(1.0, FREE_FAILURES, FREE_FAILURES))
        self._sources[name] = source  # the last to be forgotten
        if len(self._sources) > MAX_SOURCES:
            self._sources.popitem(last=False)
        source.failures.tokens = max(0.0, source.failures.refill() - 1)


async def _delay(source: _Source) -> None:
    if source.delayed >= MAX_DELAYED:
        raise RateLimited("too many wrong keys from this address", math.ceil(DELAY_SECONDS))
    source.delayed += 1
    try:
        await asyncio.sleep(DELAY_SECONDS)
    finally:
        source.delayed -= 1


def _source_of(client: str) -> str:
    """Return the address of a caller; of IPv6 the network, whose addresses cost nothing."""
    if ":" not in client:
        return client[:64]
    try:
        address = ipaddress.IPv6Address(client.partition("%")[0])
    except ValueError:  # a proxy states it
        return client[:64]
    if address.ipv4_mapped:  # a caller by IPv4, while the service listens on `::`
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
