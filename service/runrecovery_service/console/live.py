"""The streams of server-sent events that keep pages up to date.

A stream sends the current version of the data on its page. A page that shows another version loads
itself again. So the page misses no change, neither before its stream begins nor while the service
is down.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, suppress
from typing import Final

from runrecovery.v1.recovery_service_pb2 import GetRecoveryStatusResponse, Instance
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from runrecovery_service.console.contract import Contract
from runrecovery_service.console.feeds import (
    AccessEnded,
    FeedKey,
    Feeds,
    Versions,
    polled,
    watched_run,
)
from runrecovery_service.console.output import CHANNELS, follow_output
from runrecovery_service.console.pages import Site, output_offset
from runrecovery_service.console.run_list import RunFilter, is_run_id
from runrecovery_service.console.visitors import Visitor
from runrecovery_service.console.waiting import version_of, waiting_request
from runrecovery_service.http.calls import CallFailed
from runrecovery_service.rpc.gate import Gate

BEAT_S: Final = 10.0
"""The longest pause between two messages of a stream, by which the page knows that the stream
works."""
MAX_STREAMS: Final = 1000
MAX_STREAMS_OF_CALLER: Final = 100
"""The most streams of one caller. Streams share their calls of the contract, so `max_calls` does
not limit the streams."""


def service_version(status: GetRecoveryStatusResponse) -> str:
    """Return the version of pages about the service: its state and its recovery's progress."""
    report = status.reconciliation
    return (
        f"{status.instance}-{status.epoch}-{status.state}-{report.reconciliation_id}"
        f"-{report.state}-{report.runs_scanned}-{len(report.phases)}"
    )


def instances_version(instances: Iterable[Instance]) -> str:
    """Return the version of the page of instances. A renewal of a lease does not change it."""
    digest = hashlib.sha256()
    for instance in instances:
        told = Instance()
        told.CopyFrom(instance)
        told.ClearField("lease_until")
        digest.update(told.SerializeToString(deterministic=True))
    return digest.hexdigest()[:16]


class Live:
    """The endpoints of the streams."""

    def __init__(self, site: Site, gate: Gate) -> None:
        self._site = site
        self._gate = gate
        self._feeds = Feeds()
        self._streams: Counter[str] = Counter()

    async def waiting(self, request: Request) -> Response:
        """Follow the questions that wait."""
        token = request.query_params.get("page", "")

        async def look(contract: Contract) -> str:
            return version_of((await contract.list_runs(waiting_request(token))).runs)

        return await self._follow(request, f"waiting {token}", polled(look))

    async def service(self, request: Request) -> Response:
        """Follow the state of the service."""

        async def look(contract: Contract) -> str:
            return service_version(await contract.status())

        return await self._follow(request, "service", polled(look))

    async def instances(self, request: Request) -> Response:
        """Follow the instances."""

        async def look(contract: Contract) -> str:
            return instances_version(await contract.instances())

        return await self._follow(request, "instances", polled(look))

    async def runs(self, request: Request) -> Response:
        """Follow a page of the list of runs."""
        wanted = RunFilter.of(request.query_params)
        token = request.query_params.get("page", "")

        async def look(contract: Contract) -> str:
            return version_of((await contract.list_runs(wanted.request(token))).runs)

        return await self._follow(request, wanted.address(page=token), polled(look))

    async def run(self, request: Request) -> Response:
        """Follow a run, and its output if the page shows the end of the output."""
        run_id = request.path_params["run_id"]
        if not is_run_id(run_id):
            return PlainTextResponse("no such run", 404)
        return await self._follow(request, f"run {run_id}", watched_run(run_id), run_id)

    async def _follow(
        self, request: Request, topic: str, watch: Versions, output_of: str = ""
    ) -> Response:
        visitor = await self._site.visitor_of(request)
        if visitor is None:
            return PlainTextResponse("log in first", 401)
        if self._is_full(visitor):
            return PlainTextResponse("too many pages are open", 503)
        events = self._events(request, visitor, topic, watch, output_of)
        return StreamingResponse(events, media_type="text/event-stream")

    def _is_full(self, visitor: Visitor) -> bool:
        of_caller = self._streams[visitor.name] if visitor.name else 0
        return of_caller >= MAX_STREAMS_OF_CALLER or self._streams.total() >= MAX_STREAMS

    async def _events(
        self, request: Request, visitor: Visitor, topic: str, watch: Versions, output_of: str
    ) -> AsyncIterator[str]:
        contract = self._site.contract_of(visitor)
        key = FeedKey(topic, visitor.origin.authorization)
        versions = self._feeds.versions(key, contract, watch, BEAT_S)
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=4)
        tasks = [
            asyncio.create_task(_put_versions(queue, versions)),
            asyncio.create_task(_put_stop(queue, self._gate)),
        ]
        query = request.query_params
        offset = output_offset(query.get("from"))
        if output_of and query.get("channel") in CHANNELS and offset is not None:
            attempt = output_offset(query.get("attempt")) or 0
            pieces = follow_output(
                contract, output_of, query["channel"], attempt=min(attempt, 2**31 - 1), start=offset
            )
            tasks.append(asyncio.create_task(_put_output(queue, pieces)))
        self._streams[visitor.name] += 1
        try:
            yield "retry: 1000\n\n"
            while event := await queue.get():
                yield event
        finally:
            self._streams[visitor.name] -= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _put_versions(queue: asyncio.Queue[str], versions: AsyncGenerator[str, None]) -> None:
    async with aclosing(versions):
        try:
            async for version in versions:
                await queue.put(f"event: version\ndata: {version}\n\n")
        except AccessEnded:
            await queue.put("event: end\ndata: \n\n")
    await queue.put("")


async def _put_stop(queue: asyncio.Queue[str], gate: Gate) -> None:
    """End the stream when the service stops. The page connects again."""
    while not gate.ends_streams:
        await gate.change.wait()
    await queue.put("")


async def _put_output(
    queue: asyncio.Queue[str], pieces: AsyncGenerator[tuple[str, int], None]
) -> None:
    with suppress(CallFailed):  # the page says why there is no output
        async with aclosing(pieces):
            async for html, end in pieces:
                data = json.dumps({"html": html, "end": end})
                await queue.put(f"event: output\ndata: {data}\n\n")
