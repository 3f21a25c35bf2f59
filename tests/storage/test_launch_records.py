"""A launch is recorded before it happens, state by state, until its tree is gone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import RestartPolicy
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import instances, launch_records
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import (
    LaunchEnd,
    LaunchRecord,
    LaunchSite,
    ResourceUse,
)
from runrecovery_service.storage.turns import Turn
from storage.service_store import GONE, ServiceStore, boot

LEFT = LaunchEnd(exit_code=None, processes_ended=2, gone=False)
RESOURCES = ResourceUse(user_us=12, system_us=34, max_rss_kib=56)
MANY = 2 * launch_records.CLOSED_PER_COMMIT + 17


def gate(store: ServiceStore, turn: Turn, *, pid: int = 4242, owner: Owner | None = None) -> None:
    launch_records.record_gated(
        store.db, turn.launch, owner=owner or store.owner, pid=pid, start_ticks=99
    )


def run_agent(store: ServiceStore, turn: Turn, *, owner: Owner | None = None) -> None:
    launch_records.record_running(store.db, turn.launch, owner=owner or store.owner)


def states(store: ServiceStore) -> list[str]:
    return [state for (state,) in store.rows("SELECT state FROM process_lease ORDER BY id")]


def close(
    store: ServiceStore, turn: Turn, ended: LaunchEnd = GONE, *, report: int | None = None
) -> None:
    launch_records.close(store.db, turn.launch, ended, now=store.tick(), reconciliation_key=report)


def orphans(store: ServiceStore) -> list[LaunchRecord]:
    return launch_records.unclosed_launches(store.db, store.owner, before=store.owner.epoch)


def keys_to_sweep(store: ServiceStore, *, seconds: float = 60) -> list[int]:
    launches = launch_records.launches_to_sweep(
        store.db, store.owner, now=store.now, closed_within_s=seconds
    )
    return sorted(launch.key for launch in launches)


# -- the states of a launch --------------------------------------------------------------------


def test_a_launch_is_recorded_step_by_step(store: ServiceStore) -> None:
    turn = store.running()
    seen = [*states(store)]
    gate(store, turn)
    seen += states(store)
    run_agent(store, turn)
    seen += states(store)
    close(store, turn, LEFT)
    seen += states(store)
    close(store, turn)
    seen += states(store)

    assert seen == ["INTENT", "GATED", "RUNNING", "KILL_PENDING", "CLOSED"]


def test_a_gated_launch_has_the_identity_of_its_shim(store: ServiceStore) -> None:
    turn = store.running()
    gate(store, turn)
    store.restart()

    (launch,) = orphans(store)

    assert (launch.key, launch.pid, launch.start_ticks) == (turn.launch.key, 4242, 99)
    assert (launch.cookie, launch.watermark) == (turn.launch.cookie, turn.launch.watermark)


@pytest.mark.parametrize("step", [gate, run_agent])
def test_a_step_can_be_recorded_again(
    store: ServiceStore, step: Callable[[ServiceStore, Turn], None]
) -> None:
    turn = store.running()
    gate(store, turn)
    step(store, turn)
    before = store.dump("process_lease")

    step(store, turn)

    assert store.dump("process_lease") == before


@pytest.mark.parametrize("step", [gate, run_agent])
def test_a_newer_epoch_fences_every_step(store: ServiceStore, step: Callable[..., None]) -> None:
    turn, old = store.running(), store.owner
    gate(store, turn)
    store.restart()
    before = store.dump()

    with pytest.raises(Fenced):
        step(store, turn, owner=old)
    with pytest.raises(Fenced):  # nor may the newer epoch continue the launch
        step(store, turn)

    assert store.dump() == before


def test_an_agent_is_not_released_before_its_shim_is_recorded(store: ServiceStore) -> None:
    turn = store.running()

    with pytest.raises(Fenced):
        run_agent(store, turn)

    assert states(store) == ["INTENT"]


def test_a_launch_whose_agent_could_not_start_returns_to_its_gate_with_a_new_shim(
    store: ServiceStore,
) -> None:
    turn = store.running()
    gate(store, turn)
    run_agent(store, turn)

    gate(store, turn, pid=1)

    assert store.rows("SELECT state, pid FROM process_lease") == [("GATED", 1)]


@pytest.mark.parametrize("ended", [GONE, LEFT], ids=["closed", "kill pending"])
@pytest.mark.parametrize("step", [gate, run_agent])
def test_a_launch_that_has_ended_accepts_no_step(
    store: ServiceStore, step: Callable[[ServiceStore, Turn], None], ended: LaunchEnd
) -> None:
    turn = store.running()
    gate(store, turn)
    close(store, turn, ended)
    before = store.dump("process_lease")

    with pytest.raises(Fenced):
        step(store, turn)

    assert store.dump("process_lease") == before


# -- markers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [40, 41, 53, 62])
def test_a_watermark_has_as_many_bits_as_the_host_allows(store: ServiceStore, bits: int) -> None:
    site = LaunchSite(host_id="h", boot_id="b", pid_namespace=1, watermark_bits=bits)
    for _ in range(20):
        store.create()

    watermarks = [turn.launch.watermark for turn in iter(partial(store.take, site=site), None)]

    assert {watermark.bit_length() for watermark in watermarks if watermark is not None} == {bits}
    assert len(set(watermarks)) == 20
    assert store.rows("SELECT watermark FROM process_lease ORDER BY id") == [
        (watermark,) for watermark in watermarks
    ]


def test_a_host_without_watermarks_gets_launches_without_one(store: ServiceStore) -> None:
    store.create()
    turn = store.take(site=LaunchSite(host_id="h", boot_id="b", pid_namespace=1))

    assert turn is not None
    assert (turn.launch.watermark, turn.launch.cgroup) == (None, None)
    assert store.rows("SELECT watermark, cgroup FROM process_lease") == [(None, None)]


def test_each_launch_has_a_cgroup_of_its_own_below_the_delegated_one(store: ServiceStore) -> None:
    site = LaunchSite(host_id="h", boot_id="b", pid_namespace=1, cgroup_parent="/our/own")
    for _ in range(3):
        store.create()

    groups = [turn.launch.cgroup for turn in iter(partial(store.take, site=site), None)]

    assert len(set(groups)) == 3
    assert all(group is not None and group.startswith("/our/own/") for group in groups)


def test_the_markers_of_a_launch_are_in_no_repr(store: ServiceStore) -> None:
    launch = store.running().launch

    shown = repr(launch)

    assert launch.cookie not in shown
    assert str(launch.watermark) not in shown


# -- the end of a launch -----------------------------------------------------------------------


def test_the_end_of_a_turn_records_what_its_process_used(store: ServiceStore) -> None:
    turn = store.running()
    ended = LaunchEnd(exit_code=-9, processes_ended=3, gone=True, resources=RESOURCES)

    store.end(turn, Succeeded({}), ended=ended)
    store.end(turn, Succeeded({}), ended=ended)  # an answer was lost

    assert store.rows(
        "SELECT state, exit_code, user_us, system_us, max_rss_kib, processes_ended, ended_by"
        " FROM process_lease"
    ) == [("CLOSED", -9, 12, 34, 56, 3, None)]


def test_a_second_close_keeps_the_facts_of_the_first(store: ServiceStore) -> None:
    turn = store.running()
    close(store, turn, LaunchEnd(exit_code=7, processes_ended=2, gone=False, resources=RESOURCES))

    close(store, turn, LaunchEnd(exit_code=None, processes_ended=1, gone=True), report=5)

    assert store.rows(
        "SELECT state, exit_code, user_us, max_rss_kib, processes_ended, ended_by"
        " FROM process_lease"
    ) == [("CLOSED", 7, 12, 56, 3, 5)]


def test_a_launch_that_could_not_be_ended_stays_an_orphan_until_it_is_gone(
    store: ServiceStore,
) -> None:
    turn = store.running()
    close(store, turn, LEFT)
    store.restart()

    (launch,) = orphans(store)
    close(store, turn, LEFT, report=5)
    (again,) = orphans(store)
    close(store, turn, report=5)

    assert launch.unended
    assert again == launch
    assert orphans(store) == []


def test_a_run_is_not_taken_while_a_process_of_it_may_still_live(store: ServiceStore) -> None:
    turn = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    close(store, turn, LEFT)
    store.recover()

    before = store.take()
    close(store, turn, report=5)
    after = store.take()

    assert before is None
    assert after is not None
    assert after.run.run_id == turn.run.run_id


def add_launches(store: ServiceStore, count: int) -> None:
    """Add launches of one run, each as an attempt of its own."""
    turn = store.running()
    names = (
        "run, turn, instance, epoch, host_id, boot_id, pid_namespace, cookie, state,"
        " processes_ended, created_at"
    )
    with store.db.transaction():
        store.db.execute(
            f"INSERT INTO process_lease ({names}, attempt)"  # noqa: S608 - our own words
            " WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            f" SELECT {names}, n.i FROM process_lease CROSS JOIN n WHERE id = ?",
            (count, turn.launch.key),
        )


def test_thousands_of_launches_are_closed_together(store: ServiceStore) -> None:
    add_launches(store, MANY)
    store.restart()
    launches = orphans(store)
    endings = [
        (launch, LaunchEnd(exit_code=None, processes_ended=at % 3, gone=at % 5 > 0))
        for at, launch in enumerate(launches)
    ]

    launch_records.close_all(store.db, endings, now=store.now, reconciliation_key=9)

    assert len(launches) == MANY
    pending = sum(not ended.gone for _, ended in endings)
    assert store.rows(
        "SELECT state, ended_by, count(*) FROM process_lease GROUP BY 1, 2 ORDER BY 1"
    ) == [("CLOSED", 9, MANY - pending), ("KILL_PENDING", 9, pending)]
    assert store.rows("SELECT sum(processes_ended) FROM process_lease") == [
        (sum(ended.processes_ended for _, ended in endings),)
    ]
    assert len(orphans(store)) == pending


def test_a_close_that_is_cut_off_has_closed_whole_batches(store: ServiceStore) -> None:
    add_launches(store, MANY)
    store.restart()
    endings: list[Any] = [(launch, GONE) for launch in orphans(store)]
    endings[-1] = (endings[-1][0], None)  # the service dies here

    with pytest.raises(AttributeError):
        launch_records.close_all(store.db, endings, now=store.now, reconciliation_key=9)

    assert store.rows("SELECT count(*) FROM process_lease WHERE state = 'CLOSED'") == [
        (2 * launch_records.CLOSED_PER_COMMIT,)
    ]


# -- owners of launches ----------------------------------------------------------------------------


def test_a_start_ends_launches_of_earlier_epochs_and_a_stop_its_own_too(
    store: ServiceStore,
) -> None:
    earlier = store.running().launch.key
    store.restart()
    own = store.running().launch.key

    found = {
        before: [
            launch.key
            for launch in launch_records.unclosed_launches(store.db, store.owner, before=before)
        ]
        for before in (store.owner.epoch, store.owner.epoch + 1)
    }

    assert found == {2: [earlier], 3: [earlier, own]}


def of_another_instance(store: ServiceStore) -> Turn:
    other = instances.claim(store.db, boot("other"), now=store.now)
    store.create(owner=other)
    turn = store.take(owner=other)
    assert turn is not None
    return turn


def test_launches_of_other_instances_are_not_touched(store: ServiceStore) -> None:
    theirs = of_another_instance(store)
    store.restart()
    store.restart()

    open_ones = orphans(store)
    close(store, theirs, LEFT)

    assert open_ones == []
    assert keys_to_sweep(store) == []
    assert launch_records.unended_launches(store.db, store.owner, limit=10) == []
    close(store, theirs)
    assert keys_to_sweep(store, seconds=3600) == []


# -- the sweep for stragglers ------------------------------------------------------------------


def test_the_sweep_covers_ended_launches_that_may_have_left_processes(store: ServiceStore) -> None:
    pending = store.running()
    close(store, pending, LEFT)
    store.restart()
    closed, late, alive = store.running(), store.running(), store.running()
    close(store, late)
    store.now += timedelta(seconds=60)
    close(store, closed)
    gate(store, alive)

    assert keys_to_sweep(store) == [pending.launch.key, closed.launch.key]
    assert keys_to_sweep(store, seconds=3600) == sorted(
        [pending.launch.key, late.launch.key, closed.launch.key]
    )
    assert keys_to_sweep(store, seconds=0) == [pending.launch.key, closed.launch.key]


def test_the_sweep_knows_which_launches_block_their_runs(store: ServiceStore) -> None:
    pending, closed = store.running(), store.running()
    close(store, pending, LEFT)
    close(store, closed)

    launches = launch_records.launches_to_sweep(
        store.db, store.owner, now=store.now, closed_within_s=60
    )

    assert {launch.key: launch.unended for launch in launches} == {
        pending.launch.key: True,
        closed.launch.key: False,
    }


def test_processes_that_the_sweep_ended_are_added_to_the_count(store: ServiceStore) -> None:
    pending, closed, alive = store.running(), store.running(), store.running()
    close(store, pending, LEFT, report=3)
    close(store, closed, report=4)
    gate(store, alive)
    one_more = LaunchEnd(exit_code=None, processes_ended=1, gone=True)
    at = store.tick()

    launch_records.record_late_end(
        store.db,
        [(turn.launch, one_more) for turn in (pending, closed, alive)],
        now=at,
    )

    assert store.rows("SELECT state, processes_ended, ended_by FROM process_lease ORDER BY id") == [
        ("CLOSED", 3, 3),
        ("CLOSED", 1, 4),
        ("GATED", 0, None),
    ]
    assert keys_to_sweep(store, seconds=0) == [pending.launch.key, closed.launch.key]


def test_a_closed_launch_that_is_found_alive_blocks_its_run_again(store: ServiceStore) -> None:
    turn = store.running()
    close(store, turn)

    launch_records.record_late_end(store.db, [(turn.launch, LEFT)], now=store.tick())
    (left,) = launch_records.unended_launches(store.db, store.owner, limit=10)
    store.now += timedelta(hours=1)
    still = keys_to_sweep(store)
    launch_records.record_late_end(store.db, [(turn.launch, GONE)], now=store.tick())

    assert left.run_id == turn.run.run_id
    assert still == [turn.launch.key]
    assert launch_records.unended_launches(store.db, store.owner, limit=10) == []


def test_launches_that_could_not_be_ended_are_listed_oldest_first(store: ServiceStore) -> None:
    made = []
    for _ in range(3):
        turn = store.running()
        made.append((turn.run.run_id, 1, store.now))
        close(store, turn, LEFT)
    store.running()
    store.restart()

    named = launch_records.unended_launches(store.db, store.owner, limit=2)

    assert [(one.run_id, one.attempt, one.launched_at) for one in named] == made[:2]
    assert len(launch_records.unended_launches(store.db, store.owner, limit=10)) == 3


def test_a_launch_whose_run_is_gone_is_listed_by_its_key(store: ServiceStore) -> None:
    turn = store.running()
    close(store, turn, LEFT)
    with store.db.transaction():
        store.db.execute("DELETE FROM run")

    (left,) = launch_records.unended_launches(store.db, store.owner, limit=10)

    assert left.run_id == f"#{turn.run.key}"


def test_the_processor_time_of_a_process_is_its_user_time_and_its_system_time() -> None:
    used = ResourceUse(user_us=1_500_000, system_us=250_000, max_rss_kib=1)

    assert used.cpu_s == 1.75
