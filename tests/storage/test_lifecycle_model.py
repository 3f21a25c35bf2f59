"""Any sequence of calls, turns, crashes and restarts leads where a plain model of a run says.

The model is written from docs/recovery.md, in other words than the matrix of the service.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from runrecovery_service.domain.errors import (
    InteractionSuperseded,
    RunAlreadyTerminal,
    RunNotWaiting,
)
from runrecovery_service.domain.run import (
    InteractionState,
    Profile,
    RestartPolicy,
    Run,
    RunError,
    RunStatus,
)
from runrecovery_service.domain.turn import Asked, Failed, Succeeded
from runrecovery_service.storage import (
    events,
    instances,
    interactions,
    launch_records,
    runs,
    turns,
)
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.turns import Turn
from storage.service_store import QUESTION, Crash, CrashingDatabase, ServiceStore, boot
from support.migrated_store import copy_migrated_store

ENDED = (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELED)
LIVE = (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING_USER)
PROFILES = st.sampled_from([Profile.RESUMABLE, Profile.RESUMABLE, Profile.STICKY_PROCESS])
MAX_ATTEMPTS, MAX_RESUMES = 2, 1
NUMBERS = itertools.count()
POLICIES = st.sampled_from([*RestartPolicy, RestartPolicy.RESUME])


@dataclass
class Expected:
    """A run as its callers have to see it.

    Attributes:
        asked: how many questions it has asked.
        has_reply: an accepted reply that no process has got.
        has_session: the next turn could resume a session.
        is_interrupted: a restart has ended its process, and its next turn may go on.
        turn: the turn under way, with a living process.
    """

    profile: Profile
    policy: RestartPolicy
    status: RunStatus = RunStatus.QUEUED
    asked: int = 0
    has_reply: bool = False
    has_session: bool = False
    is_canceled: bool = False
    is_interrupted: bool = False
    attempts: int = 0
    resumes: int = 0
    turn: Turn | None = None
    replies: dict[int, str] = field(default_factory=dict)

    @property
    def is_sticky(self) -> bool:
        return self.profile is Profile.STICKY_PROCESS

    def end(self, status: RunStatus) -> None:
        """End it."""
        self.status, self.turn, self.has_reply, self.has_session = status, None, False, False

    def restart(self) -> None:
        """Do what a restart of the service does, after which no process lives."""
        self.turn = None
        if self.status in ENDED:
            return
        if self.is_canceled:
            self.end(RunStatus.CANCELED)
        elif self.status is RunStatus.WAITING_USER:
            if self.is_sticky or not self.has_session:
                self.end(RunStatus.FAILED)
        elif self.has_reply and self.has_session and not self.is_sticky:
            self.status = RunStatus.QUEUED
        else:
            self._begin_again()

    def _begin_again(self) -> None:
        may_start_over = self.attempts < MAX_ATTEMPTS
        if self.policy is RestartPolicy.REQUEUE and may_start_over:
            self.status, self.has_reply, self.has_session = RunStatus.QUEUED, False, False
        elif self.policy is RestartPolicy.RESUME and self.has_session:
            if self.status is RunStatus.RUNNING and self.resumes >= MAX_RESUMES:
                self.end(RunStatus.FAILED)
            else:
                self.is_interrupted |= self.status is RunStatus.RUNNING
                self.status = RunStatus.QUEUED
        elif self.policy is RestartPolicy.RESUME and may_start_over and not self.has_reply:
            self.status = RunStatus.QUEUED
        else:
            self.end(RunStatus.FAILED)


class Service(RuleBasedStateMachine):
    """A service's store, and what callers have to see of it."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        data = type(self).folder / str(next(NUMBERS))
        copy_migrated_store(data)
        db = open_database("", data)
        db.execute("PRAGMA synchronous = 0")  # no power cut comes here
        self.store = ServiceStore(db=db, owner=instances.claim(db, boot(), now=ServiceStore.now))
        self.runs: dict[str, Expected] = {}

    def teardown(self) -> None:
        self.store.db.close()

    def are(self, *statuses: RunStatus) -> list[str]:
        """Return the runs in one of these statuses."""
        return [run_id for run_id, run in self.runs.items() if run.status in statuses]

    def at_work(self) -> list[str]:
        """Return the runs with a process that has not asked."""
        return [run_id for run_id in self.are(RunStatus.RUNNING) if self.runs[run_id].turn]

    def one_of(self, data: st.DataObject, run_ids: list[str]) -> tuple[Expected, Run]:
        """Return some run, as it is expected and as it is in the store."""
        run_id = data.draw(st.sampled_from(run_ids))
        return self.runs[run_id], self.store_run(run_id)

    # -- what callers do -----------------------------------------------------------------------

    @precondition(lambda self: len(self.are(*LIVE)) < 3)
    @rule(profile=PROFILES, policy=POLICIES)
    def create(self, profile: Profile, policy: RestartPolicy) -> None:
        run = self.store.create(
            profile=profile,
            restart_policy=policy,
            max_attempts=MAX_ATTEMPTS,
            max_resumes=MAX_RESUMES,
        )
        self.runs[run.run_id] = Expected(profile, policy)

    @precondition(lambda self: self.are(RunStatus.WAITING_USER))
    @rule(data=st.data(), response=st.sampled_from(["yes", "no"]))
    def reply(self, data: st.DataObject, response: str) -> None:
        run, of = self.one_of(data, self.are(RunStatus.WAITING_USER))
        if run.is_canceled:  # a sticky process that still has to end
            with pytest.raises(RunNotWaiting):
                self.store.reply(of, response, no=run.asked)
            return
        self.store.reply(of, response, no=run.asked)
        run.replies[run.asked], run.has_reply, run.resumes = response, True, 0
        run.status = RunStatus.RUNNING if run.is_sticky else RunStatus.QUEUED

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def reply_in_vain(self, data: st.DataObject) -> None:
        run, of = self.one_of(data, list(self.runs))
        with pytest.raises((RunNotWaiting, InteractionSuperseded)):
            self.store.reply(of, "maybe", no=run.asked + 1)

    @precondition(lambda self: self.are(*LIVE, RunStatus.CANCELED))
    @rule(data=st.data(), really=st.sampled_from([False, False, False, True]))
    def cancel(self, data: st.DataObject, *, really: bool) -> None:
        run, of = self.one_of(data, self.are(*LIVE, RunStatus.CANCELED))
        if not really:  # most runs shall live longer
            return
        self.store.cancel(of)
        if run.turn is None and run.status is not RunStatus.CANCELED:
            run.end(RunStatus.CANCELED)
        run.is_canceled = True

    @precondition(lambda self: self.are(RunStatus.SUCCEEDED, RunStatus.FAILED))
    @rule(data=st.data())
    def cancel_in_vain(self, data: st.DataObject) -> None:
        _, of = self.one_of(data, self.are(RunStatus.SUCCEEDED, RunStatus.FAILED))
        with pytest.raises(RunAlreadyTerminal):
            self.store.cancel(of)

    # -- what agents do ------------------------------------------------------------------------

    @precondition(lambda self: self.are(RunStatus.QUEUED))
    @rule(names_session=st.booleans())
    def take(self, *, names_session: bool) -> None:
        turn = self.store.take()
        if turn is None:  # all of them pause before they are resumed
            assert all(self.runs[run_id].resumes for run_id in self.are(RunStatus.QUEUED))
            return
        run = self.runs[turn.run.run_id]
        assert run.status is RunStatus.QUEUED
        assert (turn.reply is not None) == run.has_reply
        assert (turn.interruption is not None) == (run.is_interrupted and run.has_session)
        if not run.has_reply and not (run.is_interrupted and run.has_session):
            run.attempts, run.has_session = run.attempts + 1, False
        run.resumes += turn.interruption is not None
        launch_records.record_gated(
            self.store.db, turn.launch, owner=self.store.owner, pid=7, start_ticks=1
        )
        launch_records.record_running(self.store.db, turn.launch, owner=self.store.owner)
        run.status, run.turn, run.is_interrupted = RunStatus.RUNNING, turn, False
        if names_session:
            self.store.keep_session(turn)
            run.has_session = True

    @precondition(lambda self: self.at_work())
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        run, _ = self.one_of(data, self.at_work())
        if run.has_reply and run.turn is not None:
            turns.record_delivered(
                self.store.db, run.turn, owner=self.store.owner, number=run.asked
            )
            run.has_reply = False

    @precondition(lambda self: self.at_work())
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        run, _ = self.one_of(data, self.at_work())
        if run.turn is None or run.is_canceled or not (run.is_sticky or run.has_session):
            return
        if run.is_sticky:
            if run.asked:  # `ask_and_stay` asks the first question of a run
                return
            self.store.ask_and_stay(run.turn)
        else:
            self.store.end(run.turn, Asked(QUESTION))
            run.turn = None
        run.status, run.has_reply, run.asked = RunStatus.WAITING_USER, False, run.asked + 1

    @precondition(lambda self: self.at_work())
    @rule(data=st.data(), succeeds=st.booleans(), really=st.sampled_from([False, True]))
    def end_turn(self, data: st.DataObject, *, succeeds: bool, really: bool) -> None:
        run, _ = self.one_of(data, self.at_work())
        if run.turn is None or not really:
            return
        failed = Failed(RunError(code="ENGINE_FAILED", message="broke"))
        self.store.end(run.turn, Succeeded({"x": 1}) if succeeds else failed)
        if run.is_canceled:
            run.end(RunStatus.CANCELED)
        else:
            run.end(RunStatus.SUCCEEDED if succeeds else RunStatus.FAILED)

    @precondition(lambda self: any(run.has_session and not run.turn for run in self.runs.values()))
    @rule(data=st.data())
    def lose_session(self, data: st.DataObject) -> None:
        ids = [key for key, run in self.runs.items() if run.has_session and not run.turn]
        run, of = self.one_of(data, ids)
        self.store.set(of, session_value=None)
        run.has_session = False

    # -- restarts ------------------------------------------------------------------------------

    @precondition(lambda self: self.are(*LIVE))
    @rule(rows=st.integers(1, 4), crash_at=st.none() | st.integers(0, 60), twice=st.booleans())
    def restart(self, rows: int, crash_at: int | None, *, twice: bool) -> None:
        if crash_at is not None:
            self.crash_in_a_recovery(crash_at, rows)
        self.store.recover(rows=rows)
        for run in self.runs.values():
            run.restart()
        if twice:
            self.store.recover(rows=rows)
            for run in self.runs.values():
                run.restart()

    def crash_in_a_recovery(self, at: int, rows: int) -> None:
        """Begin a recovery, which is killed at one of its statements."""
        whole = self.store.db
        self.store.restart()
        self.store.db = CrashingDatabase(whole, at)
        with suppress(Crash):
            self.store.apply_recovery(rows=rows)
        self.store.db = whole
        if whole.peewee.in_transaction():
            whole.peewee.rollback()

    # -- what must always be true --------------------------------------------------------------

    @invariant()
    def every_run_is_as_expected(self) -> None:
        for run_id, run in self.runs.items():
            of = self.store_run(run_id)
            assert of.status is run.status, (run_id, of.status, run)
            assert of.cancel_requested <= run.is_canceled
            assert (of.pending is not None) == (run.status is RunStatus.WAITING_USER)

    @invariant()
    def no_accepted_reply_is_lost(self) -> None:
        for run_id, run in self.runs.items():
            for number, response in run.replies.items():
                found = interactions.find(self.store.db, self.store_run(run_id).key, number)
                assert found is not None
                assert found.response == response
                assert found.state is not InteractionState.OPEN

    @invariant()
    def events_have_no_gap(self) -> None:
        for run_id in self.runs:
            of = self.store_run(run_id)
            found = events.events_after(self.store.db, of, 0)
            assert [event.sequence for event in found] == list(range(1, of.event_count + 1))
            assert found[-1].status is of.status

    def store_run(self, run_id: str) -> Run:
        """Return a run as it is in the store."""
        return runs.get(self.store.db, run_id)


@pytest.mark.hypothesis
def test_calls_turns_and_restarts_in_any_order_lead_where_the_model_says(
    tmp_path: Path,
) -> None:
    Service.folder = tmp_path
    run_state_machine_as_test(Service, settings=settings(max_examples=150, stateful_step_count=40))
