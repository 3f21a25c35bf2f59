"""Watchers in the room: what is left of one that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

import pytest
from runrecovery_service.rpc import watching
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.storage.changes import Changes

RUN, OTHER = 7, 8

Waiting = Callable[[asyncio.Event], AbstractContextManager[None]]
Telling = Callable[[], None]


def of_run() -> tuple[Waiting, Telling]:
    changes = Changes()
    return lambda event: changes.of_run(RUN, event), lambda: changes.announce([OTHER, RUN])


def of_decisions() -> tuple[Waiting, Telling]:
    changes = Changes()
    return changes.of_decisions, changes.announce_decisions


def of_gate() -> tuple[Waiting, Telling]:
    gate = Gate()
    return gate.following, gate.drain


@pytest.mark.parametrize("make", [of_run, of_decisions, of_gate])
async def test_who_waits_is_woken_and_who_was_cancelled_is_not(
    make: Callable[[], tuple[Waiting, Telling]],
) -> None:
    waits_for, tell = make()
    stays, goes = asyncio.Event(), asyncio.Event()

    async def wait(event: asyncio.Event) -> None:
        with waits_for(event):
            await event.wait()

    staying, going = (asyncio.create_task(wait(event)) for event in (stays, goes))
    await asyncio.sleep(0)
    going.cancel()
    await ended(going)
    tell()

    await asyncio.wait_for(staying, 10)
    assert (stays.is_set(), goes.is_set()) == (True, False)


async def ended(task: Awaitable[None]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await task


def test_what_nobody_waits_for_any_more_is_not_looked_at() -> None:
    changes, first, second = Changes(), asyncio.Event(), asyncio.Event()
    with changes.of_run(RUN, first):
        with changes.of_run(RUN, second), changes.of_decisions(second):
            assert (changes.runs_watched, changes.decisions_watched) == ([RUN], True)
        assert (changes.runs_watched, changes.decisions_watched) == ([RUN], False)
    assert changes.runs_watched == []


async def test_the_change_of_one_run_wakes_nobody_who_waits_for_another() -> None:
    changes, mine, other = Changes(), asyncio.Event(), asyncio.Event()
    with changes.of_run(RUN, mine), changes.of_run(OTHER, other):
        changes.announce([RUN])

    assert (mine.is_set(), other.is_set()) == (True, False)


async def test_what_only_wakes_a_watcher_puts_off_no_sign_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "BOOKMARK_S", 0.3)
    quiet, woken = watching._Quiet(told=True), asyncio.Event()
    woken.set()  # and is never cleared: it wakes all the time

    async with asyncio.timeout(30):
        while quiet.left_s:
            await quiet.wait(woken)
            await asyncio.sleep(0)

    quiet.told()
    assert quiet.left_s > 0


async def test_who_goes_on_is_told_at_once_that_it_does() -> None:
    assert watching._Quiet(told=False).left_s == 0
