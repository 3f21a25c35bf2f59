"""Epochs only rise, and one service at a time has the lease of an instance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from runrecovery_service.domain.errors import ClaimLost, Fenced
from runrecovery_service.domain.lease import LEASE_TTL_S
from runrecovery_service.domain.start_errors import Held
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore, boot


def test_every_start_takes_the_next_epoch(store: ServiceStore) -> None:
    assert [store.restart().epoch, store.restart().epoch] == [2, 3]


TOLD = (
    "SELECT engines, max_running, version, stopped_at, taken_over_by, taken_over_at,"
    " takeover_done_at, host_return_until FROM instance"
)


def test_a_start_records_its_engines_slots_and_version(store: ServiceStore) -> None:
    instances.claim(
        store.db,
        boot(engines=("demo", "codex"), max_running=4, version="0.2.0"),
        now=store.now,
    )

    assert store.rows(TOLD) == [('["codex","demo"]', 4, "0.2.0", None, None, None, None, None)]


def test_a_renewal_replaces_the_engines_that_the_start_recorded(store: ServiceStore) -> None:
    instances.renew(store.db, store.owner, engines=("new", "demo"))

    assert store.rows("SELECT engines FROM instance") == [('["demo","new"]',)]


def test_a_planned_stop_is_recorded_by_the_clock_of_the_database(store: ServiceStore) -> None:
    now_us = store.db.dialect.now_us
    instances.resign(store.db, store.owner)

    assert store.rows(
        f"SELECT lease_until, CASE WHEN stopped_at BETWEEN {now_us} - 60000000 AND {now_us}"  # noqa: S608
        " THEN 1 ELSE 0 END FROM instance"
    ) == [(0, 1)]


def test_a_start_forgets_the_stop_and_the_takeover_of_the_epoch_before(
    store: ServiceStore,
) -> None:
    store.db.execute(
        "UPDATE instance SET stopped_at = 1, taken_over_by = 'b', taken_over_at = 2,"
        " takeover_done_at = 3, host_return_until = 4"
    )

    store.restart()

    assert store.rows(TOLD) == [("[]", 0, "", None, None, None, None, None)]


ELSEWHERE = {"lock_id": "another boot/1:2"}
LOST, AGAIN = {"boot_token": "lost"}, {"boot_token": "again"}


@pytest.mark.parametrize(
    "change",
    [
        ELSEWHERE,
        {"lock_id": "boot/1:3"},
        {"lock_id": None},
        {"host_id": "elsewhere", "data_dir": "/other", "lock_id": "elsewhere/1:2"},
    ],
)
def test_a_live_lease_refuses_a_start_unless_a_lock_proves_its_holder_dead(
    shared: ServiceStore, change: dict[str, Any]
) -> None:
    before = shared.dump("instance", "instance_epoch")

    with pytest.raises(Held) as held:
        instances.claim(shared.db, boot(**change), now=shared.now)

    assert "pid 7 on host host (/d)" in str(held.value)
    assert before == shared.dump("instance", "instance_epoch")


def test_a_start_without_a_lock_cannot_prove_a_holder_dead(shared: ServiceStore) -> None:
    shared.db.execute("UPDATE instance SET lock_id = NULL")

    with pytest.raises(Held):
        instances.claim(shared.db, boot(lock_id=None), now=shared.now)


@pytest.mark.parametrize("change", [{}, {"host_id": "renamed"}, {"data_dir": "/by/a/link"}])
def test_a_start_that_holds_the_lock_of_the_holder_takes_over_at_once(
    store: ServiceStore, change: dict[str, str]
) -> None:
    assert instances.claim(store.db, boot(**change), now=store.now).epoch == 2


@pytest.mark.parametrize("change", [{"host_id": "elsewhere"}, {"data_dir": "/other"}, ELSEWHERE])
def test_a_start_that_holds_the_sqlite_file_takes_over_at_once(
    store: ServiceStore, change: dict[str, str]
) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL has no lock that all machines see")
    a_year = f"UPDATE instance SET lease_until = {store.db.dialect.now_us} + 31536000000000"  # noqa: S608
    with store.db.transaction():
        store.db.execute(a_year)

    claimed = instances.claim(store.db, boot(**change), now=store.now)

    assert claimed == Owner("default", 2, "t")
    ((left,),) = store.rows(f"SELECT lease_until - {store.db.dialect.now_us} FROM instance")  # noqa: S608
    assert 0 < left <= 15_000_000


def test_a_released_lease_is_free_for_every_host(store: ServiceStore) -> None:
    instances.resign(store.db, store.owner)

    assert instances.claim(store.db, boot(**ELSEWHERE), now=store.now).epoch == 2


def test_a_renewed_lease_refuses_other_starts(shared: ServiceStore) -> None:
    instances.resign(shared.db, shared.owner)
    instances.renew(shared.db, shared.owner)

    with pytest.raises(Held):
        instances.claim(shared.db, boot(**ELSEWHERE), now=shared.now)


def test_an_older_epoch_is_fenced(store: ServiceStore) -> None:
    old = store.owner
    store.restart()

    for refused in (instances.renew, instances.demand_current):
        with pytest.raises(Fenced) as fenced:
            refused(store.db, old)
        assert type(fenced.value) is Fenced
    instances.demand_current(store.db, store.owner)


@pytest.mark.parametrize("change", ["UPDATE {} SET epoch = 1", "DELETE FROM {}"])
def test_a_claim_that_the_store_has_lost_is_not_reported_as_superseded(
    store: ServiceStore, change: str
) -> None:
    owner = store.restart()
    with store.db.transaction():
        for table in ("instance", "instance_epoch"):
            store.db.execute(change.format(table))

    for refused in (instances.renew, instances.demand_current):
        with pytest.raises(ClaimLost, match="no longer has this start's claim"):
            refused(store.db, owner)


def test_an_older_epoch_cannot_release_the_lease_of_a_newer_one(store: ServiceStore) -> None:
    old = store.owner
    store.restart()
    before = store.dump("instance")

    instances.resign(store.db, old)

    assert before == store.dump("instance")


def test_a_start_whose_claim_a_failover_lost_is_fenced_by_one_of_the_same_epoch(
    store: ServiceStore,
) -> None:
    lost = instances.claim(store.db, boot(**LOST), now=store.now)
    for table in ("instance", "instance_epoch"):
        store.db.execute(f"UPDATE {table} SET epoch = 1, boot_token = 't'")  # noqa: S608
    again = instances.claim(store.db, boot(**AGAIN), now=store.now)
    before = store.dump("instance", "instance_epoch")

    for refused in (instances.renew, instances.demand_current):
        with pytest.raises(Fenced) as fenced:
            refused(store.db, lost)
        assert type(fenced.value) is Fenced
    instances.resign(store.db, lost)

    assert (lost.epoch, again.epoch) == (2, 2)
    assert before == store.dump("instance", "instance_epoch")
    instances.demand_current(store.db, again)
    instances.renew(store.db, again)


def test_starts_at_once_get_epochs_of_their_own(store: ServiceStore) -> None:
    use = partial(instances.claim, store.db, boot(), now=store.now)

    claimed = store.all_at_once([use] * 12, threads=12)

    assert list(range(2, 14)) == sorted(o.epoch for o in claimed if isinstance(o, Owner))


def test_first_starts_at_once_get_epochs_of_their_own(store: ServiceStore) -> None:
    use = partial(instances.claim, store.db, boot("new"), now=store.now)

    claimed = store.all_at_once([use] * 12, threads=12)

    epochs = sorted(owner.epoch for owner in claimed if isinstance(owner, Owner))
    first = 2 if store.db.dialect.kind is DatabaseKind.SQLITE else 1  # SQLite: above `default`
    assert epochs == list(range(first, first + 12))


def test_the_lease_ends_by_the_clock_of_the_database(
    database: Database, store: ServiceStore
) -> None:
    row = database.fetch_one(f"SELECT lease_until - {database.dialect.now_us} FROM instance")  # noqa: S608

    assert row is not None
    assert 0 < row[0] <= LEASE_TTL_S * 1e6


# -- who waits for whom on PostgreSQL ------------------------------------------------------------


@contextmanager
def in_threads(
    store: ServiceStore, count: int
) -> Iterator[Callable[[Callable[[], object]], Future[object]]]:
    """Yield a function that runs a use case in a new thread with its own connection."""

    def alone(use: Callable[[], object]) -> object:
        try:
            return use()
        finally:
            store.db.close()

    with ThreadPoolExecutor(count) as pool:
        yield lambda use: pool.submit(alone, use)


def until_waiting(store: ServiceStore, count: int) -> None:
    """Return once so many connections of this database wait for a lock."""
    sql = (
        "SELECT count(*) FROM (SELECT pg_stat_clear_snapshot()) AS anew, pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    ends = time.monotonic() + 30
    while store.rows(sql) != [(count,)]:
        assert time.monotonic() < ends, f"{store.rows(sql)} connections wait, not {count}"
        time.sleep(0.01)


def test_a_renewal_does_not_wait_for_writers_that_wait_for_a_table(shared: ServiceStore) -> None:
    create = partial(shared.create, max_queued=100)
    with in_threads(shared, 25) as start:
        with shared.db.transaction():
            shared.db.execute("LOCK TABLE run IN ACCESS EXCLUSIVE MODE")
            creates = [start(create) for _ in range(24)]
            until_waiting(shared, 24)

            start(partial(instances.renew, shared.db, shared.owner)).result()

            assert not any(future.done() for future in creates)
        for future in creates:
            future.result()
    assert shared.rows("SELECT count(*) FROM run") == [(24,)]


def test_a_claim_waits_for_a_writer_and_fences_it_afterwards(shared: ServiceStore) -> None:
    old = shared.owner
    with in_threads(shared, 1) as start:
        with shared.db.transaction():
            instances.demand_current(shared.db, old)
            claim = start(shared.restart)
            until_waiting(shared, 1)
            assert not claim.done()
        assert claim.result() == Owner("default", 2, "t")
    with pytest.raises(Fenced):
        shared.create(owner=old)
    with pytest.raises(Fenced):
        instances.renew(shared.db, old)


@pytest.mark.parametrize("write", ["create", "renew"])
def test_a_writer_during_a_claim_waits_for_it_and_is_fenced(
    shared: ServiceStore, write: str
) -> None:
    old = shared.owner
    uses: dict[str, Callable[[], object]] = {
        "create": partial(shared.create, owner=old),
        "renew": partial(instances.renew, shared.db, old),
    }
    with in_threads(shared, 1) as start:
        with shared.db.transaction():
            shared.restart()
            late = start(uses[write])
            until_waiting(shared, 1)
            assert not late.done()
        with pytest.raises(Fenced):
            late.result()
    assert shared.rows("SELECT count(*) FROM run") == [(0,)]


def test_a_claim_against_a_living_instance_is_refused_without_waiting_for_its_writers(
    shared: ServiceStore,
) -> None:
    with in_threads(shared, 1) as start, shared.db.transaction():
        instances.demand_current(shared.db, shared.owner)

        claim = start(partial(instances.claim, shared.db, boot(**ELSEWHERE), now=shared.now))

        with pytest.raises(Held):
            claim.result()
