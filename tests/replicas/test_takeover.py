"""An instance whose lease has run out is taken over once, and never after it has come back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from replicas.dead_instance import AGAIN, Pair, crash, rules_of, set_lease, until_blocked
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import (
    dead_instances,
    instances,
    launch_records,
    newer_words,
    recovery_apply,
    takeover,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS
from runrecovery_service.storage.takeover import TakeoverFenced
from storage.service_store import Crash, boot, one_of_each
from support.waiting import until


def test_a_takeover_gets_past_a_transaction_that_a_frozen_instance_has_left_open(
    pair: Pair,
) -> None:
    pair.dead.create()
    pair.expire()
    has_begun, is_over = threading.Event(), threading.Event()

    def freeze() -> None:
        with pair.dead.db.transaction():
            instances.demand_current(pair.dead.db, pair.dead.owner)
            has_begun.set()
            is_over.wait(60)
            instances.demand_current(pair.dead.db, pair.dead.owner)

    with ThreadPoolExecutor(1) as pool:
        frozen = pool.submit(freeze)
        assert has_begun.wait(60)
        try:
            taken = takeover.begin(pair.db, pair.rules, "a")
        finally:
            is_over.set()
        with pytest.raises(DRIVER_ERRORS):  # the server has closed the connection
            frozen.result()

    assert taken is not None


# -- whom ----------------------------------------------------------------------------------------


def test_an_instance_is_overdue_once_its_lease_has_run_out_by_the_clock_of_the_database(
    pair: Pair,
) -> None:
    pair.dead.create()
    set_lease(pair.dead.db, "a", 3_600_000_000)
    alive = dead_instances.find_dead(pair.db, pair.rules)

    pair.expire()

    assert (alive, dead_instances.find_dead(pair.db, pair.rules)) == ([], ["a"])


def test_an_instance_without_work_is_left_alone(pair: Pair) -> None:
    pair.dead.end(pair.dead.running(), Succeeded({}))
    pair.expire()

    assert dead_instances.find_dead(pair.db, pair.rules) == []


def test_an_instance_that_was_stopped_may_start_again_for_the_time_of_a_lease(pair: Pair) -> None:
    pair.dead.waiting()
    instances.resign(pair.dead.db, pair.dead.owner)
    stopped = dead_instances.find_dead(pair.db, pair.rules)

    pair.dead.db.execute("UPDATE instance SET stopped_at = stopped_at - 16000000 WHERE name = 'a'")

    assert (stopped, dead_instances.find_dead(pair.db, pair.rules)) == ([], ["a"])


def test_no_instance_takes_itself_over(pair: Pair) -> None:
    pair.dead.create(owner=pair.owner)
    pair.expire("b")

    assert dead_instances.find_dead(pair.db, pair.rules) == []
    assert takeover.begin(pair.db, pair.rules, "b") is None


def test_an_instance_that_lacks_an_engine_sees_which_ones_are_needed(pair: Pair) -> None:
    pair.dead.create(engine="other")
    pair.dead.create()

    unknown = dead_instances.engines_of(pair.db, "a")
    instances.renew(pair.dead.db, pair.dead.owner, engines=("demo",))

    assert unknown == {"demo", "other"}
    assert dead_instances.engines_of(pair.db, "a") == {"demo"}


# -- the beginning -------------------------------------------------------------------------------


def begin_beside(pair: Pair) -> tuple[list[object], threading.Thread]:
    """Return a thread that begins the takeover, and the list that gets the result."""
    begun: list[object] = []

    def begin() -> None:
        begun.append(takeover.begin(pair.db, pair.rules, "a"))
        pair.db.close()

    return begun, threading.Thread(target=begin)


def test_a_lease_that_is_renewed_at_the_last_moment_prevents_the_takeover(pair: Pair) -> None:
    """The renewal has not committed yet when the takeover reads the lease."""
    pair.dead.waiting()
    pair.expire()
    assert dead_instances.find_dead(pair.db, pair.rules) == ["a"]
    begun, thread = begin_beside(pair)

    with pair.dead.db.transaction():
        instances.renew(pair.dead.db, pair.dead.owner, ttl_s=60.0)
        thread.start()
        until_blocked(pair.dead.db, thread)
    thread.join()

    assert begun == [None]
    instances.demand_current(pair.dead.db, pair.dead.owner)


def test_a_lease_that_runs_out_within_the_transaction_counts_as_run_out(pair: Pair) -> None:
    """The clock of a transaction stands still in `now()`, and moves on in `clock_timestamp()`."""
    pair.dead.waiting()
    set_lease(pair.dead.db, "a", 200_000)
    over = (
        "SELECT 1 FROM instance WHERE name = 'a'"
        " AND lease_until < extract(epoch FROM clock_timestamp()) * 1000000"
    )

    with pair.db.transaction():
        early = takeover.begin(pair.db, pair.rules, "a")
        until(lambda: pair.db.fetch_all(over), "the lease has run out")
        late = takeover.begin(pair.db, pair.rules, "a")

    assert early is None
    assert late is not None


def test_of_many_successors_at_once_one_takes_over(pair: Pair) -> None:
    pair.dead.waiting()
    pair.expire()
    successors = [pair, *(pair.third(f"c{number}") for number in range(4))]
    together = threading.Barrier(len(successors))

    def begin(one: Pair) -> object:
        together.wait()
        try:
            return takeover.begin(one.db, one.rules, "a")
        finally:
            one.db.close()

    with ThreadPoolExecutor(len(successors)) as pool:
        begun = list(pool.map(begin, successors))

    assert sum(one is not None for one in begun) == 1
    assert pair.dead.rows("SELECT epoch FROM instance_epoch WHERE name = 'a'") == [(2,)]


def test_a_takeover_waits_for_a_write_of_the_dead_instance_and_fences_the_next(pair: Pair) -> None:
    """The dead instance is only slow: its transaction has begun before its lease ran out."""
    run = pair.dead.create()
    pair.dead.create()
    pair.expire()
    pair.dead.db.guard(partial(instances.demand_current, owner=pair.dead.owner))
    begun, thread = begin_beside(pair)

    with pair.dead.db.transaction():
        pair.dead.cancel(run)
        thread.start()
        until_blocked(pair.dead.db, thread)
        assert begun == []
    thread.join()

    assert begun != [None]
    assert pair.dead.get(run).status is RunStatus.CANCELED
    with pytest.raises(Fenced):
        pair.dead.create()


def test_a_takeover_sees_what_a_newer_version_has_written_until_the_fence(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newer_words, "is_newer", lambda _: True)
    run = pair.dead.create()
    pair.expire()
    pair.dead.db.guard(partial(instances.demand_current, owner=pair.dead.owner))
    begun, thread = begin_beside(pair)

    with pair.dead.db.transaction():
        pair.dead.set(run, status="PAUSED")
        thread.start()
        until_blocked(pair.dead.db, thread)
    thread.join()

    assert begun == [None]
    assert pair.dead.rows("SELECT epoch FROM instance_epoch WHERE name = 'a'") == [(1,)]


# -- the middle ----------------------------------------------------------------------------------


def in_the_middle(patch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen after the first batch of a takeover, before the second one."""
    apply, batches = recovery_apply.apply_batch, iter(range(1000))

    def apply_or_more(*args: Any, **named: Any) -> Any:
        if next(batches) == 1:
            happens()
        return apply(*args, **named)

    patch.setattr(recovery_apply, "apply_batch", apply_or_more)


