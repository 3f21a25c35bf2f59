"""The gRPC server: listens, is replaced if it dies, and stops."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import grpc
import structlog

from runrecovery_service.domain.start_errors import ThreadsRefused
from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.certificate_reload import ServerTls
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.listen_address import Holder, ListenAddress, parse_listen_address
from runrecovery_service.rpc.open_calls import OpenCalls
from runrecovery_service.rpc.server_sockets import ServerSockets

CHECK_INTERVAL_S: Final = 0.2
"""How often the server is checked for having ended by itself."""
STOP_CHECK_S: Final = 0.01
"""How often a server that stops is checked."""
FLUSH_S: Final = 0.05
"""Time for gRPC to send the last responses before the connections are closed."""

log = structlog.get_logger()


class GrpcServer:
    """The gRPC server of one start, replaced by a new one if it dies. Use it on the event loop.

    A call whose path is not UTF-8 ends the server of grpc.aio (seen in grpcio 1.85): it closes its
    port for good, while the process keeps running. Anybody who reaches the port could do that, so a
    new server takes its place within `CHECK_INTERVAL_S`; callers see UNAVAILABLE and retry. A
    server whose Unix socket file was removed is replaced as well.
    """

    def __init__(
        self,
        build: Callable[[], grpc.aio.Server],
        calls: OpenCalls,
        *,
        gate: Gate | None = None,
        tls: ServerTls | None = None,
        guard: CallerGuard | None = None,
    ) -> None:
        """Make the server; it does not listen yet.

        Args:
            calls: the calls that a stop waits for.
            gate: gets the information whether the service still has its address; None: no gate
                does.
            tls: None: connections are not encrypted.
            guard: at a stop, the server makes the guard answer its waiting refusals, and log the
                calls that it has refused.
        """
        self._build = build
        self._guard = guard
        self._tls = tls
        self._gate = gate
        self._calls = calls
        self._server = build()
        self._sockets: ServerSockets | None = None
        self._address: ListenAddress | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._spare: int | None = None
        self._holder_unknown = False
        self._last_replace_error = ""

    async def bind(
        self, listen: str, *, keeper_ended: Callable[[asyncio.Task[None]], None] | None = None
    ) -> int:
        """Listen on the address and answer from now on; return the port.

        Args:
            keeper_ended: called when the task that keeps the server reachable has ended.

        Raises:
            ListenFailed: the address is taken or not permitted.
        """
        address = parse_listen_address(listen)
        port = await self._start(address)
        self._keeper = asyncio.create_task(self._watch_server(address))
        if keeper_ended is not None:
            self._keeper.add_done_callback(keeper_ended)
        # Reserved for the stop, which needs a descriptor to list the sockets.
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return port

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new connections, wait up to `grace_s` seconds for open calls, and close.

        Calls on open connections are answered until then. No call gets CANCELLED.
        """
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        if self._guard is not None:
            self._guard.end_waiting()
        try:
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.gather(self._keeper, return_exceptions=True)
                # A server that has just ended by itself has no calls left.
                if await self._wait_for_end(STOP_CHECK_S) is None:
                    await self._finish_calls(grace_s)
        finally:
            try:
                await self._end()
            finally:
                if self._guard is not None:
                    self._guard.log_refusals()
                if self._address is not None:
                    self._address.release()

    async def _finish_calls(self, grace_s: float) -> None:
        if self._sockets is not None:
            self._sockets.stop_listening()
        deadline = asyncio.get_running_loop().time() + grace_s
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._calls.wait_until_none()
        await asyncio.sleep(FLUSH_S)
        if self._sockets is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._sockets.wait_until_sent()

    async def _end(self) -> None:
        """Close the connections, then gRPC's server.

        In this order: a closing gRPC server answers every call that reaches it with CANCELLED.
        """
        try:
            if self._sockets is not None:
                await self._sockets.close_connections()
        finally:
            await self._server.stop(None)

    async def _start(self, address: ListenAddress) -> int:
        port, self._sockets = await address.bind(self._bind_port)
        self._address = address
        await self._server.start()
        return port

    def _bind_port(self, address: str) -> int:
        if self._tls is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._tls.credentials())

    async def _watch_server(self, address: ListenAddress) -> None:
        """Watch the server. When it ended by itself or lost its address, replace it."""
        while True:
            error = await self._wait_for_end(CHECK_INTERVAL_S)
            if error is not None:
                log.error("rpc.server_ended", error=f"{type(error).__name__}: {error}")
            elif not self._must_replace(self._holder(address)):
                continue
            with suppress(Exception):  # the old server has ended; only the new one matters
                await self._end()
            while not await self._replace(address):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(CHECK_INTERVAL_S)

    def _holder(self, address: ListenAddress) -> Holder:
        """Return which process has the address; OURS while that cannot be determined."""
        try:
            holder = address.holder()
        except OSError as error:
            if not self._holder_unknown:
                log.warning("rpc.address_not_seen", error=error.strerror)
            self._holder_unknown = True
            return Holder.OURS
        self._holder_unknown = False
        return holder

    def _must_replace(self, holder: Holder) -> bool:
        """Return whether the server must be replaced because nobody has its address.

        When another process has the address, a new server could not bind it. Health is then
        NOT_SERVING for connected callers until the address is free again.
        """
        if holder is Holder.NOBODY:
            log.error("rpc.address_lost", holder="nobody")
        elif self._gate is not None:
            if holder is Holder.ANOTHER and self._gate.listens:
                log.error("rpc.address_lost", holder="another service")
            self._gate.set_listens(listens=holder is not Holder.ANOTHER)
        return holder is Holder.NOBODY

    async def _wait_for_end(self, seconds: float) -> Exception | None:
        """Return the error that ended the server; None when it still runs after this time."""
        try:
            await self._server.wait_for_termination(seconds)
        except Exception as error:  # noqa: BLE001 - after any error the server answers nobody
            return error
        return None

    async def _replace(self, address: ListenAddress) -> bool:
        self._server = self._build()
        try:
            await self._start(address)
        except Exception as error:  # noqa: BLE001 - otherwise the service would never listen again
            if str(error) != self._last_replace_error:
                self._last_replace_error = str(error)
                log.error("rpc.server_not_replaced", error=str(error))  # noqa: TRY400 - one line without a traceback
            await self._server.stop(None)  # a part of the address can be bound
            return False
        self._last_replace_error = ""
        log.warning("rpc.server_replaced")
        return True


def start_grpc() -> None:
    """Start the thread of gRPC that every server of this process needs. Call it on the event loop.

    Without this call the first server starts the thread, and ends the process with a segmentation
    fault when the system refuses it (seen in grpcio 1.85).

    Raises:
        ThreadsRefused: the system refuses the thread.
    """
    try:
        grpc.aio.init_grpc_aio()
    except RuntimeError as error:
        raise ThreadsRefused(str(error)) from error
