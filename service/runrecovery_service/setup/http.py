"""Builds the HTTP server. Imported only when `http_listen` is set."""

from __future__ import annotations

from runrecovery_service.config.settings import Settings
from runrecovery_service.http.app import HttpApp
from runrecovery_service.http.calls import ContractCalls
from runrecovery_service.http.origins import OriginPolicy
from runrecovery_service.http.server import HttpLimits, HttpServer
from runrecovery_service.http.tls import HttpTls
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.server_setup import Contract
from runrecovery_service.rpc.tls import ServerTls


def build_http(
    settings: Settings,
    contract: Contract,
    gate: Gate,
    *,
    tls: ServerTls | None,
    max_connections: int,
) -> HttpServer:
    """Return the server of `http_listen`; it does not listen yet."""
    app = HttpApp(
        calls=ContractCalls(contract),
        gate=gate,
        origins=OriginPolicy.make(settings.http_listen, settings.http_hosts, settings.http_origins),
        max_request_bytes=settings.max_request_bytes,
    )
    limits = HttpLimits(max_connections=max_connections, stall_s=settings.watch_stall_s)
    return HttpServer(app, limits, None if tls is None else HttpTls(tls))
