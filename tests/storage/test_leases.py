"""A launch is on record before it happens, state by state, and until its tree is gone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import instances, launch_records
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd, LaunchRecord, LaunchSite, Usage
from runrecovery_service.storage.turns import Turn

from .conftest import GONE, World, boot

LEFT = LaunchEnd(exit_code=None, processes_ended=2, gone=False)
USAGE = Usage(user_us=12, system_us=34, max_rss_kib=56)
MANY = 2 * launch_records.CLOSED_PER_COMMIT + 17


def gate(world: World, turn: Turn, *, pid: int = 4242, owner: Owner | None = None) -> None:
    launch_records.record_gated(
        world.db, turn.launch, owner=owner or world.owner, pid=pid, start_ticks=99
    )


def run_agent(world: World, turn: Turn, *, owner: Owner | None = None) -> None:
    launch_records.record_running(world.db, turn.launch, owner=owner or world.owner)


def states(world: World) -> list[str]:
    return [state for (state,) in world.rows("SELECT state FROM process_lease ORDER BY id")]


def close(world: World, turn: Turn, ended: LaunchEnd = GONE, *, report: int | None = None) -> None:
    launch_records.close(world.db, turn.launch, ended, now=world.tick(), reconciliation_key=report)


def orphans(world: World) -> list[LaunchRecord]:
    return launch_records.unclosed_launches(world.db, world.owner, before=world.owner.epoch)


def patrolled(world: World, *, seconds: float = 60) -> list[int]:
    leases = launch_records.launches_to_sweep(
        world.db, world.owner, now=world.now, closed_within_s=seconds
    )
    return sorted(lease.key for lease in leases)


# -- the way of a launch -----------------------------------------------------------------------


def test_a_launch_is_recorded_step_by_step(world: World) -> None:
    turn = world.running()
    seen = [*states(world)]
    gate(world, turn)
    seen += states(world)
    run_agent(world, turn)
    seen += states(world)
    close(world, turn, LEFT)
    seen += states(world)
    close(world, turn)
    seen += states(world)

    assert seen == ["INTENT", "GATED", "RUNNING", "KILL_PENDING", "CLOSED"]


def test_the_shim_is_on_record_from_the_gate_on(world: World) -> None:
    turn = world.running()
    gate(world, turn)
    world.restart()

    (lease,) = orphans(world)

    assert (lease.key, lease.pid, lease.start_ticks) == (turn.launch.key, 4242, 99)
    assert (lease.cookie, lease.watermark) == (turn.launch.cookie, turn.launch.watermark)


@pytest.mark.parametrize("step", [gate, run_agent])
def test_a_step_whose_answer_was_lost_is_done_again(
    world: World, step: Callable[[World, Turn], None]
) -> None:
    turn = world.running()
    gate(world, turn)
    step(world, turn)
    before = world.dump("process_lease")

    step(world, turn)

    assert world.dump("process_lease") == before


@pytest.mark.parametrize("step", [gate, run_agent])
def test_a_newer_epoch_fences_every_step(world: World, step: Callable[..., None]) -> None:
    turn, old = world.running(), world.owner
    gate(world, turn)
    world.restart()
    before = world.dump()

    with pytest.raises(Fenced):
        step(world, turn, owner=old)
    with pytest.raises(Fenced):  # nor may the newer one go on with it
        step(world, turn)

    assert world.dump() == before


def test_an_agent_is_not_run_before_its_shim_is_on_record(world: World) -> None:
    turn = world.running()

    with pytest.raises(Fenced):
        run_agent(world, turn)

    assert states(world) == ["INTENT"]


def test_a_launch_whose_agent_the_system_refused_is_at_its_gate_again(world: World) -> None:
    turn = world.running()
    gate(world, turn)
    run_agent(world, turn)

    gate(world, turn, pid=1)

    assert world.rows("SELECT state, pid FROM process_lease") == [("GATED", 1)]


@pytest.mark.parametrize("ended", [GONE, LEFT], ids=["closed", "kill pending"])
@pytest.mark.parametrize("step", [gate, run_agent])
def test_a_launch_that_is_over_takes_no_step(
    world: World, step: Callable[[World, Turn], None], ended: LaunchEnd
) -> None:
    turn = world.running()
    gate(world, turn)
    close(world, turn, ended)
    before = world.dump("process_lease")

    with pytest.raises(Fenced):
        step(world, turn)

    assert world.dump("process_lease") == before


# -- marks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [40, 41, 53, 62])
def test_a_watermark_is_as_long_as_may_be_set_here(world: World, bits: int) -> None:
    site = LaunchSite(host_id="h", boot_id="b", pid_namespace=1, watermark_bits=bits)
    for _ in range(20):
        world.create()

    marks = [turn.launch.watermark for turn in iter(partial(world.take, site=site), None)]

    assert {mark.bit_length() for mark in marks if mark is not None} == {bits}
    assert len(set(marks)) == 20
    assert world.rows("SELECT watermark FROM process_lease ORDER BY id") == [
        (mark,) for mark in marks
    ]


def test_where_none_can_be_set_there_is_no_watermark(world: World) -> None:
    world.create()
    turn = world.take(site=LaunchSite(host_id="h", boot_id="b", pid_namespace=1))

    assert turn is not None
    assert (turn.launch.watermark, turn.launch.cgroup) == (None, None)
    assert world.rows("SELECT watermark, cgroup FROM process_lease") == [(None, None)]


def test_each_launch_has_a_cgroup_of_its_own_below_the_delegated_one(world: World) -> None:
    site = LaunchSite(host_id="h", boot_id="b", pid_namespace=1, cgroup_parent="/our/own")
    for _ in range(3):
        world.create()

    groups = [turn.launch.cgroup for turn in iter(partial(world.take, site=site), None)]

    assert len(set(groups)) == 3
    assert all(group is not None and group.startswith("/our/own/") for group in groups)


def test_the_marks_of_a_launch_are_never_shown(world: World) -> None:
    lease = world.running().launch

    shown = repr(lease)

    assert lease.cookie not in shown
    assert str(lease.watermark) not in shown


# -- the end of a launch -----------------------------------------------------------------------


def test_the_end_of_a_turn_records_what_its_process_used(world: World) -> None:
    turn = world.running()
    ended = LaunchEnd(exit_code=-9, processes_ended=3, gone=True, usage=USAGE)

    world.end(turn, Succeeded({}), ended=ended)
    world.end(turn, Succeeded({}), ended=ended)  # an answer was lost

    assert world.rows(
        "SELECT state, exit_code, user_us, system_us, max_rss_kib, processes_ended, ended_by"
        " FROM process_lease"
    ) == [("CLOSED", -9, 12, 34, 56, 3, None)]


def test_a_later_look_forgets_nothing_that_an_earlier_one_saw(world: World) -> None:
    turn = world.running()
    close(world, turn, LaunchEnd(exit_code=7, processes_ended=2, gone=False, usage=USAGE))

    close(world, turn, LaunchEnd(exit_code=None, processes_ended=1, gone=True), report=5)

    assert world.rows(
        "SELECT state, exit_code, user_us, max_rss_kib, processes_ended, ended_by"
        " FROM process_lease"
    ) == [("CLOSED", 7, 12, 56, 3, 5)]


def test_what_could_not_be_ended_stays_an_orphan_until_it_is_gone(world: World) -> None:
    turn = world.running()
    close(world, turn, LEFT)
    world.restart()

    (lease,) = orphans(world)
    close(world, turn, LEFT, report=5)
    (again,) = orphans(world)
    close(world, turn, report=5)

    assert lease.unended
    assert again == lease
    assert orphans(world) == []


def fill_with_leases(world: World, count: int) -> None:
    """Make leases of one run, as so many attempts."""
    turn = world.running()
    names = (
        "run, turn, instance, epoch, host_id, boot_id, pid_namespace, cookie, state,"
        " processes_ended, created_at"
    )
    with world.db.transaction():
        world.db.execute(
            f"INSERT INTO process_lease ({names}, attempt)"  # noqa: S608 - our own words
            " WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            f" SELECT {names}, n.i FROM process_lease CROSS JOIN n WHERE id = ?",
            (count, turn.launch.key),
        )


def test_thousands_of_leases_are_closed_together(world: World) -> None:
    fill_with_leases(world, MANY)
    world.restart()
    leases = orphans(world)
    endings = [
        (lease, LaunchEnd(exit_code=None, processes_ended=at % 3, gone=at % 5 > 0))
        for at, lease in enumerate(leases)
    ]

    launch_records.close_all(world.db, endings, now=world.now, reconciliation_key=9)

    assert len(leases) == MANY
    pending = sum(not ended.gone for _, ended in endings)
    assert world.rows(
        "SELECT state, ended_by, count(*) FROM process_lease GROUP BY 1, 2 ORDER BY 1"
    ) == [("CLOSED", 9, MANY - pending), ("KILL_PENDING", 9, pending)]
    assert world.rows("SELECT sum(processes_ended) FROM process_lease") == [
        (sum(ended.processes_ended for _, ended in endings),)
    ]
    assert len(orphans(world)) == pending


def test_a_close_that_is_cut_off_is_done_in_whole_commits(world: World) -> None:
    fill_with_leases(world, MANY)
    world.restart()
    endings: list[Any] = [(lease, GONE) for lease in orphans(world)]
    endings[-1] = (endings[-1][0], None)  # the service dies here

    with pytest.raises(AttributeError):
        launch_records.close_all(world.db, endings, now=world.now, reconciliation_key=9)

    assert world.rows("SELECT count(*) FROM process_lease WHERE state = 'CLOSED'") == [
        (2 * launch_records.CLOSED_PER_COMMIT,)
    ]


# -- whose launches ----------------------------------------------------------------------------


def test_a_start_looks_after_earlier_epochs_and_a_stop_after_its_own_too(world: World) -> None:
    earlier = world.running().launch.key
    world.restart()
    own = world.running().launch.key

    found = {
        before: [
            lease.key
            for lease in launch_records.unclosed_launches(world.db, world.owner, before=before)
        ]
        for before in (world.owner.epoch, world.owner.epoch + 1)
    }

    assert found == {2: [earlier], 3: [earlier, own]}


def of_another_instance(world: World) -> Turn:
    other = instances.claim(world.db, boot("other"), now=world.now)
    world.create(owner=other)
    turn = world.take(owner=other)
    assert turn is not None
    return turn


def test_the_launches_of_other_instances_are_left_to_them(world: World) -> None:
    theirs = of_another_instance(world)
    world.restart()
    world.restart()

    open_ones = orphans(world)
    close(world, theirs, LEFT)

    assert open_ones == []
    assert patrolled(world) == []
    assert launch_records.unended_launches(world.db, world.owner, limit=10) == []
    close(world, theirs)
    assert patrolled(world, seconds=3600) == []


# -- patrols -----------------------------------------------------------------------------------


def test_a_patrol_looks_after_what_is_over_and_not_certainly_gone(world: World) -> None:
    pending = world.running()
    close(world, pending, LEFT)
    world.restart()
    closed, late, alive = world.running(), world.running(), world.running()
    close(world, late)
    world.now += timedelta(seconds=60)
    close(world, closed)
    gate(world, alive)

    assert patrolled(world) == [pending.launch.key, closed.launch.key]
    assert patrolled(world, seconds=3600) == sorted(
        [pending.launch.key, late.launch.key, closed.launch.key]
    )
    assert patrolled(world, seconds=0) == [pending.launch.key, closed.launch.key]


def test_a_patrol_knows_which_of_them_holds_its_run_back(world: World) -> None:
    pending, closed = world.running(), world.running()
    close(world, pending, LEFT)
    close(world, closed)

    leases = launch_records.launches_to_sweep(
        world.db, world.owner, now=world.now, closed_within_s=60
    )

    assert {lease.key: lease.unended for lease in leases} == {
        pending.launch.key: True,
        closed.launch.key: False,
    }


def test_what_a_patrol_ended_is_added_to_what_was_known(world: World) -> None:
    pending, closed, alive = world.running(), world.running(), world.running()
    close(world, pending, LEFT, report=3)
    close(world, closed, report=4)
    gate(world, alive)
    one_more = LaunchEnd(exit_code=None, processes_ended=1, gone=True)
    at = world.tick()

    launch_records.record_late_end(
        world.db,
        [(turn.launch, one_more) for turn in (pending, closed, alive)],
        now=at,
    )

    assert world.rows("SELECT state, processes_ended, ended_by FROM process_lease ORDER BY id") == [
        ("CLOSED", 3, 3),
        ("CLOSED", 1, 4),
        ("GATED", 0, None),
    ]
    assert patrolled(world, seconds=0) == [pending.launch.key, closed.launch.key]


def test_a_closed_launch_that_turns_out_alive_holds_its_run_back_again(world: World) -> None:
    turn = world.running()
    close(world, turn)

    launch_records.record_late_end(world.db, [(turn.launch, LEFT)], now=world.tick())
    (left,) = launch_records.unended_launches(world.db, world.owner, limit=10)
    world.now += timedelta(hours=1)
    still = patrolled(world)
    launch_records.record_late_end(world.db, [(turn.launch, GONE)], now=world.tick())

    assert left.run_id == turn.run.run_id
    assert still == [turn.launch.key]
    assert launch_records.unended_launches(world.db, world.owner, limit=10) == []


def test_what_could_not_be_ended_is_named_oldest_first(world: World) -> None:
    made = []
    for _ in range(3):
        turn = world.running()
        made.append((turn.run.run_id, 1, world.now))
        close(world, turn, LEFT)
    world.running()
    world.restart()

    named = launch_records.unended_launches(world.db, world.owner, limit=2)

    assert [(one.run_id, one.attempt, one.launched_at) for one in named] == made[:2]
    assert len(launch_records.unended_launches(world.db, world.owner, limit=10)) == 3


def test_a_launch_whose_run_is_gone_is_named_by_its_key(world: World) -> None:
    turn = world.running()
    close(world, turn, LEFT)
    with world.db.transaction():
        world.db.execute("DELETE FROM run")

    (left,) = launch_records.unended_launches(world.db, world.owner, limit=10)

    assert left.run_id == f"#{turn.run.key}"