def test_a_takeover_that_is_cut_off_stays_overdue_and_the_next_successor_completes_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was not decided stays claimable: nothing is logged and skipped."""
    pair.keep_history()
    one_of_each(pair.dead)
    pair.dead.create(owner=pair.owner)
    pair.expire()
    in_the_middle(monkeypatch, crash)
    with pytest.raises(Crash):
        pair.take_over()
    third = pair.third()
    assert dead_instances.find_dead(pair.db, pair.rules) == ["a"], "the successor tries again"
    assert dead_instances.find_dead(third.db, third.rules) == [], "no other one disturbs it"
    pair.expire("b")
    assert sorted(dead_instances.find_dead(third.db, third.rules)) == ["a", "b"]

    third.take_over()
    third.recover(third.begin("b"))

    assert dead_instances.find_dead(third.db, third.rules) == []
    decided = "SELECT count(DISTINCT run) FROM recovery_event"
    assert pair.dead.rows(decided) == [(11,)]
    assert pair.dead.rows("SELECT count(*) FROM run WHERE owner = 'b' AND ended_at IS NULL") == [
        (0,)
    ]
    assert pair.stale_writes() == []


@contextmanager
def locked(pair: Pair, run_key: int) -> Iterator[None]:
    """Let another session hold the lock of a run."""
    holds, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with pair.dead.db.transaction():
            pair.dead.db.fetch_one("SELECT 1 FROM run WHERE id = ? FOR UPDATE", (run_key,))
            holds.set()
            enough.wait()
        pair.dead.db.close()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def test_a_locked_batch_keeps_no_other_batch_from_its_decisions(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [pair.dead.create(**AGAIN) for _ in range(5)]
    pair.expire()
    pair.db.execute("SET lock_timeout = '50ms'")

    with locked(pair, made[0].key), pytest.raises(DRIVER_ERRORS):
        pair.take_over(batch_rows=2)

    assert [owner for _, owner, _ in rules_of(pair)] == ["a", "a", "b", "b", "b"]
    assert dead_instances.find_dead(pair.db, pair.rules) == ["a"]
    pair.take_over(batch_rows=2)
    assert [owner for _, owner, _ in rules_of(pair)] == ["b"] * 5


def test_a_successor_that_is_taken_over_hands_on_what_it_answers_for(pair: Pair) -> None:
    pair.dead.waiting()
    pair.expire()
    pair.take_over()
    third = pair.third()
    pair.dead.create(owner=pair.owner)
    pair.expire("b")

    third.recover(third.begin("b"))

    assert pair.dead.rows("SELECT name, taken_over_by FROM instance ORDER BY name") == [
        ("a", "c"), ("b", "c"), ("c", None),
    ]  # fmt: skip


def test_the_own_restart_of_the_dead_instance_fences_the_takeover_and_not_the_successor(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no lease, even on another host: the epoch is enough."""
    pair.keep_history()
    for _ in range(5):
        pair.dead.create(**AGAIN)
    pair.expire()

    def restart() -> None:
        elsewhere = boot("a", lock_id="another boot/1:2")
        pair.dead.owner = instances.claim(pair.dead.db, elsewhere, now=pair.dead.now)

    in_the_middle(monkeypatch, restart)

    with pytest.raises(TakeoverFenced):
        pair.take_over()
    tally = pair.dead.apply_recovery()

    assert tally.decisions == {"requeued": 2}
    assert [owner for _, owner, _ in rules_of(pair)] == ["b", "b", "b", "a", "a"]
    states = "SELECT cause, state FROM reconciliation ORDER BY id"
    assert pair.dead.rows(states)[0] == ("TAKEOVER", "FAILED"), "no open report blocks the feed"
    assert pair.dead.take(owner=pair.owner) is not None
    assert pair.stale_writes() == []


