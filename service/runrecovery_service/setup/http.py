"""Builds the HTTP server. Imported only when `http_listen` is set."""

from __future__ import annotations

from runrecovery_service.config.settings import Settings
from runrecovery_service.http.app import HttpApp
from runrecovery_service.http.asgi import Application
from runrecovery_service.http.calls import ContractCalls
from runrecovery_service.http.origins import OriginPolicy
from runrecovery_service.http.server import HttpLimits, HttpServer
from runrecovery_service.http.tls import HttpTls
from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.certificate_reload import ServerTls
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.server_setup import Contract


def build_http(
    settings: Settings,
    contract: Contract,
    gate: Gate,
    *,
    tls: ServerTls | None,
    guard: CallerGuard,
    max_connections: int,
) -> HttpServer:
    """Return the server of `http_listen`; it does not listen yet."""
    calls = ContractCalls(contract)
    app = HttpApp(
        calls=calls,
        gate=gate,
        origins=OriginPolicy.make(settings.http_listen, settings.http_hosts, settings.http_origins),
        max_request_bytes=settings.max_request_bytes,
        pages=_console(settings, calls, gate, guard) if settings.console else None,
    )
    limits = HttpLimits(max_connections=max_connections, stall_s=settings.watch_stall_s)
    return HttpServer(app, limits, None if tls is None else HttpTls(tls))


def _console(
    settings: Settings, calls: ContractCalls, gate: Gate, guard: CallerGuard
) -> Application:
    # Imported here: templates and their engine are for the console alone.
    from runrecovery_service.console.site import build_console  # noqa: PLC0415
    from runrecovery_service.console.visitors import Visitors  # noqa: PLC0415

    visitors = Visitors(
        guard, has_tls=settings.tls is not None, may_all_write=settings.insecure_listen
    )
    return build_console(calls, visitors, gate)
