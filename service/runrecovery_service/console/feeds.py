"""Reports changes of the data on a page. Pages with the same data and caller share a feed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Final, TypeAlias

import grpc
import structlog

from runrecovery_service.console.contract import Contract
from runrecovery_service.http.calls import CallFailed
from runrecovery_service.lazy_dataclass import dataclass

POLL_S: Final = 1.0
"""Pause between two reads of a list. The contract has no events for changes of a list."""
POLL_SHARE: Final = 20.0
"""The shortest pause after a read, as a multiple of the time that the read took."""
RETRY_S: Final = 1.0
"""Pause after a failed read of a feed."""
ENDED_POLL_S: Final = 10.0
"""Pause between two reads of an ended run, which can still be reopened or removed."""

log = structlog.get_logger()

Versions: TypeAlias = Callable[[Contract], AsyncGenerator[str, None]]
"""Yields a version that stands for the data of a page: at once, and after each change."""


class AccessEnded(Exception):
    """The caller has lost the right to see the data."""


@dataclass(frozen=True, slots=True)
class FeedKey:
    """The data of a feed, and the caller whose rights it uses."""

    topic: str
    authorization: str | None


class _Feed:
    """The current version of the data. One task updates it for all readers."""

    def __init__(self) -> None:
        self.version = ""
        self.is_ended = False
        self.readers = 0
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def publish(self, version: str) -> None:
        if version != self.version:
            self.version = version
            self._wake()

    def end(self) -> None:
        self.is_ended = True
        self._wake()

    async def wait(self, seconds: float) -> None:
        """Return after a change, or after this many seconds without a change."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Feeds:
    """All feeds with a reader. Use it on the event loop."""

    def __init__(self) -> None:
        self._feeds: dict[FeedKey, _Feed] = {}

    async def versions(
        self, key: FeedKey, contract: Contract, watch: Versions, beat_s: float
    ) -> AsyncGenerator[str, None]:
        """Yield each version of the data. Without a change, repeat the current one every `beat_s`.

        Raises:
            AccessEnded: the caller has lost the right to see the data.
        """
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = _Feed()
            feed.task = asyncio.create_task(_keep(feed, contract, watch))
        feed.readers += 1
        try:
            while not feed.is_ended:
                seen = feed.version
                if seen:
                    yield seen
                if feed.version == seen and not feed.is_ended:
                    await feed.wait(beat_s)
            raise AccessEnded
        finally:
            feed.readers -= 1
            if not feed.readers:
                self._feeds.pop(key, None)
                if feed.task is not None:
                    feed.task.cancel()


async def _keep(feed: _Feed, contract: Contract, watch: Versions) -> None:
    """Publish versions until the caller has lost the access. After any other failure, try again."""
    while True:
        try:
            async with aclosing(watch(contract)) as versions:
                async for version in versions:
                    feed.publish(version)
        except CallFailed as error:
            if error.code in _NO_ACCESS:
                feed.end()
                return
            feed.publish("away")
        except Exception:  # even a defect must not end the feed while pages are open
            log.exception("console.feed_failed")
            feed.publish("away")
        await asyncio.sleep(RETRY_S)


_NO_ACCESS: Final = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
}


def polled(look: Callable[[Contract], Awaitable[str]]) -> Versions:
    """Return a feed that reads its data at intervals."""

    async def versions(contract: Contract) -> AsyncGenerator[str, None]:
        loop = asyncio.get_running_loop()
        while True:
            begun_s = loop.time()
            yield await look(contract)
            await asyncio.sleep(max(POLL_S, POLL_SHARE * (loop.time() - begun_s)))

    return versions


def watched_run(run_id: str) -> Versions:
    """Return the feed of a run, whose version is the number of the run's latest event."""

    async def versions(contract: Contract) -> AsyncGenerator[str, None]:
        while True:
            async with aclosing(contract.watch_run(run_id)) as updates:
                async for update in updates:
                    yield str(update.sequence)
            await asyncio.sleep(ENDED_POLL_S)

    return versions
