"""The addresses on which the service answers: calls, probes, scrapes of metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from runrecovery_service.config.settings import Settings
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.listen_address import bound_address
from runrecovery_service.rpc.server import GrpcServer

if TYPE_CHECKING:  # not imported where they are off
    from runrecovery_service.http.server import HttpServer
    from runrecovery_service.metrics.http_server import MetricsServer

log = structlog.get_logger()


@dataclass(slots=True, kw_only=True, eq=False)
class Listeners:
    """The servers of one start.

    Attributes:
        max_connections: client connections at one time, for the log.
        http: answers the contract as JSON over HTTP; None: HTTP is off.
        probe: answers health checks on a separate address; None: none is configured.
        metrics: answers scrapes; None: metrics are off.
    """

    settings: Settings
    server: GrpcServer
    max_connections: int
    http: HttpServer | None
    probe: GrpcServer | None
    metrics: MetricsServer | None

    async def bind(self, *, keeper_ended: Callable[[asyncio.Task[None]], None]) -> None:
        """Listen on every address, and answer from now on.

        Args:
            keeper_ended: called when a task that keeps a server reachable has ended.

        Raises:
            ListenFailed: an address is taken or not permitted.
        """
        settings = self.settings
        port = await self.server.bind(settings.listen, keeper_ended=keeper_ended)
        addresses = {"address": bound_address(settings.listen, port)}
        if self.http is not None:
            port = await self.http.bind(settings.http_listen, keeper_ended=keeper_ended)
            addresses["http_address"] = bound_address(settings.http_listen, port)
        if self.probe is not None:
            port = await self.probe.bind(settings.probe_listen, keeper_ended=keeper_ended)
            addresses["probe_address"] = bound_address(settings.probe_listen, port)
        if self.metrics is not None:
            port = await self.metrics.bind(settings.metrics_listen)
            addresses["metrics_address"] = bound_address(settings.metrics_listen, port)
        log.info("service.listening", max_connections=self.max_connections, **addresses)

    async def stop_calls(self, *, grace_s: float) -> None:
        """Accept no more calls, and wait up to `grace_s` seconds for open ones."""
        servers = [self.server.stop(grace_s=grace_s)]
        if self.http is not None:
            servers.append(self.http.stop(grace_s=grace_s))
        await asyncio.gather(*servers)

    async def stop_probes(self) -> None:
        """Stop answering probes on the separate address."""
        if self.probe is not None:
            await self.probe.stop(grace_s=0.0)

    async def stop_metrics(self) -> None:
        """Stop answering scrapes."""
        if self.metrics is not None:
            await self.metrics.stop()
