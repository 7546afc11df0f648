"""Which hosts the service answers for, and which web pages may use it.

A web page on the machine of a victim can send requests to a service there, also to one that listens
on loopback. Two checks keep it out:

- *Host*: a page that makes its own name resolve to 127.0.0.1 (DNS rebinding) sends that name. While
  the service listens on loopback, only names of loopback and those of `FLEDGE_HOSTS` are served.
- *Origin*: a page may send a POST to another site without asking. Browsers name the page in
  `Origin` and `Sec-Fetch-Site`; such a request is refused unless `FLEDGE_CORS_ORIGINS` allows it.

Other clients send neither header and are not affected.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

from serving.http.messages import Message, Response
from serving.http.problems import BadHost, CrossSite, HttpError

_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}?)\.?(?::[0-9]{0,5})?")
_MAX_HOST: Final = 260
_DEFAULT_PORTS: Final = {b"http": b":80", b"https": b":443"}
_SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
_OWN_SITE: Final = (b"same-origin", b"none")
_ALLOWED_HEADERS: Final = b"authorization, content-type, x-request-id, traceparent, tracestate"
_EXPOSED_HEADERS: Final = b"x-request-id, retry-after"
_PREFLIGHT_SECONDS: Final = b"600"


class Access:
    """The checks of `Host` and `Origin`, and the headers of CORS."""

    def __init__(
        self,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        listening: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """Store the policy.

        Args:
            hosts: Host names that are served besides those of loopback; "*" for every name.
            origins: Origins of web pages that may use the service; "*" for every page.
            listening: Returns the addresses that the service listens on. It is called at the first
                request, when the service listens.
        """
        self._hosts = frozenset(hosts)
        self._origins = frozenset(origin.encode() for origin in origins)
        self._listening = listening
        self._checks_names: bool | None = None
        self._is_served = lru_cache(256)(self._judge)

    def refusal(self, scope: Message, headers: dict[bytes, bytes]) -> HttpError | None:
        """Return the error for a request that must not be served; None for other requests.

        Args:
            scope: The ASGI scope.
            headers: Its headers by name.
        """
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 and (hosts or scope.get("http_version") == "1.1"):
            return BadHost("send the header Host, and send it once")
        if hosts:
            server = scope.get("server")
            known = len(hosts[0]) <= _MAX_HOST  # longer ones must not fill the cache
            if not (known and self._is_served(hosts[0], server[0] if server else "")):
                host = hosts[0].decode("latin-1")[:60]
                return BadHost(f"Host {host!r} is not served here; FLEDGE_HOSTS lists more hosts")
        if scope["method"] not in _SAFE_METHODS:
            return self._cross_site(headers)
        return None

    def _judge(self, host: bytes, address: str) -> bool:
        found = _HOST.fullmatch(host)
        if not found:
            return False
        if self._checks_names is None:
            listening = list(self._listening())
            loopback = bool(listening) and all(map(_is_loopback, listening))
            self._checks_names = "*" not in self._hosts and (loopback or bool(self._hosts))
        name = found[1].decode().lower().strip("[]")
        if not self._checks_names or name in self._hosts:
            return True
        return name in ("localhost", address) or _is_loopback(name)

    def _cross_site(self, headers: dict[bytes, bytes]) -> HttpError | None:
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        if (site is None and origin is None) or site in _OWN_SITE or self._allows(origin):
            return None
        if site is None and origin is not None:  # over plain HTTP browsers send the origin alone
            scheme, _, place = origin.lower().partition(b"://")
            port = _DEFAULT_PORTS.get(scheme, b"")
            host = headers.get(b"host", b"").lower()
            if place and place.removesuffix(port) == host.removesuffix(port):
                return None
        page = (origin or b"another site").decode("latin-1")[:60]
        return CrossSite(
            f"a page of {page} may not use this service; FLEDGE_CORS_ORIGINS allows it"
        )

    def _allows(self, origin: bytes | None) -> bool:
        return origin is not None and (b"*" in self._origins or origin.lower() in self._origins)

    def cors_headers(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """Return the headers that let the page of a request read the response; none by default."""
        if not self._origins:
            return []
        vary = (b"vary", b"origin")
        origin = headers.get(b"origin")
        if origin is None or not self._allows(origin):
            return [vary]
        allowed = b"*" if b"*" in self._origins else origin
        return [
            vary,
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", _EXPOSED_HEADERS),
        ]

    def preflight(
        self, method: str, headers: dict[bytes, bytes], methods: Iterable[str]
    ) -> Response | None:
        """Return the response to a preflight request; None for other requests and origins.

        Args:
            method: Method of the request.
            headers: Headers of the request.
            methods: Methods of the path.
        """
        if method != "OPTIONS" or b"access-control-request-method" not in headers:
            return None
        if not self._allows(headers.get(b"origin")):
            return None
        allowed = [
            (b"access-control-allow-methods", ", ".join(methods).encode()),
            (b"access-control-allow-headers", _ALLOWED_HEADERS),
            (b"access-control-max-age", _PREFLIGHT_SECONDS),
        ]
        return Response(204, b"", headers=allowed)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
