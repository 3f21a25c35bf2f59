"""Epochs only rise, and one name is held by one service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from runrecovery_service.domain.errors import ClaimLost, Fenced
from runrecovery_service.domain.start_errors import Held
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.sql_dialects import DatabaseKind

from .conftest import World, boot


def test_every_start_takes_the_next_epoch(world: World) -> None:
    assert [world.restart().epoch, world.restart().epoch] == [2, 3]


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
def test_a_live_lease_is_held_unless_the_lock_proves_the_holder_dead(
    shared: World, change: dict[str, Any]
) -> None:
    before = shared.dump("instance", "instance_epoch")

    with pytest.raises(Held) as held:
        instances.claim(shared.db, boot(**change), now=shared.now)

    assert "pid 7 on host host (/d)" in str(held.value)
    assert before == shared.dump("instance", "instance_epoch")


def test_two_starts_without_a_lock_prove_nothing_to_each_other(shared: World) -> None:
    shared.db.execute("UPDATE instance SET lock_id = NULL")

    with pytest.raises(Held):
        instances.claim(shared.db, boot(lock_id=None), now=shared.now)


@pytest.mark.parametrize("change", [{}, {"host_id": "renamed"}, {"data_dir": "/by/a/link"}])
def test_whoever_holds_the_lock_of_the_holder_takes_over_at_once(
    world: World, change: dict[str, str]
) -> None:
    assert instances.claim(world.db, boot(**change), now=world.now).epoch == 2


@pytest.mark.parametrize("change", [{"host_id": "elsewhere"}, {"data_dir": "/other"}, ELSEWHERE])
def test_no_lease_stands_against_a_start_that_holds_the_sqlite_file(
    world: World, change: dict[str, str]
) -> None:
    if world.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL has no lock that all machines see")
    a_year = f"UPDATE instance SET lease_until = {world.db.dialect.now_us} + 31536000000000"  # noqa: S608
    with world.db.transaction():
        world.db.execute(a_year)

    claimed = instances.claim(world.db, boot(**change), now=world.now)

    assert claimed == Owner("default", 2, "t")
    ((left,),) = world.rows(f"SELECT lease_until - {world.db.dialect.now_us} FROM instance")  # noqa: S608
    assert 0 < left <= 15_000_000


def test_a_lease_that_was_given_up_is_free_for_every_place(world: World) -> None:
    instances.resign(world.db, world.owner)

    assert instances.claim(world.db, boot(**ELSEWHERE), now=world.now).epoch == 2


def test_a_renewed_lease_holds(shared: World) -> None:
    instances.resign(shared.db, shared.owner)
    instances.renew(shared.db, shared.owner)

    with pytest.raises(Held):
        instances.claim(shared.db, boot(**ELSEWHERE), now=shared.now)


def test_an_older_epoch_is_fenced(world: World) -> None:
    old = world.owner
    world.restart()

    for refused in (instances.renew, instances.demand_current):
        with pytest.raises(Fenced) as fenced:
            refused(world.db, old)
        assert type(fenced.value) is Fenced
    instances.demand_current(world.db, world.owner)


@pytest.mark.parametrize("change", ["UPDATE {} SET epoch = 1", "DELETE FROM {}"])
def test_a_claim_that_the_store_has_lost_is_not_called_superseded(
    world: World, change: str
) -> None:
    owner = world.restart()
    with world.db.transaction():
        for table in ("instance", "instance_epoch"):
            world.db.execute(change.format(table))

    for refused in (instances.renew, instances.demand_current):
        with pytest.raises(ClaimLost, match="no longer has this start's claim"):
            refused(world.db, owner)


def test_an_older_epoch_cannot_give_up_a_newer_ones_lease(world: World) -> None:
    old = world.owner
    world.restart()
    before = world.dump("instance")

    instances.resign(world.db, old)

    assert before == world.dump("instance")


def test_a_start_whose_claim_a_failover_lost_is_fenced_by_one_of_the_same_epoch(
    world: World,
) -> None:
    lost = instances.claim(world.db, boot(**LOST), now=world.now)
    for table in ("instance", "instance_epoch"):
        world.db.execute(f"UPDATE {table} SET epoch = 1, boot_token = 't'")  # noqa: S608
    again = instances.claim(world.db, boot(**AGAIN), now=world.now)
    before = world.dump("instance", "instance_epoch")

    for refused in (instances.renew, instances.demand_current):
        with pytest.raises(Fenced) as fenced:
            refused(world.db, lost)
        assert type(fenced.value) is Fenced
    instances.resign(world.db, lost)

    assert (lost.epoch, again.epoch) == (2, 2)
    assert before == world.dump("instance", "instance_epoch")
    instances.demand_current(world.db, again)
    instances.renew(world.db, again)


def test_starts_at_once_get_epochs_of_their_own(world: World) -> None:
    use = partial(instances.claim, world.db, boot(), now=world.now)

    claimed = world.all_at_once([use] * 12, threads=12)

    assert list(range(2, 14)) == sorted(o.epoch for o in claimed if isinstance(o, Owner))


def test_first_starts_at_once_get_epochs_of_their_own(world: World) -> None:
    use = partial(instances.claim, world.db, boot("new"), now=world.now)

    claimed = world.all_at_once([use] * 12, threads=12)

    epochs = sorted(owner.epoch for owner in claimed if isinstance(owner, Owner))
    first = 2 if world.db.dialect.kind is DatabaseKind.SQLITE else 1  # SQLite: above `default`
    assert epochs == list(range(first, first + 12))


def test_the_lease_ends_by_the_clock_of_the_database(database: Database, world: World) -> None:
    row = database.fetch_one(f"SELECT lease_until - {database.dialect.now_us} FROM instance")  # noqa: S608

    assert row is not None
    assert 0 < row[0] <= instances.LEASE_TTL_S * 1e6


# -- who waits for whom on PostgreSQL ------------------------------------------------------------


@pytest.fixture
def shared(world: World) -> World:
    """A world whose store has many connections at once."""
    if world.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("SQLite has one writer at a time")
    return world


@contextmanager
def in_threads(
    world: World, count: int
) -> Iterator[Callable[[Callable[[], object]], Future[object]]]:
    """Yield what runs a use in a thread with a connection of its own."""

    def alone(use: Callable[[], object]) -> object:
        try:
            return use()
        finally:
            world.db.close()

    with ThreadPoolExecutor(count) as pool:
        yield lambda use: pool.submit(alone, use)


def until_waiting(world: World, count: int) -> None:
    """Return once so many connections of this database wait for a lock."""
    sql = (
        "SELECT count(*) FROM (SELECT pg_stat_clear_snapshot()) AS anew, pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    ends = time.monotonic() + 30
    while world.rows(sql) != [(count,)]:
        assert time.monotonic() < ends, f"{world.rows(sql)} connections wait, not {count}"
        time.sleep(0.01)


def test_a_renewal_does_not_wait_for_writers_that_wait_for_a_table(shared: World) -> None:
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


def test_a_claim_waits_for_a_writer_and_fences_it_afterwards(shared: World) -> None:
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
def test_who_meets_a_claim_waits_for_it_and_is_fenced(shared: World, write: str) -> None:
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
    shared: World,
) -> None:
    with in_threads(shared, 1) as start, shared.db.transaction():
        instances.demand_current(shared.db, shared.owner)

        claim = start(partial(instances.claim, shared.db, boot(**ELSEWHERE), now=shared.now))

        with pytest.raises(Held):
            claim.result()
