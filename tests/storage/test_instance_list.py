"""The list of the instances on one database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from runrecovery_service.domain.instance import InstanceState
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.storage import instance_list, instances
from storage.service_store import ServiceStore, boot


def by_name(store: ServiceStore) -> dict[str, InstanceState]:
    """Return the listed state of each instance, by name."""
    return {state.name: state for state in instance_list.list_instances(store.db)}


def test_an_instance_is_seen_with_its_lease_slots_and_runs(store: ServiceStore) -> None:
    store.owner = instances.claim(
        store.db,
        boot("a", engines=("demo", "codex"), max_running=4, version="0.2.0"),
        now=datetime(2026, 11, 24, 12, tzinfo=UTC),
    )
    store.waiting()
    store.waiting(profile=Profile.STICKY_PROCESS)
    store.running()
    store.create()

    seen = by_name(store)["a"]

    assert seen.lease_until is not None
    assert seen == InstanceState(
        name="a",
        epoch=seen.epoch,
        is_alive=True,
        lease_until=seen.lease_until,
        host_id="host",
        version="0.2.0",
        engines=("codex", "demo"),
        max_running=4,
        slots_held=2,
        runs={RunStatus.QUEUED: 1, RunStatus.RUNNING: 1, RunStatus.WAITING_USER: 2},
        started_at=datetime(2026, 11, 24, 12, tzinfo=UTC),
        stopped_at=None,
        taken_over_by=None,
        taken_over_at=None,
        takeover_done_at=None,
        host_return_until=None,
    )


def test_each_instance_is_seen_with_its_own_runs_alone(shared: ServiceStore) -> None:
    shared.create()
    first, shared.owner = shared.owner, instances.claim(shared.db, boot("b"), now=shared.now)
    shared.create()
    shared.create()

    seen = by_name(shared)

    assert {name: dict(state.runs) for name, state in seen.items()} == {
        first.instance: {RunStatus.QUEUED: 1},
        "b": {RunStatus.QUEUED: 2},
    }


def test_an_instance_is_alive_while_its_lease_runs_by_the_clock_of_the_database(
    shared: ServiceStore,
) -> None:
    past = f"{shared.db.dialect.now_us} - 1000000"
    shared.db.execute(f"UPDATE instance SET lease_until = {past}")  # noqa: S608

    (seen,) = instance_list.list_instances(shared.db)

    assert not seen.is_alive


def test_a_stop_and_a_takeover_are_seen_with_their_times(store: ServiceStore) -> None:
    instances.resign(store.db, store.owner)
    store.db.execute(
        "UPDATE instance SET taken_over_by = 'b', taken_over_at = 1000000,"
        " takeover_done_at = 2000000, host_return_until = 3000000"
    )

    (seen,) = instance_list.list_instances(store.db)

    begin = datetime(1970, 1, 1, tzinfo=UTC)
    assert seen.stopped_at is not None
    assert (seen.is_alive, seen.lease_until, seen.taken_over_by) == (False, None, "b")
    assert [seen.taken_over_at, seen.takeover_done_at, seen.host_return_until] == [
        begin + timedelta(seconds=at) for at in (1, 2, 3)
    ]


def test_living_instances_come_first_and_then_the_latest_starts(shared: ServiceStore) -> None:
    for name, stopped in (("old", True), ("new", True), ("alive", False)):
        owner = instances.claim(shared.db, boot(name), now=shared.tick())
        if stopped:
            instances.resign(shared.db, owner)
    shared.db.execute("UPDATE instance SET lease_until = 0 WHERE name = 'default'")

    seen = [state.name for state in instance_list.list_instances(shared.db)]

    assert seen == ["alive", "new", "old", "default"]


def test_damaged_columns_do_not_hide_an_instance(store: ServiceStore) -> None:
    store.create()
    store.db.execute("UPDATE run SET status = 'DAMAGED'")
    store.db.execute("UPDATE instance SET engines = 'no list'")

    (seen,) = instance_list.list_instances(store.db)

    assert (seen.engines, dict(seen.runs)) == ((), {})
