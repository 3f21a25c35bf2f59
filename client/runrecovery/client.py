"""The client for threads. `runrecovery.aio` is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Self

import grpc

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
from runrecovery._recovery import Recovery
from runrecovery._requests import ServingStatus
from runrecovery._runs import Runs
from runrecovery._token import BearerToken, demand_encrypted
from runrecovery._wire import Wire
from runrecovery.v1 import run_pb2

__all__ = ["Health", "Recovery", "RunRecoveryClient", "Runs"]


class Health:
    """grpc.health.v1."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def check(self, service: str = "", *, timeout_s: float | None = None) -> ServingStatus:
        """Check once, without retries and without waiting for a server.

        Args:
            service: a health name of the service; empty: the service as a whole.

        Raises:
            NotFound: the service has no such health name.
            Unavailable: there is no connection.
        """
        return self._wire.unary(requests.check_health(service), timeout_s=timeout_s)


class RunRecoveryClient:
    """A connection to the service. Safe to share between threads; create one and reuse it.

    Args:
        target: `host:port` or any gRPC target.
        channel: your own channel instead of a target (see `channel_options`). You close it.
        tls: how the connection is encrypted. True: with the roots that gRPC trusts, and without a
            certificate of the client. False: not encrypted, unless `credentials` are given.
        credentials: any other credentials of gRPC, instead of `tls`.
        token: the caller's bearer token. It is never sent to another machine without encryption.
        token_file: the file that holds the token, instead of `token`. It is read for each call, so
            that the token can be replaced.
        timeout_s: default deadline of unary calls, in seconds.
        max_receive_bytes: size of the largest response to accept.
        options: further gRPC channel options; they override the client's own.

    Raises:
        OSError: a file of `tls` cannot be read.
        ValueError: the token is malformed, or would be sent to another machine unencrypted.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        channel: grpc.Channel | None = None,
        tls: Tls | bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_receive_bytes: int = DEFAULT_MAX_RECEIVE_BYTES,
        options: Sequence[ChannelOption] = (),
    ) -> None:
        settings = channel_options(
            target=target, max_receive_bytes=max_receive_bytes, options=options
        )
        if channel is not None and target is not None:
            raise TypeError("give a target or a channel, not both")
        bearer = BearerToken(token=token, file=token_file)
        self._owns_channel = channel is None
        if channel is None:
            credentials, settings = secured(settings, tls=tls, credentials=credentials)
            channel = _open(required_target(target), credentials, settings, bearer)
        self._channel = channel
        self._timeout_s = timeout_s
        wire = Wire(self._channel, timeout_s=timeout_s, token=bearer)
        self.runs = Runs(wire)
        self.recovery = Recovery(wire)
        self.health = Health(wire)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; open calls fail. Your own channel stays open."""
        if self._owns_channel:
            self._channel.close()

    def wait_until_ready(self, timeout_s: float | None = 60.0, *, service: str = "") -> None:
        """Return once the service is SERVING, which means that its recovery has committed.

        Args:
            timeout_s: seconds to wait, also for a server that does not run yet; None: no limit.
            service: a health name of the service; empty: the service as a whole.

        Raises:
            DeadlineExceeded: the service was not SERVING in time.
            NotFound: the service has no such health name.
        """
        wait = waiting.wait_until_serving(service, timeout_s=timeout_s)
        while True:
            with wait.attempt():
                limit_s = wait.attempt_timeout_s(self._timeout_s)
                if wait.is_over(self.health.check(service, timeout_s=limit_s)):
                    return
            time.sleep(wait.pause_s())

    def wait_for_run(
        self, run_id: str, *, timeout_s: float | None, or_waiting: bool = False
    ) -> run_pb2.Run:
        """Return a run once it has ended, across restarts of the service.

        This polls at growing intervals of up to 2 s.

        Args:
            run_id: the run.
            timeout_s: seconds to wait; None: no limit.
            or_waiting: also return the run when it is WAITING_USER.

        Raises:
            DeadlineExceeded: the run has not ended in time.
            RunNotFound: no run has this id.
            RunQuarantined: the run is quarantined and will not end by itself.
        """
        wait = waiting.wait_for_run(run_id, timeout_s=timeout_s, or_waiting=or_waiting)
        while True:
            with wait.attempt():
                run = self.runs.get(run_id, timeout_s=wait.attempt_timeout_s(self._timeout_s))
                if wait.is_over(run):
                    return run
            time.sleep(wait.pause_s())


def _open(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[ChannelOption],
    token: BearerToken,
) -> grpc.Channel:
    if credentials is None:
        demand_encrypted(token, target)
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)
