"""Outcomes of writes reach their callers on the event loop, many with one wake-up of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from runrecovery_service.storage.loop_answers import LoopAnswer, LoopAnswers

NONE: frozenset[int] = frozenset()


def ignore(answer: LoopAnswer[Any]) -> None:
    """Do nothing when an answer ends."""


async def test_outcomes_that_come_together_share_one_wake_up_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, wake_ups = asyncio.get_running_loop(), list[object]()

    class CountingLoop:
        create_future = loop.create_future

        def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
            wake_ups.append(callback)
            loop.call_soon_threadsafe(callback)

    answers = LoopAnswers(CountingLoop())  # type: ignore[arg-type] # what LoopAnswers uses of a loop
    together = [LoopAnswer[int](answers, ignore) for _ in range(16)]

    def set_all() -> None:
        for at, answer in enumerate(together):
            answer.set_result((at, NONE))

    set_all()  # while the loop is busy

    assert await asyncio.gather(*(answer.future for answer in together)) == list(range(16))
    assert len(wake_ups) == 1

    later = LoopAnswer[int](answers, ignore)
    later.set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await later.future
    assert len(wake_ups) == 2


async def test_an_unexpected_error_at_the_end_of_one_answer_does_not_delay_the_others() -> None:
    unexpected = list[object]()
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: unexpected.append(type(context["exception"]))
    )
    answers = LoopAnswers(asyncio.get_running_loop())

    def fail(answer: LoopAnswer[int]) -> None:
        raise ZeroDivisionError

    bad, good = LoopAnswer[int](answers, fail), LoopAnswer[int](answers, ignore)
    bad.set_result((1, NONE))
    good.set_result((2, NONE))

    assert await asyncio.wait_for(good.future, 30) == 2
    assert unexpected == [ZeroDivisionError]


def test_an_outcome_that_comes_after_the_end_of_the_loop_raises_no_error() -> None:
    loop = asyncio.new_event_loop()
    answer = LoopAnswer[int](LoopAnswers(loop), ignore)
    loop.close()

    answer.set_result((1, NONE))

    assert answer.done()
