"""Slots limit the living processes, and runs get them in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word
from support.engines import GOOD_ENGINES, RESUMABLE
from support.service import Home
from support.waiting import until

QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}
TIMEOUT_S: Final = 10.0

NewHome = Callable[..., Home]


def statuses(api: Api) -> list[str]:
    """Return the status of every run, oldest first."""
    listed = api.runs.ListRuns(pb.ListRunsRequest(page_size=1000), timeout=TIMEOUT_S)
    return [status_word(run) for run in reversed(listed.runs)]


def most_at_once(home: Home) -> int:
    """Return the highest number of launches that were open at one time, by the launch records."""
    leases = home.rows("SELECT created_at, closed_at FROM process_lease")
    return max(sum(1 for began, ended in leases if began <= at < ended) for at, _ in leases)


def test_never_more_processes_than_slots_and_all_runs_get_one(new_home: NewHome) -> None:
    slots, most = 2, 0
    home = new_home(max_concurrent=slots)
    _, api = home.start()
    # Of two engines: the limit of one engine must not stand in for the limit of all.
    waiting = [api.create(name, {"hold": True}).run_id for name in ("resumable", "sticky") * 3]

    def full() -> bool:
        nonlocal most
        alive = len(home.agents())
        most = max(most, alive, statuses(api).count("RUNNING"))
        return alive >= min(slots, len(waiting)) <= statuses(api).count("RUNNING")

    while waiting:
        until(full, "as many processes live as there are slots")
        oldest = waiting.pop(0)
        assert api.get(oldest).holds_slot
        api.cancel(oldest)
        assert status_word(api.until_ended(oldest)) == "CANCELED"
        assert home.agents_of(oldest) == []

    assert most == slots
    assert most_at_once(home) == slots
    assert home.agents() == []


def test_an_engine_with_a_limit_of_its_own_does_not_block_the_others(new_home: NewHome) -> None:
    narrow = replace(RESUMABLE, more={**RESUMABLE.more, "max_concurrent": 1})
    home = new_home(max_concurrent=3, engines={"narrow": narrow, "wide": RESUMABLE})
    _, api = home.start()

    held = [api.create("narrow", {"hold": True}) for _ in range(3)]
    other = api.create("wide", {"hold": True})
    api.until_status(other.run_id, "RUNNING")
    api.until_status(held[0].run_id, "RUNNING")
    until(lambda: len(home.agents()) == 2, "two processes live")

    assert statuses(api) == ["RUNNING", "QUEUED", "QUEUED", "RUNNING"]
    api.cancel(held[0].run_id)
    api.until_status(held[1].run_id, "RUNNING")
    assert statuses(api) == ["CANCELED", "RUNNING", "QUEUED", "RUNNING"]


def test_runs_start_in_the_order_in_which_they_were_created(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1)
    _, api = home.start()
    first = api.create("resumable", {"hold": True})
    runs = [api.create("resumable", {}) for _ in range(6)]

    api.cancel(first.run_id)
    ended = [api.until_ended(run.run_id) for run in runs]

    starts = [run.started_at.ToNanoseconds() for run in ended]
    assert starts == sorted(starts)
    assert len(set(starts)) == len(starts)


def test_an_answered_run_queues_behind_earlier_runs(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1)
    _, api = home.start()
    waiting = api.create("resumable", {"questions": [QUESTION]})
    api.until_status(waiting.run_id, "WAITING_USER")
    holds = api.create("resumable", {"hold": True})
    api.until_status(holds.run_id, "RUNNING")
    before = api.create("resumable", {})
    api.reply(waiting.run_id, 1, "yes")
    after = api.create("resumable", {})

    api.cancel(holds.run_id)
    ended = [api.until_ended(run.run_id) for run in (before, waiting, after)]

    ends = [run.ended_at.ToNanoseconds() for run in ended]
    assert ends == sorted(ends)


def test_a_resumable_wait_releases_its_slot_and_a_sticky_wait_keeps_it(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1)
    _, api = home.start()
    resumable = api.create("resumable", {"questions": [QUESTION]})
    waits = api.until_status(resumable.run_id, "WAITING_USER")
    assert (waits.holds_slot, home.agents()) == (False, [])

    sticky = api.create("sticky", {"questions": [QUESTION]})
    waits = api.until_status(sticky.run_id, "WAITING_USER")
    queued = api.create("resumable", {})
    api.reply(resumable.run_id, 1, "yes")

    assert waits.holds_slot
    assert home.agents() == home.agents_of(sticky.run_id)
    assert statuses(api) == ["QUEUED", "WAITING_USER", "QUEUED"]
    api.reply(sticky.run_id, 1, "yes")
    for run in (sticky, resumable, queued):
        assert status_word(api.until_ended(run.run_id)) == "SUCCEEDED"


def test_a_full_queue_refuses_runs_until_there_is_room(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1, max_queued=2, engines=GOOD_ENGINES)
    _, api = home.start()
    holds = api.create("resumable", {"hold": True})
    api.until_status(holds.run_id, "RUNNING")
    queued = [api.create("resumable", {}) for _ in range(2)]

    refusal = refused(lambda: api.create("resumable", {}, run_id="too-many"))

    assert (refusal.code.name, refusal.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert refusal.retry_after_s == 1.0
    assert refused(lambda: api.get("too-many")).reason == "RUN_NOT_FOUND"
    api.cancel(queued[0].run_id)
    room = api.create("resumable", {}, run_id="in-time")
    api.cancel(holds.run_id)
    assert status_word(api.until_ended(room.run_id)) == "SUCCEEDED"


def test_a_repeated_create_is_answered_though_the_queue_is_full(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1, max_queued=1)
    _, api = home.start()
    api.until_status(api.create("resumable", {"hold": True}).run_id, "RUNNING")
    request_id = "0190a0c0-0000-7000-8000-000000000001"
    first = api.create("resumable", {}, request_id=request_id)

    assert api.create("resumable", {}, request_id=request_id) == first


def test_a_reply_is_accepted_though_the_queue_is_full(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1, max_queued=1)
    _, api = home.start()
    waiting = api.create("resumable", {"questions": [QUESTION]})
    api.until_status(waiting.run_id, "WAITING_USER")
    holds = api.create("resumable", {"hold": True})
    api.until_status(holds.run_id, "RUNNING")
    api.create("resumable", {})

    api.reply(waiting.run_id, 1, "yes")
    api.cancel(holds.run_id)

    assert status_word(api.until_ended(waiting.run_id)) == "SUCCEEDED"


def test_every_end_of_a_run_releases_its_slot(home: Home, api: Api) -> None:
    bad = ("exits_3", "garbage_line", "exits_silently", "leaves_children", "result_then_hangs")
    for _ in range(2):
        runs = [api.create(engine, {}) for engine in bad]
        runs += [api.create("resumable", {"hold": True}) for _ in range(3)]
        for run in runs[len(bad) :]:
            api.cancel(run.run_id)
        ended = [api.until_ended(run.run_id) for run in runs]
        assert not any(run.holds_slot for run in ended)

    held = [api.create("resumable", {"hold": True}) for _ in range(6)]
    for run in held:
        api.until_status(run.run_id, "RUNNING")
    for run in held:
        api.cancel(run.run_id)
    for run in held:
        api.until_ended(run.run_id)
    assert home.agents() == []
