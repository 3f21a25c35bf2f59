"""Services with one thing broken, which the simulation must detect. Without a change of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

Break = Callable[["Patches"], None]


class Patches:
    """Replaces attributes, and puts them back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: object) -> None:
        """Replace an attribute, which must exist."""
        self._before.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back."""
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)


def _rearm_deadlines_from_now(patches: Patches) -> None:
    """Begin the wait for a reply anew at each start."""
    from runrecovery_service.storage import passed_deadlines

    move_to_clock = passed_deadlines.move_to_clock

    def rearm(db: Any, owner: Any, *, now: Any, steady: Any) -> int:
        count = move_to_clock(db, owner, now=now, steady=steady)
        with db.transaction():
            db.execute(
                "UPDATE run SET wait_due_us = ? + COALESCE(session_timeout_us, 1200000000)"
                " WHERE owner = ? AND wait_due_us IS NOT NULL",
                (steady.us, owner.instance),
            )
        return count

    patches.set(passed_deadlines, "move_to_clock", rearm)


def _free_slots_twice(patches: Patches) -> None:
    """Free the slot of another turn too when a turn ends."""
    from runrecovery_service.execution.running_turns import RunningTurns

    remove = RunningTurns.remove

    def remove_two(self: Any, supervisor: Any) -> None:
        if supervisor in self:
            remove(self, supervisor)
        if self._tasks:
            self._tasks.popitem()

    patches.set(RunningTurns, "remove", remove_two)


def _free_slots_early(patches: Patches) -> None:
    """Free a slot once its turn is over, although its processes may live."""
    from runrecovery_service.execution.dispatcher import Dispatcher

    patches.set(
        Dispatcher,
        "slots_in_use",
        property(lambda self: len(self.turns) - len(self.turns.ending_tasks)),
    )


def _spare_orphans(patches: Patches) -> None:
    """Record the end of orphans, and let them live."""
    from runrecovery_service.agents.end_launches import LaunchEnder
    from runrecovery_service.process.ending_result import NOTHING_LEFT

    patches.set(LaunchEnder, "end", lambda _, launches: {one.key: NOTHING_LEFT for one in launches})


def _serve_before_recovery(patches: Patches) -> None:
    """Open the gate before the recovery."""
    from runrecovery_service.recovery_runner import RecoveryRunner

    recover = RecoveryRunner.recover

    async def recover_later(self: Any) -> Any:
        self.gate.open()
        return await recover(self)

    patches.set(RecoveryRunner, "recover", recover_later)


def _answer_before_the_commit(patches: Patches) -> None:
    """Answer a write once it is carried out, although its commit may fail."""
    from runrecovery_service.storage.group_commit import GroupCommitWriter

    def commit(self: Any, batch: Any) -> None:
        try:
            with self._db.transaction():
                for write in batch:
                    write.attempt(self._db)
                    write.resolve()
                self._world.pass_point("commit")
        except Exception:  # noqa: BLE001, S110 - everybody has an answer
            pass

    patches.set(GroupCommitWriter, "_commit", commit)


def _forget_receipts(patches: Patches) -> None:
    """Record no receipt of a request."""
    from runrecovery_service.storage import requests

    patches.set(requests, "record_effect", lambda *_, **__: None)


def _lose_replies(patches: Patches) -> None:
    """Forget at a start the replies that no process has got."""
    from runrecovery_service.storage import stale_bindings

    clear = stale_bindings.clear_stale_bindings

    def clear_replies(db: Any, recovered: Any) -> Any:
        with db.transaction():
            db.execute("UPDATE interaction SET response = 'null' WHERE state = 'ANSWERED'")
        return clear(db, recovered)

    patches.set(stale_bindings, "clear_stale_bindings", clear_replies)


def _close_launches_early(patches: Patches) -> None:
    """Close a launch record before its agent starts."""
    from runrecovery_service.storage import launch_records

    record_running = launch_records.record_running

    def close(db: Any, launch: Any, **named: Any) -> None:
        record_running(db, launch, **named)
        db.execute("UPDATE process_lease SET state = 'CLOSED' WHERE id = ?", (launch.key,))

    patches.set(launch_records, "record_running", close)


def _skip_heartbeats(patches: Patches) -> None:
    """Let the trees die by their deadline although the lease is renewed."""
    from runrecovery_service.execution.running_turns import RunningTurns

    patches.set(RunningTurns, "heartbeat", lambda *_: None)


MUTANTS: Final[Mapping[str, Break]] = {
    "rearmed": _rearm_deadlines_from_now,
    "slot-twice": _free_slots_twice,
    "slot-early": _free_slots_early,
    "orphans": _spare_orphans,
    "gate": _serve_before_recovery,
    "answer": _answer_before_the_commit,
    "receipts": _forget_receipts,
    "replies": _lose_replies,
    "launches": _close_launches_early,
    "heartbeats": _skip_heartbeats,
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Break the service inside the context. None: break nothing."""
    patches = Patches()
    try:
        if name is not None:
            MUTANTS[name](patches)
        yield
    finally:
        patches.undo()
