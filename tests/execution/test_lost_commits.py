"""A turn whose run the database has lost ends as fenced, and changes no other run."""

from __future__ import annotations

import signal

from runrecovery_service.domain.run import RunStatus
from support.processes import living_process, send_signal

from .conftest import Execution, StoredLaunch, until

ROWS = "SELECT run_id, status, output, error_code, version FROM run ORDER BY id"


async def until_fenced(execution: Execution) -> None:
    async def is_so() -> bool:
        return execution.is_fenced

    await until(is_so)


async def until_followed(execution: Execution) -> None:
    """Return once the supervisor of the only turn has read its record and sent the task."""

    async def is_so() -> bool:
        (supervisor,) = execution.turns.supervisors
        return supervisor._io is not None and supervisor._io.process.stdin.closed

    await until(is_so)


async def give_away(execution: Execution, run_id: str, *, to: str) -> None:
    """Give the key of a run, and of its launch, to another run."""

    def change(db: object) -> None:
        db.execute("UPDATE run SET run_id = ? WHERE run_id = ?", (to, run_id))  # type: ignore[attr-defined]
        db.execute("UPDATE process_lease SET cookie = ?", ("f" * 32,))  # type: ignore[attr-defined]

    await execution.storage.write(change)


async def lose_everything(execution: Execution) -> None:
    """Lose all that was committed: the next run and launch get the keys of the first ones."""

    def change(db: object) -> None:
        for table in ("run_event", "run_label", "interaction", "process_lease", "run"):
            db.execute(f"DELETE FROM {table}")  # type: ignore[attr-defined]  # noqa: S608

    await execution.storage.write(change)


def end_agent(launch: StoredLaunch) -> None:
    (pid,) = launch.tree()
    agent = living_process(pid)
    assert agent is not None
    send_signal(agent, signal.SIGTERM)


async def test_the_end_of_a_lost_run_is_not_recorded_for_the_run_that_has_its_key(
    execution: Execution,
) -> None:
    run_id = await execution.create("holds")
    launch = await execution.until_tree(run_id, 1)
    await until_followed(execution)
    await give_away(execution, run_id, to="of-another-caller")
    before = await execution.storage.read(lambda db: db.fetch_all(ROWS))

    end_agent(launch)
    await until_fenced(execution)
    await execution.dispatcher.stop()

    assert before == await execution.storage.read(lambda db: db.fetch_all(ROWS))
    assert not launch.is_guarded


async def test_a_run_with_the_key_of_a_lost_run_is_not_launched_while_its_process_lives(
    execution: Execution,
) -> None:
    lost = await execution.create("holds")
    launch = await execution.until_tree(lost, 1)
    await until_followed(execution)
    await lose_everything(execution)

    run_id = await execution.create("holds")
    await until_fenced(execution)
    await execution.dispatcher.stop()
    states = await execution.storage.read(
        lambda db: db.fetch_all("SELECT state FROM process_lease")
    )

    # The record watch may find the loss before the dispatcher takes the new run.
    assert states in ([], [("INTENT",)])
    assert launch.tree() == []
    assert not launch.is_guarded
    assert (await execution.get(run_id)).status in {RunStatus.QUEUED, RunStatus.RUNNING}


async def test_a_launch_with_the_key_of_a_lost_launch_is_not_started_while_its_process_lives(
    execution: Execution,
) -> None:
    """The run itself was not lost."""
    launch = await execution.until_tree(await execution.create("holds"), 1)
    await until_followed(execution)
    await execution.storage.write(lambda db: db.execute("DELETE FROM process_lease"))

    run_id = await execution.create("holds")
    await until_fenced(execution)
    again = await execution.launch(run_id)
    await execution.dispatcher.stop()

    assert (again.key, again.state, again.tree()) == (launch.key, "INTENT", [])
    assert launch.tree() == []


async def test_a_cancel_of_another_run_ends_no_process_of_a_lost_one(
    execution: Execution,
) -> None:
    lost = await execution.create("holds")
    launch = await execution.until_tree(lost, 1)
    await until_followed(execution)
    await give_away(execution, lost, to="of-another-caller")

    await execution.cancel("of-another-caller")
    execution.dispatcher.check_queue()
    kept = await execution.create("quick")
    await execution.until_ended(kept)

    assert len(launch.tree()) == 1
    await execution.dispatcher.stop()
