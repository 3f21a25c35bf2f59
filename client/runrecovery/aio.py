"""The client for asyncio. `runrecovery.client` has the same methods and describes them in full."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from runrecovery import _requests as requests
from runrecovery import _waiting as waiting
from runrecovery._channel import (
    DEFAULT_MAX_RECEIVE_BYTES,
    DEFAULT_TIMEOUT_S,
    ChannelOption,
    Tls,
    channel_options,
    required_target,
    secured,
)
from runrecovery._recovery import AsyncRecovery
from runrecovery._requests import ServingStatus
from runrecovery._runs import AsyncRuns
from runrecovery._token import BearerToken, demand_encrypted
from runrecovery._wire import AsyncWire
from runrecovery.v1 import run_pb2

__all__ = ["AsyncHealth", "AsyncRecovery", "AsyncRunRecoveryClient", "AsyncRuns"]


class AsyncHealth:
    """grpc.health.v1; see `runrecovery.client.Health`."""

    def __init__(self, wire: AsyncWire) -> None:
        self._wire = wire

    async def check(self, service: str = "", *, timeout_s: float | None = None) -> ServingStatus:
        """Check once, without retries and without waiting for a server."""
        return await self._wire.unary(requests.check_health(service), timeout_s=timeout_s)


class AsyncRunRecoveryClient:
    """A connection to the service for one event loop. Create it inside that loop and reuse it.

    The arguments are those of `RunRecoveryClient`; `channel` is one of `grpc.aio`.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        channel: grpc.aio.Channel | None = None,
        tls: Tls | bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_receive_bytes: int = DEFAULT_MAX_RECEIVE_BYTES,
        options: Sequence[ChannelOption] = (),
    ) -> None:
        asyncio.get_running_loop()  # grpc would take any loop, and hang on the wrong one
        if channel is not None and target is not None:
            raise TypeError("give a target or a channel, not both")
        bearer = BearerToken(token=token, file=token_file)
        settings = channel_options(
            target=target, max_receive_bytes=max_receive_bytes, options=options
        )
        self._owns_channel = channel is None
        if channel is None:
            credentials, settings = secured(settings, tls=tls, credentials=credentials)
            channel = _open(required_target(target), credentials, settings, bearer)
        self._channel = channel
        self._timeout_s = timeout_s
        wire = AsyncWire(self._channel, timeout_s=timeout_s, token=bearer)
        self.runs = AsyncRuns(wire)
        self.recovery = AsyncRecovery(wire)
        self.health = AsyncHealth(wire)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; open calls fail. Your own channel stays open."""
        if self._owns_channel:
            await self._channel.close()

    async def wait_until_ready(self, timeout_s: float | None = 60.0, *, service: str = "") -> None:
        """Return once the service is SERVING; raise DeadlineExceeded after `timeout_s`."""
        wait = waiting.wait_until_serving(service, timeout_s=timeout_s)
        while True:
            with wait.attempt():
                limit_s = wait.attempt_timeout_s(self._timeout_s)
                if wait.is_over(await self.health.check(service, timeout_s=limit_s)):
                    return
            await asyncio.sleep(wait.pause_s())

    async def wait_for_run(
        self, run_id: str, *, timeout_s: float | None, or_waiting: bool = False
    ) -> run_pb2.Run:
        """Return a run once it has ended, across restarts of the service."""
        wait = waiting.wait_for_run(run_id, timeout_s=timeout_s, or_waiting=or_waiting)
        while True:
            with wait.attempt():
                limit_s = wait.attempt_timeout_s(self._timeout_s)
                run = await self.runs.get(run_id, timeout_s=limit_s)
                if wait.is_over(run):
                    return run
            await asyncio.sleep(wait.pause_s())


def _open(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[ChannelOption],
    token: BearerToken,
) -> grpc.aio.Channel:
    if credentials is None:
        demand_encrypted(token, target)
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)
