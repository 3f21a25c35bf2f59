"""Pages that show the same to the same caller share one look at it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import grpc
import pytest
from runrecovery_service.console import feeds
from runrecovery_service.console.contract import Contract
from runrecovery_service.console.feeds import AccessEnded, FeedKey, Feeds, Versions, polled
from runrecovery_service.http.calls import CallFailed
from support.waiting import until_async

NOBODY = cast(Contract, None)
KEY = FeedKey("waiting", "Bearer a")


class Source:
    """Yields what a test publishes, and counts how often it is watched."""

    def __init__(self) -> None:
        self.watched = 0
        self.closed = 0
        self.updates: asyncio.Queue[str | CallFailed] = asyncio.Queue()

    async def watch(self, _: Contract) -> AsyncGenerator[str, None]:
        self.watched += 1
        try:
            while True:
                update = await self.updates.get()
                if isinstance(update, CallFailed):
                    raise update
                yield update
        finally:
            self.closed += 1


def follow(
    shared: Feeds, watch: Versions, key: FeedKey = KEY, beat_s: float = 60.0
) -> AsyncGenerator[str, None]:
    """Follow a topic."""
    return shared.versions(key, NOBODY, watch, beat_s)


async def test_readers_of_one_topic_share_one_watch_until_the_last_leaves() -> None:
    source, shared = Source(), Feeds()
    readers = [follow(shared, source.watch) for _ in range(3)]
    source.updates.put_nowait("1")

    assert [await anext(reader) for reader in readers] == ["1", "1", "1"]
    assert source.watched == 1
    for reader in readers[:2]:
        await reader.aclose()
    assert source.closed == 0
    await readers[2].aclose()
    await until_async(lambda: _is(source.closed == 1), "the watch is closed")


async def _is(fact: bool) -> bool:  # noqa: FBT001 - the only argument
    return fact


async def test_other_callers_have_a_watch_of_their_own() -> None:
    shared, watched = Feeds(), list[str]()

    def watch_for(name: str) -> Versions:
        async def watch(_: Contract) -> AsyncGenerator[str, None]:
            watched.append(name)
            yield name
            await asyncio.Event().wait()

        return watch

    async with (
        aclosing(follow(shared, watch_for("mine"))) as mine,
        aclosing(follow(shared, watch_for("theirs"), FeedKey("waiting", "Bearer b"))) as theirs,
    ):
        assert [await anext(mine), await anext(theirs)] == ["mine", "theirs"]
    assert watched == ["mine", "theirs"]


async def test_the_present_version_is_repeated_as_a_sign_of_life() -> None:
    source, shared = Source(), Feeds()
    source.updates.put_nowait("1")

    async with aclosing(follow(shared, source.watch, beat_s=0.001)) as reader:
        assert [await anext(reader) for _ in range(3)] == ["1", "1", "1"]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND])
async def test_a_feed_ends_when_its_caller_may_not_see_it_any_more(code: grpc.StatusCode) -> None:
    source, shared = Source(), Feeds()
    source.updates.put_nowait(CallFailed(code, "no"))

    async with aclosing(follow(shared, source.watch)) as reader:
        with pytest.raises(AccessEnded):
            await anext(reader)


async def test_a_feed_says_that_the_service_is_away_and_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "RETRY_S", 0.001)
    source, shared = Source(), Feeds()
    source.updates.put_nowait(CallFailed(grpc.StatusCode.UNAVAILABLE, "recovering"))

    async with aclosing(follow(shared, source.watch)) as reader:
        assert await anext(reader) == "away"
        source.updates.put_nowait("7")
        assert await anext(reader) == "7"
    assert source.watched == 2


async def test_a_look_that_takes_long_is_repeated_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses = list[float]()
    monkeypatch.setattr(feeds, "POLL_S", 0.0)
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    async def look(_: Contract) -> str:
        await sleep(0.02)
        return "1"

    async with aclosing(polled(look)(NOBODY)) as versions:
        monkeypatch.setattr(asyncio, "sleep", note)
        await anext(versions)
        await anext(versions)

    assert pauses[0] >= 0.02 * feeds.POLL_SHARE
