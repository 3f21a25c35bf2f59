"""A living turn whose run the database has lost ends as fenced, and touches no other run."""

from __future__ import annotations

import signal

from runrecovery_service.domain.run import RunStatus
from support.processes import living_process, send_signal

from .conftest import Floor, LeaseRow, until

ROWS = "SELECT run_id, status, output, error_code, version FROM run ORDER BY id"


async def until_fenced(floor: Floor) -> None:
    async def is_so() -> bool:
        return floor.is_fenced

    await until(is_so)


async def until_followed(floor: Floor) -> None:
    """Return once the supervisor of the only turn has read its record and sent the task."""

    async def is_so() -> bool:
        (supervisor,) = floor.turns.supervisors
        return supervisor._io is not None and supervisor._io.process.stdin.closed

    await until(is_so)


async def give_away(floor: Floor, run_id: str, *, to: str) -> None:
    """Give the key of a run, and of its launch, to another run."""

    def change(db: object) -> None:
        db.execute("UPDATE run SET run_id = ? WHERE run_id = ?", (to, run_id))  # type: ignore[attr-defined]
        db.execute("UPDATE process_lease SET cookie = ?", ("f" * 32,))  # type: ignore[attr-defined]

    await floor.storage.write(change)


async def lose_everything(floor: Floor) -> None:
    """Lose all that was committed: the next run and launch get the keys of the first ones."""

    def change(db: object) -> None:
        for table in ("run_event", "run_label", "interaction", "process_lease", "run"):
            db.execute(f"DELETE FROM {table}")  # type: ignore[attr-defined]  # noqa: S608

    await floor.storage.write(change)


def end_agent(lease: LeaseRow) -> None:
    (pid,) = lease.tree()
    agent = living_process(pid)
    assert agent is not None
    send_signal(agent, signal.SIGTERM)


async def test_the_end_of_a_lost_run_is_not_written_onto_the_run_that_has_its_key(
    floor: Floor,
) -> None:
    run_id = await floor.create("holds")
    lease = await floor.until_tree(run_id, 1)
    await until_followed(floor)
    await give_away(floor, run_id, to="of-another-caller")
    before = await floor.storage.read(lambda db: db.fetch_all(ROWS))

    end_agent(lease)
    await until_fenced(floor)
    await floor.dispatcher.stop()

    assert before == await floor.storage.read(lambda db: db.fetch_all(ROWS))
    assert not lease.is_guarded


async def test_a_key_that_a_living_process_goes_by_is_not_launched_for_again(
    floor: Floor,
) -> None:
    lost = await floor.create("holds")
    lease = await floor.until_tree(lost, 1)
    await until_followed(floor)
    await lose_everything(floor)

    run_id = await floor.create("holds")
    await until_fenced(floor)
    await floor.dispatcher.stop()
    states = await floor.storage.read(lambda db: db.fetch_all("SELECT state FROM process_lease"))

    # The record watch may find the loss before the dispatcher takes the new run.
    assert states in ([], [("INTENT",)])
    assert lease.tree() == []
    assert not lease.is_guarded
    assert (await floor.get(run_id)).status in {RunStatus.QUEUED, RunStatus.RUNNING}


async def test_a_launch_key_that_a_living_process_goes_by_is_not_launched_for_again(
    floor: Floor,
) -> None:
    """The run itself was not lost."""
    lease = await floor.until_tree(await floor.create("holds"), 1)
    await until_followed(floor)
    await floor.storage.write(lambda db: db.execute("DELETE FROM process_lease"))

    run_id = await floor.create("holds")
    await until_fenced(floor)
    again = await floor.lease(run_id)
    await floor.dispatcher.stop()

    assert (again.key, again.state, again.tree()) == (lease.key, "INTENT", [])
    assert lease.tree() == []


async def test_a_deadline_and_a_cancel_of_another_run_end_no_process_of_a_lost_one(
    floor: Floor,
) -> None:
    lost = await floor.create("holds")
    lease = await floor.until_tree(lost, 1)
    await until_followed(floor)
    await give_away(floor, lost, to="of-another-caller")

    await floor.cancel("of-another-caller")
    floor.dispatcher.check_queue()
    kept = await floor.create("quick")
    await floor.until_ended(kept)

    assert len(lease.tree()) == 1
    await floor.dispatcher.stop()
