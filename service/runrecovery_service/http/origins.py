"""Refuses requests that a browser sends for a page that must not reach this service.

Such a page can reach an address to which only the browser's user has access, in two ways:
- The page sends requests across origins. Browsers name the origin of the page in `Origin`.
- The page has a name that its owner lets resolve to the address of this service (DNS rebinding).
  The request then has that name as `Host`. An IP address cannot be rebound, so it needs no check.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final

from runrecovery_service.http.asgi import Headers, Response, Scope, header_values
from runrecovery_service.lazy_dataclass import dataclass

_AUTHORITY: Final = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[^:\[\]]+)(?::(?P<port>[0-9]{1,5}))?")

PREFLIGHT_MAX_AGE_S: Final = 7200
ALLOWED_HEADERS: Final = (
    b"authorization, connect-protocol-version, connect-timeout-ms, content-type, traceparent,"
    b" x-user-agent"
)


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """The hosts and origins that requests are allowed to name.

    Attributes:
        hosts: names of this service, in lower case and without a port.
        origins: origins of other sites whose pages are allowed to call the contract.
    """

    hosts: frozenset[str]
    origins: frozenset[str]

    @classmethod
    def make(
        cls, listen: str, hosts: tuple[str, ...] = (), origins: tuple[str, ...] = ()
    ) -> OriginPolicy:
        """Return the policy of a service with this `http_listen`."""
        own = listen.rpartition(":")[0].lower()
        return cls(frozenset({"localhost", own, *hosts}), frozenset(origins))

    def refusal(self, scope: Scope) -> Response | None:
        """Return the response to a request that is refused, or None if the request is allowed."""
        named = header_values(scope, b"host")
        if len(named) != 1 or not self._is_host(named[0]):
            return _text(421, "this service is not known under the Host of the request")
        origins = header_values(scope, b"origin")
        if not origins or self._is_same_origin(origins, named[0]):
            return None
        if len(origins) != 1 or origins[0] not in self.origins:
            return _text(403, "pages of this Origin may not call the service")
        return None

    def cors_headers(self, scope: Scope) -> Headers:
        """Return the headers that let a page of another origin read the response."""
        if not self.origins:
            return ()
        origins = header_values(scope, b"origin")
        if len(origins) != 1 or origins[0] not in self.origins:
            return ((b"vary", b"origin"),)
        return ((b"vary", b"origin"), (b"access-control-allow-origin", origins[0].encode()))

    def preflight(self, scope: Scope) -> Response | None:
        """Return the response to a preflight request of a browser; None for any other request."""
        asked = header_values(scope, b"access-control-request-method")
        if scope["method"] != "OPTIONS" or not asked or not header_values(scope, b"origin"):
            return None
        return Response(
            200,
            content_type=b"text/plain",
            headers=(
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-allow-headers", ALLOWED_HEADERS),
                (b"access-control-max-age", b"%d" % PREFLIGHT_MAX_AGE_S),
            ),
        )

    def _is_host(self, value: str) -> bool:
        found = _AUTHORITY.fullmatch(value.lower())
        if found is None:
            return False
        host = found["host"].removesuffix(".")
        try:
            ip_address(host.strip("[]"))
        except ValueError:
            return host in self.hosts
        return True

    @staticmethod
    def _is_same_origin(origins: list[str], host: str) -> bool:
        # The scheme is not compared, because a proxy can end TLS.
        return len(origins) == 1 and origins[0].lower().partition("://")[2] == host.lower()


def _text(status: int, sentence: str) -> Response:
    return Response(status, f"{sentence}\n".encode(), b"text/plain; charset=utf-8")
