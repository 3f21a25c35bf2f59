"""FairWakeup lets one waiter pass in each round of the event loop, and skips waiters that left."""

from __future__ import annotations

import asyncio

from runrecovery_service.rpc.fair_wakeup import FairWakeup


async def test_waiters_pass_one_per_round_in_the_order_of_their_arrival() -> None:
    wakeup, passed = FairWakeup(), list[tuple[int, int]]()
    round_of_the_loop = 0

    async def pass_by(number: int) -> None:
        await wakeup.wait_turn()
        passed.append((round_of_the_loop, number))

    crowd = [asyncio.create_task(pass_by(number)) for number in range(10)]
    while not all(one.done() for one in crowd):
        await asyncio.sleep(0)
        round_of_the_loop += 1

    assert [number for _, number in passed] == list(range(10))
    assert len({when for when, _ in passed}) == 10


async def test_a_single_waiter_passes_at_once() -> None:
    wakeup = FairWakeup()
    await wakeup.wait_turn()
    await asyncio.sleep(0)
    coming = wakeup.wait_turn()

    try:
        coming.send(None)
    except StopIteration:
        waited = False
    else:
        waited = True
    coming.close()
    assert not waited


async def test_a_waiter_that_gave_up_blocks_no_later_waiter() -> None:
    wakeup = FairWakeup()
    first, gone, behind = (asyncio.create_task(wakeup.wait_turn()) for _ in range(3))
    await asyncio.sleep(0)
    gone.cancel()

    await asyncio.wait_for(behind, 10)
    assert (first.done(), gone.cancelled()) == (True, True)
