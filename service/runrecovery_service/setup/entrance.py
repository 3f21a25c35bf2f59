"""Builds access for callers: TLS, credentials, limits on connections."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import CallersRefused
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.open_files import OpenFiles
from runrecovery_service.rpc.callers import CallerGuard, CallerTable
from runrecovery_service.rpc.certificate_reload import ServerTls
from runrecovery_service.rpc.certificates import TlsUnusable
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.listen_address import count_addresses
from runrecovery_service.rpc.refusal_pace import RefusalPace
from runrecovery_service.rpc.server import GrpcServer
from runrecovery_service.rpc.server_limits import ServerLimits, calls_per_connection
from runrecovery_service.rpc.server_setup import build_probe_server
from runrecovery_service.setup.access import read_callers, tls_files

HTTP_CONNECTIONS: Final = 2_000
"""The most connections to `http_listen`, taken from those to `listen` (at most half of them)."""
METRICS_CONNECTIONS: Final = 32
"""The most connections to `metrics_listen`, taken from those to `listen` (at most half)."""
PROBE_CONNECTIONS: Final = 64
"""The most connections to `probe_listen`, taken from those to `listen` (at most half)."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """Access for callers: encryption, admission, and limits on connections.

    Attributes:
        connections: the most connections to all addresses of `listen` together.
        per_address: the most connections to one address of `listen`.
        http_connections: the most connections to `http_listen`; 0: it is not configured.
        metrics_connections: the most connections to `metrics_listen`; 0: it is not configured.
        probe_connections: the most connections to one address of `probe_listen`; 0: it is not
            configured.
        tls: None: connections are not encrypted.
        guard: admits callers. With an empty table, every connection may make every call.
    """

    connections: int
    per_address: int
    http_connections: int
    metrics_connections: int
    probe_connections: int
    tls: ServerTls | None
    guard: CallerGuard

    @classmethod
    def make(cls, settings: Settings, open_files: OpenFiles) -> Entrance:
        """Read the files of TLS and the tokens.

        Raises:
            TlsRefused, CallersRefused: the files of TLS, or the callers, cannot be used.
        """
        files, known = tls_files(settings), read_callers(settings)
        connections = open_files.connections
        probing = min(PROBE_CONNECTIONS, connections // 2) if settings.probe_listen else 0
        connections -= probing
        scraping = min(METRICS_CONNECTIONS, connections // 2) if settings.metrics_listen else 0
        connections -= scraping
        http = min(HTTP_CONNECTIONS, connections // 2) if settings.http_listen else 0
        connections -= http
        return cls(
            connections=connections,
            per_address=connections // count_addresses(settings.listen),
            http_connections=http,
            metrics_connections=scraping,
            probe_connections=probing and probing // count_addresses(settings.probe_listen),
            tls=None if files is None else ServerTls(files),
            guard=CallerGuard(
                CallerTable(known),
                # A proxy may need the other half of the connection for other callers.
                pace=RefusalPace(
                    max_waiting=calls_per_connection(settings.max_concurrent_streams) // 2
                ),
            ),
        )

    def limits(self, settings: Settings) -> ServerLimits:
        """Return the limits of the gRPC server, and of calls over every server."""
        return ServerLimits(
            max_concurrent_calls=settings.max_concurrent_calls,
            max_concurrent_streams=settings.max_concurrent_streams,
            stall_s=settings.watch_stall_s,
            max_request_bytes=settings.max_request_bytes,
            max_connections=self.per_address,
        )

    def prepare_callers(self, settings: Settings) -> Callable[[], None] | None:
        """Return a function that replaces the callers by those of new settings; None: no change.

        Raises:
            ConfigError: the callers cannot be used.
        """
        try:
            table = CallerTable(read_callers(settings))
        except CallersRefused as error:
            raise ConfigError(error.problems) from error
        if table.known == self.guard.table.known:
            return None
        return partial(self.guard.replace_table, table)

    def prepare_tls(self, settings: Settings) -> Callable[[], None] | None:
        """Return a function that replaces the TLS files by those of new settings; None without TLS.

        Raises:
            ConfigError: the files cannot be used.
        """
        files = tls_files(settings)
        if self.tls is None or files is None:
            return None
        try:
            return self.tls.prepare(files)
        except TlsUnusable as error:
            raise ConfigError((f"tls: {error}",)) from error

    def probe(self, gate: Gate) -> GrpcServer | None:
        """Return the server of `probe_listen`; None if it is not configured."""
        if not self.probe_connections:
            return None
        return build_probe_server(gate, max_connections=self.probe_connections)
