"""A SQLite store has one service: a start adopts the rows of all other instance names."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from runrecovery_service.domain.errors import Fenced, RunNotReopenable, RunOfAnotherInstance
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import RestartPolicy, Run, RunStatus
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import (
    adoption,
    decisions,
    instances,
    launch_records,
    reopening,
    reports,
)
from runrecovery_service.storage.adoption import Adopted
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import REASONS, ServiceStore, boot, one_of_each, reasons


def renamed(store: ServiceStore, name: str = "other") -> Owner:
    """Claim an epoch under another instance name, as the next start of a renamed service does."""
    store.owner = instances.claim(store.db, boot(name), now=store.tick())
    return store.owner


def adopt(store: ServiceStore, owner: Owner, *, rows: int = 1000) -> list[Adopted]:
    """Adopt the rows of other instances, and check that the adoption is recorded."""
    heard: list[Adopted] = []
    adopted = adoption.adopt(
        store.db,
        owner,
        record=lambda db, found: heard.extend(found),
        stopping=lambda: False,
        rows=rows,
    )
    assert list(adopted) == heard
    return heard


@pytest.fixture
def alone(store: ServiceStore) -> ServiceStore:
    """A store that only one service can use."""
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL is shared")
    return store


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_every_run_that_another_instance_left_is_decided(alone: ServiceStore, rows: int) -> None:
    made = one_of_each(alone)
    owner = renamed(alone)

    adopted = adopt(alone, owner, rows=rows)
    alone.apply_recovery()

    assert adopted == [Adopted(instance="default", runs=10, launches=4)]
    assert reasons(alone, made) == REASONS


def true_after(times: int) -> Callable[[], bool]:
    """Return a function that returns False for so many calls, and then True."""
    calls = itertools.count()
    return lambda: next(calls) >= times


def test_an_adoption_that_is_cut_off_at_any_statement_is_completed_by_the_next_start(
    alone: ServiceStore,
) -> None:
    made = one_of_each(alone)
    cuts = 0

    for steps in itertools.count():
        owner = renamed(alone, f"name-{steps % 3}")
        try:
            adoption.adopt(
                alone.db,
                owner,
                record=lambda db, found: None,
                stopping=true_after(steps),
                rows=1,
            )
            break
        except RecoveryInterrupted:
            cuts += 1
    alone.apply_recovery()

    assert cuts > 5
    assert reasons(alone, made) == REASONS
    assert alone.rows("SELECT name FROM instance") == [(alone.owner.instance,)]


def test_launches_of_another_instance_are_orphans(alone: ServiceStore) -> None:
    turn = alone.running()
    owner = renamed(alone)

    adopt(alone, owner)

    (orphan,) = launch_records.unclosed_launches(alone.db, owner, before=owner.epoch)
    assert orphan.key == turn.launch.key


def test_a_waiting_run_of_another_instance_accepts_a_reply(alone: ServiceStore) -> None:
    run = alone.waiting()
    adopt(alone, renamed(alone))
    alone.apply_recovery()

    assert alone.reply(run).status is RunStatus.QUEUED


def reopen(store: ServiceStore, run: Run) -> Run:
    return reopening.reopen(
        store.db,
        run.run_id,
        handle="found",
        session_type_of=lambda engine: "demo",
        wait_s_of=lambda _: 60.0,
        owner=store.owner,
        etag=None,
        receipt=None,
        due_in=store.due_in,
        steady=store.steady,
        now=store.tick(),
    )


def test_a_run_that_another_instance_lost_can_be_reopened(alone: ServiceStore) -> None:
    run = alone.waiting()
    alone.set(run, session_verdict="INVALID")
    alone.recover()
    adopt(alone, renamed(alone))
    alone.apply_recovery()

    assert reopen(alone, run).status is RunStatus.WAITING_USER


def test_reopening_an_ended_run_of_another_instance_is_refused_because_it_has_ended(
    alone: ServiceStore,
) -> None:
    run = alone.end(alone.running(), Succeeded({}))
    adopt(alone, renamed(alone))

    with pytest.raises(RunNotReopenable, match="no recovery failed it"):
        reopen(alone, run)


def test_a_repaired_quarantined_run_of_another_instance_is_decided(alone: ServiceStore) -> None:
    run = alone.create()
    alone.set(run, status="UNHEARD_OF")
    alone.recover()
    adopt(alone, renamed(alone))
    alone.set(run, status="QUEUED", recovery_state="NONE")
    alone.recover()

    recovered = alone.get(run).recovery
    assert recovered is not None
    assert recovered.recovery_reason == "queued_interrupted"


def test_the_epoch_of_a_new_instance_is_above_every_other(alone: ServiceStore) -> None:
    alone.restart()
    alone.restart()

    assert [renamed(alone).epoch, renamed(alone, "third").epoch] == [4, 5]


def test_an_instance_that_returns_gets_an_epoch_above_the_one_in_between(
    alone: ServiceStore,
) -> None:
    adopt(alone, renamed(alone))

    assert renamed(alone, "default") == Owner("default", 3, "t")


def test_an_adopted_instance_that_is_still_alive_is_fenced(alone: ServiceStore) -> None:
    old = alone.owner
    run = alone.waiting()
    adopt(alone, renamed(alone))

    with pytest.raises(Fenced):
        instances.renew(alone.db, old)
    with pytest.raises(Fenced):
        alone.create(owner=old)
    with pytest.raises(RunOfAnotherInstance):
        alone.cancel(run, owner=old)


def test_a_start_of_the_same_instance_adopts_nothing(alone: ServiceStore) -> None:
    one_of_each(alone)

    assert adopt(alone, alone.restart()) == []


def test_a_superseded_epoch_adopts_nothing(alone: ServiceStore) -> None:
    alone.create()
    stale = renamed(alone)
    renamed(alone)
    before = alone.dump()

    with pytest.raises(Fenced):
        adopt(alone, stale)

    assert alone.dump() == before


def test_processes_that_an_earlier_report_counted_are_not_counted_again(
    alone: ServiceStore,
) -> None:
    turn = alone.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=3)
    alone.restart()
    ended = LaunchEnd(exit_code=None, processes_ended=3, gone=True)
    launch_records.close(
        alone.db, turn.launch, ended, now=alone.tick(), reconciliation_key=begun(alone)
    )
    alone.apply_recovery()
    alone.db.execute("UPDATE reconciliation SET state = 'COMPLETED'")
    assert alone.take() is not None
    adopt(alone, renamed(alone))
    alone.apply_recovery()

    newest, before = decisions.history(alone.db, turn.run.run_id)
    assert (before.instance, before.processes_ended) == ("default", 3)
    assert (newest.instance, newest.processes_ended) == ("other", 0)


def test_unfinished_starts_of_another_instance_count_towards_safe_mode(alone: ServiceStore) -> None:
    since = alone.now
    begun(alone)
    adopt(alone, renamed(alone))
    begun(alone)

    next_start = Owner("other", 99, "next")
    assert reports.count_unfinished_starts(alone.db, next_start, since) == 2


def begun(store: ServiceStore) -> int:
    """Begin a start's report and return its key."""
    return store.open_report(Cause.STARTUP).reconciliation_key


# -- a shared store ----------------------------------------------------------------------------


@pytest.fixture
def shared(store: ServiceStore) -> ServiceStore:
    """A store that other services may use at the same time."""
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("SQLite has one service")
    return store


def test_nothing_is_adopted_from_a_shared_store(shared: ServiceStore) -> None:
    one_of_each(shared)
    before = shared.dump("run", "process_lease")

    assert adopt(shared, renamed(shared)) == []
    assert shared.dump("run", "process_lease") == before


def test_instances_in_a_shared_store_have_epochs_of_their_own(shared: ServiceStore) -> None:
    shared.restart()

    assert renamed(shared) == Owner("other", 1, "t")
