"""A configured webhook, with its files read."""

from __future__ import annotations

import ssl
from dataclasses import field

from runrecovery_service.domain.webhook import WebhookFilter
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.webhooks.address_policy import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The address, the secrets and the limits of one webhook.

    Attributes:
        filter: the name of the webhook, and the events that it receives.
        host, port, target: the parts of its URL. The target is path and query, and may be secret.
        tls: the TLS settings, which verify the certificate of the host; None: plain HTTP.
        authorities: the certificate authorities of `tls`, in PEM; None: those of the system.
        keys: the signing keys, one for each of at most two secrets.
        private: the networks in which private addresses are allowed.
        insecure_http: whether plain HTTP may go to public addresses.
        timeout_s: the time limit of one try, from resolving the host name to the status of the
            response.
        give_up_s: the age of an event, in seconds, after which a failing delivery is given up.
    """

    filter: WebhookFilter
    host: str
    port: int
    target: str = field(repr=False)
    tls: ssl.SSLContext | None = field(compare=False)
    authorities: str | None = field(default=None, repr=False)
    keys: tuple[bytes, ...] = field(repr=False)
    private: tuple[Network, ...] = ()
    insecure_http: bool = False
    timeout_s: float
    give_up_s: float

    @property
    def name(self) -> str:
        """The name of the webhook."""
        return self.filter.name

    @property
    def origin(self) -> str:
        """The URL without its path and query."""
        scheme, default = ("https", 443) if self.tls else ("http", 80)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}" if self.port == default else f"{scheme}://{host}:{self.port}"
