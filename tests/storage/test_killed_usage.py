"""A recovery counts the calls of killed turns by their session files, each call once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.run import Profile, RestartPolicy, RunStatus
from runrecovery_service.domain.session_check import StoredHandle
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.usage import Budget, SessionUsage, TurnUsage, Usage
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.recovery.killed_usage import KilledUsage, with_counted
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import found_ends, launch_records, usage
from runrecovery_service.storage.turns import Turn
from storage.service_store import QUESTION, ServiceStore
from support.sessions import Line, StoredSession, text_of

RESUME: Final[dict[str, Any]] = {"restart_policy": RestartPolicy.RESUME, "max_resumes": 9}


def tokens(calls: int) -> Usage:
    return Usage(input_tokens=100 * calls, cached_input_tokens=40 * calls, output_tokens=20 * calls)


def record(calls: int) -> Line:
    """Return a line of Codex with its total of all calls."""
    total = {"input_tokens": 100, "cached_input_tokens": 40, "output_tokens": 20}
    totals = {name: number * calls for name, number in total.items()}
    return {"type": "token_usage_record", "payload": {"thread_token_usage": totals}}


class Killed:
    """Runs of Codex with one session, whose agents are killed and whose calls a recovery counts."""

    def __init__(self, store: ServiceStore, folder: Path) -> None:
        self.store = store
        self.now_s = 0.0
        self.session = StoredSession.write("codex", folder)
        self.sessions = self.session.home.store
        self.session.file.write_bytes(
            text_of(self.session.home.beginning(self.session.handle, self.session.workspace))
        )

    def call(self, total: int) -> None:
        """Store a call in the session file, which then has `total` calls."""
        with self.session.file.open("ab") as file:
            file.write(text_of([record(total)]))

    def run(self, turn: Turn) -> Turn:
        """Record that the agent of a turn runs."""
        launch, owner = turn.launch, self.store.owner
        launch_records.record_gated(self.store.db, launch, owner=owner, pid=7, start_ticks=9)
        launch_records.record_running(self.store.db, launch, owner=owner)
        return turn

    def begin(self, **changes: Any) -> Turn:
        """Return a first turn whose agent has named its session."""
        turn = self.store.running(**changes)
        self.store.keep_session(turn, self.session.handle)
        return self.run(turn)

    def next_turn(self) -> Turn:
        """Return the next turn, whose agent runs."""
        with self.store.db.transaction():
            self.store.db.execute("UPDATE run SET resume_due_us = NULL")  # the pause is over
        turn = self.store.take()
        assert turn is not None
        return self.run(turn)

    def count(
        self, found: dict[int, FoundEnd] | None = None, stop: StopSignal | None = None
    ) -> dict[int, TurnUsage]:
        """Return the usage that a recovery counts."""
        engine = Engine(
            name="demo",
            command=("agent",),
            profile=Profile.RESUMABLE,
            env_allow=(),
            max_concurrent=None,
            session_file=None,
            sessions=self.sessions,
        )
        counts = KilledUsage(
            catalog=Catalog([engine]),
            workspace=lambda key, attempt: self.session.workspace,
            output=lambda key, attempt: self.session.workspace / "stdout.log",
            monotonic=self.monotonic,
        )
        turns = found_ends.open_turns(self.store.db, self.store.scope())
        return counts.count(turns, found or {}, stop or StopSignal())

    def monotonic(self) -> float:
        """Return a time that is 20 s later at each call."""
        self.now_s += 20.0
        return self.now_s

    def recover(self, found: dict[int, FoundEnd] | None = None) -> None:
        """Kill the service and start it again."""
        self.store.restart()
        counted = self.count(found)
        ends = with_counted(found or {}, counted)
        self.store.apply_recovery(found=ends, counted=counted)


@pytest.fixture
def killed(store: ServiceStore, tmp_path: Path) -> Killed:
    """A session without a call."""
    return Killed(store, tmp_path)


def of_engine(store: ServiceStore) -> list[tuple[int, Usage]]:
    return [(one.turns, one.usage) for one in usage.by_engine(store.db)]


def test_each_call_counts_once_however_often_its_turn_is_killed(
    killed: Killed, store: ServiceStore
) -> None:
    turn = killed.begin(**RESUME)
    seen = []
    for total in (1, 1, 3):
        killed.call(total)
        killed.recover()
        seen.append(store.get(turn.run).usage)
        resumed = killed.next_turn()

    assert seen == [tokens(1), tokens(1), tokens(3)]
    assert resumed.session_usage == SessionUsage(stored=tokens(3))
    assert of_engine(store) == [(2, tokens(3))]


def test_a_killed_turn_without_a_call_has_no_usage(killed: Killed, store: ServiceStore) -> None:
    turn = killed.begin(**RESUME)
    killed.recover()
    assert store.get(turn.run).usage is None
    assert of_engine(store) == []
    killed.next_turn()
    killed.call(2)

    killed.recover()

    assert store.get(turn.run).usage == tokens(2)


def test_a_run_that_the_recovery_fails_has_the_calls_of_its_last_turn(
    killed: Killed, store: ServiceStore
) -> None:
    turn = killed.begin()
    killed.call(2)

    killed.recover()

    run = store.get(turn.run)
    assert (run.status, run.usage) == (RunStatus.FAILED, tokens(2))


def test_a_recovery_that_is_repeated_counts_nothing_again(
    killed: Killed, store: ServiceStore
) -> None:
    turn = killed.begin(**RESUME)
    killed.call(2)
    store.restart()
    killed.count()

    killed.recover()
    killed.recover()

    assert store.get(turn.run).usage == tokens(2)
    assert of_engine(store) == [(1, tokens(2))]


def test_calls_of_a_killed_turn_use_up_the_budget(killed: Killed, store: ServiceStore) -> None:
    turn = killed.begin(**RESUME, budget=Budget(max_tokens=240))
    killed.call(2)
    killed.recover()

    assert store.take() is None

    error = store.get(turn.run).error
    assert error is not None
    assert error.code == "BUDGET_EXCEEDED"


def test_a_turn_that_had_reported_keeps_its_report(killed: Killed, store: ServiceStore) -> None:
    turn = killed.begin(**RESUME)
    killed.call(3)
    reported = TurnUsage(turn=tokens(2), session=SessionUsage(total=tokens(2)))
    with store.db.transaction():
        usage.record(store.db, store.get(turn.run), turn.launch, reported, owner=store.owner)

    killed.recover()

    assert store.get(turn.run).usage == tokens(2)
    assert usage.of_session(store.db, turn.run.key) == SessionUsage(
        total=tokens(2), stored=tokens(3)
    )


def test_a_turn_after_a_found_question_has_only_its_own_calls(
    killed: Killed, store: ServiceStore
) -> None:
    turn = killed.begin(**RESUME)
    killed.call(2)
    reported = TurnUsage(turn=tokens(2), session=SessionUsage(total=tokens(2)))
    killed.recover({turn.run.key: FoundEnd(end=Asked(QUESTION), used=reported)})
    waiting = store.get(turn.run)
    assert (waiting.status, waiting.usage) == (RunStatus.WAITING_USER, tokens(2))
    store.reply(waiting)
    killed.next_turn()
    killed.call(3)

    killed.recover()

    assert store.get(turn.run).usage == tokens(3)


def test_a_found_result_is_not_sought_in_the_session(killed: Killed, store: ServiceStore) -> None:
    turn = killed.begin()
    killed.call(2)
    store.restart()
    found = {turn.run.key: FoundEnd(end=Succeeded({}), used=TurnUsage(turn=tokens(1)))}

    assert killed.count(found) == {}


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("x")])
def test_a_session_that_cannot_be_read_counts_nothing_and_the_log_says_why(
    killed: Killed, store: ServiceStore, damage: Callable[[Path], object]
) -> None:
    turn = killed.begin(**RESUME)
    killed.call(1)
    damage(killed.session.file)

    with structlog.testing.capture_logs() as logged:
        killed.recover()

    assert store.get(turn.run).usage is None
    (line,) = [each for each in logged if each["event"] == "recovery.session_usage_not_read"]
    assert line["run_id"] == turn.run.run_id
    assert line["reason"] in {"missing", "broken"}


def test_a_session_that_has_lost_calls_counts_nothing_and_the_log_says_so(
    killed: Killed, store: ServiceStore
) -> None:
    turn = killed.begin(**RESUME)
    killed.call(3)
    killed.recover()
    killed.next_turn()
    killed.call(2)

    with structlog.testing.capture_logs() as logged:
        killed.recover()

    assert store.get(turn.run).usage == tokens(3)
    reasons = [each["reason"] for each in logged if each["log_level"] == "warning"]
    assert reasons == ["fewer_calls"]


class Hanging:
    """A search for a session that does not answer until it is released."""

    def __init__(self, sessions: CliSessions) -> None:
        self.released = threading.Event()
        self.sessions = replace(sessions, finder=lambda: self)

    def paths(self, stored: StoredHandle) -> Iterator[Path]:
        """Hang."""
        self.released.wait()
        yield from ()


def test_sessions_that_do_not_answer_delay_a_recovery_only_for_its_time_limit_or_until_a_stop(
    killed: Killed, store: ServiceStore
) -> None:
    turn = killed.begin(**RESUME)
    hanging = Hanging(killed.sessions)
    killed.sessions = hanging.sessions
    stop = StopSignal()
    try:
        with structlog.testing.capture_logs() as logged:
            killed.recover()
        assert store.get(turn.run).status is RunStatus.QUEUED
        killed.next_turn()
        store.restart()
        stop.request()

        with pytest.raises(RecoveryInterrupted):
            killed.count(stop=stop)
    finally:
        hanging.released.set()

    reasons = [each.get("reason") for each in logged if each["log_level"] == "warning"]
    assert reasons == ["TimeoutError"]


def test_all_sessions_that_do_not_answer_have_one_time_limit_together(
    killed: Killed, store: ServiceStore
) -> None:
    hanging = Hanging(killed.sessions)
    killed.sessions = hanging.sessions
    for _ in range(2):
        killed.begin(**RESUME)
    store.restart()
    begun_s = killed.now_s
    try:
        assert killed.count() == {}
    finally:
        hanging.released.set()

    assert (
        killed.now_s - begun_s == 80.0
    )  # four reads of the clock: one begins the limit, the second session gets one