def test_the_own_restart_waits_for_the_batch_that_is_under_way(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fence that is only read, and not locked, would let both write the same run."""
    pair.dead.create(**AGAIN)
    pair.expire()
    done: list[str] = []

    def claim() -> None:
        instances.claim(pair.dead.db, boot("a"), now=pair.dead.now)
        done.append("claimed")
        pair.dead.db.close()

    thread = threading.Thread(target=claim)

    def while_under_way(db: Database, _: object) -> None:
        thread.start()
        until_blocked(db, thread)
        done.append("decided")

    apply = recovery_apply.apply_batch
    monkeypatch.setattr(
        recovery_apply,
        "apply_batch",
        lambda *args, **named: apply(*args, **(named | {"report": while_under_way})),
    )
    with suppress(TakeoverFenced):  # after its batch, the takeover is over
        pair.take_over()
    thread.join()

    assert done == ["decided", "claimed"]


WRITES: dict[str, Callable[[Pair, Any], object]] = {
    "create": lambda pair, _: pair.dead.create(),
    "take": lambda pair, _: pair.dead.take(),
    "an end": lambda pair, turn: pair.dead.end(turn, Succeeded({})),
    "a session": lambda pair, turn: pair.dead.keep_session(turn),
    "a gate": lambda pair, turn: launch_records.record_gated(
        pair.dead.db, turn.launch, owner=pair.dead.owner, pid=1, start_ticks=1
    ),
    "a renewal": lambda pair, _: instances.renew(pair.dead.db, pair.dead.owner),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_dead_instance_that_wakes_up_writes_nothing(pair: Pair, what: str) -> None:
    turn = pair.dead.running(**AGAIN)
    pair.dead.create(**AGAIN)
    pair.dead.db.guard(partial(instances.demand_current, owner=pair.dead.owner))
    pair.expire()
    pair.take_over()
    before = pair.dead.dump()

    with pytest.raises(Fenced):
        WRITES[what](pair, turn)

    assert pair.dead.dump() == before
