"""A restart keeps a waiting run with a complete session file, and a plan shows the decision."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery_service.domain.explanation import explain_facts
from runrecovery_service.domain.reconciliation import Cause, Reconciliation
from runrecovery_service.domain.run import Profile, Run, Session
from runrecovery_service.domain.session_check import (
    SessionCheck,
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    StoredHandle,
    UnknownSession,
)
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.domain.turn import Asked
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.sessions.lines import FOUND
from runrecovery_service.recovery import bulk_session_check
from runrecovery_service.recovery.bulk_session_check import CHECK_S, BulkSessionCheck
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.reconcile import Leftovers, Recovery, RecoveryLimits
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import decisions, reopening, turns
from runrecovery_service.storage.session_checks import StoredSession
from storage.service_store import QUESTION, ServiceStore
from support.recovery import FakeLaunchEnder, FakeTrustCleaner
from support.sessions import PRESETS, SessionHome, text_of

LOST: Final = "SESSION_RESUME_FAILED"


@dataclass(frozen=True, slots=True)
class OneEngineService:
    """A service of one engine, with its store and the sessions of its CLI."""

    store: ServiceStore
    home: SessionHome
    top: Path
    unknown: UnknownSession
    look: Callable[[Sequence[StoredHandle]], Iterable[SessionFinding]] | None = None
    """Called instead of the engine's check."""

    def workspace(self, run_key: int, attempt: int) -> Path:
        """Return the workspace of an attempt."""
        return self.top / "runs" / str(run_key) / str(attempt) / "workspace"

    @property
    def checks(self) -> Mapping[str, SessionCheck]:
        """The session check of the engine."""
        engine = Engine(
            name="demo", command=("agent",), profile=Profile.RESUMABLE, env_allow=(),
            max_concurrent=None, session_file=None, sessions=self.home.store,
            unknown_session=self.unknown,
        )  # fmt: skip
        assert engine.session_check is not None
        check = engine.session_check
        return {"demo": check if self.look is None else replace(check, run=self.look)}

    @property
    def sessions(self) -> BulkSessionCheck:
        """The bulk check of a recovery, with this session check."""
        return BulkSessionCheck(checks=self.checks, workspace=self.workspace)

    def waiting(self, *, fingerprinted: bool = True, answered: bool = False) -> tuple[Run, Path]:
        """Return a run that waits for its user, or is queued with a reply, and its session file."""
        turn = self.store.running()
        workspace = self.workspace(turn.run.key, turn.run.attempt)
        workspace.mkdir(parents=True)
        handle = self.home.new_id(turn.run.key)
        file = self.home.write(handle, workspace, filler=100)
        self.store.keep_session(turn, handle)
        fingerprint = self.home.fingerprint(handle, workspace) if fingerprinted else None
        run = self.store.end(turn, Asked(QUESTION), fingerprint=fingerprint)
        return (self.store.reply(run) if answered else run), file

    def recover(
        self, *, stop: StopSignal | None = None, check_s: float = CHECK_S
    ) -> Reconciliation:
        """Restart, and recover as the service does."""
        self.store.restart()
        limits = RecoveryLimits(
            batch_rows=3, batch_s=1, safe_mode_after=0, safe_mode_window_s=0, reopen_window_s=60
        )
        return Recovery(
            owner=self.store.owner,
            cause=Cause.STARTUP,
            clock=self.store.ticking_clock,
            limits=limits,
            stop=stop or StopSignal(),
            leftovers=Leftovers(
                sessions=replace(self.sessions, check_s=check_s),
                launches=FakeLaunchEnder(),
                trust=FakeTrustCleaner(),
            ),
        ).run(self.store.db, RecoveryStatus())

    def planned(self) -> tuple[dict[str, str], dict[str, int]]:
        """Return the rule that a plan shows for each run, and the number of runs per rule."""
        planner = Planner(
            owner=self.store.owner, sessions=self.sessions, clock=self.store.ticking_clock
        )
        page, totals = planner.decide(planner.read(self.store.db, after=None, limit=100))
        assert totals is not None
        rules = {one.run_id: one.decision.rule for one in page.rows}
        return rules, {count.rule: count.count for count in totals.decisions}

    def recorded(self, run: Run) -> tuple[object, ...]:
        """Return the stored status, error, verdict and reason of a run."""
        (row,) = self.store.rows(
            "SELECT status, error_code, session_verdict, session_reason FROM run WHERE id = ?",
            run.key,
        )
        return row

    def explained(self, run: Run) -> str:
        """Return the explanation of the session of a run."""
        (seen,) = decisions.explain(self.store.db, run.run_id, limit=9)
        (source,) = (fact.source for fact in explain_facts(seen) if fact.name == "HANDLE")
        return source


@pytest.fixture(params=PRESETS)
def preset(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def service(store: ServiceStore, tmp_path: Path, preset: str) -> OneEngineService:
    home = SessionHome(preset, tmp_path.resolve() / "home")
    return OneEngineService(store, home, tmp_path.resolve(), UnknownSession.KEEP)


def untouched(file: Path) -> None:
    pass


def grown(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(text_of([{"type": "note"}]) + b'{"half a')


def removed(file: Path) -> None:
    file.unlink()


def cut_in_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_at_a_line(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def replaced(file: Path) -> None:
    file.unlink()
    file.mkdir()


def rewritten(file: Path) -> None:
    file.write_bytes(b'{"format":"of the future"}\n' + b"{}\n" * 100_000)


KEPT: Final = [(untouched, "unchanged"), (grown, "whole")]
GONE: Final = [
    (removed, "missing"), (cut_in_half, "cut_off"), (cut_at_a_line, "cut_off"),
    (emptied, "empty"), (replaced, "not_a_file"),
]  # fmt: skip


def test_a_restart_keeps_and_fails_runs_by_their_session_files_as_planned(
    service: OneEngineService,
) -> None:
    kept = [(service.waiting(), how, reason) for how, reason in KEPT]
    gone = [(service.waiting(), how, reason) for how, reason in GONE]
    bare, _ = service.waiting(fingerprinted=False)
    answered, file = service.waiting(answered=True)
    for (_, session), how, _ in (*kept, *gone):
        how(session)
    file.unlink()
    rules, counts = service.planned()

    report = service.recover()

    for (run, _), _, reason in kept:
        assert service.recorded(run) == ("WAITING_USER", None, "VALID", reason)
    for (run, _), _, reason in gone:
        assert service.recorded(run) == ("FAILED", LOST, "INVALID", reason)
    assert service.recorded(bare) == ("WAITING_USER", None, "VALID", "whole")
    assert service.recorded(answered) == ("FAILED", LOST, "INVALID", "missing")
    assert rules == dict(reasons_by_id(service.store))
    assert counts == {count.rule: count.count for count in report.decisions}
    assert counts == {
        "resumable_waiting_preserved": 3, "session_handle_lost": 5,
        "accepted_reply_session_lost": 1,
    }  # fmt: skip


def reasons_by_id(store: ServiceStore) -> list[tuple[str, str]]:
    return [(row[0], row[1]) for row in store.rows("SELECT run_id, recovery_reason FROM run")]


@pytest.mark.parametrize("unknown", UnknownSession)
def test_a_session_that_was_never_seen_is_not_known_to_be_lost(
    store: ServiceStore, tmp_path: Path, preset: str, unknown: UnknownSession
) -> None:
    home = SessionHome(preset, tmp_path.resolve() / "home")
    service = OneEngineService(store, home, tmp_path.resolve(), unknown)
    gone = [
        (service.waiting(fingerprinted=False), how, reason)
        for how, reason in GONE
        if how is not cut_at_a_line  # without a fingerprint the file looks complete
    ]
    for (_, session), how, _ in gone:
        how(session)
    rules, counts = service.planned()

    report = service.recover()

    kept = unknown is UnknownSession.KEEP
    for (run, _), _, reason in gone:
        assert service.recorded(run) == (
            ("WAITING_USER", None, "UNKNOWN", reason)
            if kept
            else ("FAILED", LOST, "UNKNOWN_REFUSED", reason)
        )
    assert rules == dict(reasons_by_id(store))
    assert counts == {count.rule: count.count for count in report.decisions}


def test_an_unmounted_home_of_a_cli_loses_no_run(service: OneEngineService) -> None:
    run, file = service.waiting()
    away = service.home.path.rename(service.home.path.with_name("away"))
    service.recover()
    assert service.recorded(run) == ("WAITING_USER", None, "UNKNOWN", "home_away")

    away.rename(service.home.path)
    service.recover()
    assert service.recorded(run)[2:] == ("VALID", "unchanged")
    file.unlink()
    service.store.restart()
    service.recover()
    assert service.recorded(run) == ("FAILED", LOST, "INVALID", "missing")


@pytest.mark.parametrize("unknown", UnknownSession)
def test_a_check_that_does_not_answer_fails_neither_the_start_nor_a_run(
    store: ServiceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: UnknownSession
) -> None:
    monkeypatch.setattr(bulk_session_check, "SESSIONS_PER_CHECK", 2)
    release, asked = threading.Event(), list[int]()

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        asked.append(len(handles))
        yield FOUND[SessionReason.WHOLE]
        release.wait()
        yield FOUND[SessionReason.MISSING]

    home = SessionHome("claude", tmp_path.resolve() / "home")
    service = OneEngineService(store, home, tmp_path.resolve(), unknown, hang)
    runs = [service.waiting()[0] for _ in range(5)]
    store.restart()
    try:
        report = service.recover(check_s=0.0)
    finally:
        release.set()

    kept = unknown is UnknownSession.KEEP
    silent = (
        ("WAITING_USER", None, "UNKNOWN", "not_answered")
        if kept
        else ("FAILED", LOST, "UNKNOWN_REFUSED", "not_answered")
    )
    assert asked == [2]  # the check is not called for the other bulks
    assert service.recorded(runs[0])[2:] == ("VALID", "whole")
    assert [service.recorded(run) for run in runs[1:]] == [silent] * 4
    (warning,) = report.warnings
    assert warning.startswith("engine demo: ")


def test_a_recovery_stops_while_a_check_does_not_answer(
    store: ServiceStore, tmp_path: Path
) -> None:
    release, stop = threading.Event(), StopSignal()

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        stop.request()
        release.wait()
        yield from ()

    home = SessionHome("claude", tmp_path.resolve() / "home")
    service = OneEngineService(store, home, tmp_path.resolve(), UnknownSession.KEEP, hang)
    service.waiting()
    store.restart()
    try:
        with pytest.raises(RecoveryInterrupted):
            service.recover(stop=stop, check_s=3600.0)
    finally:
        release.set()

    assert store.rows("SELECT session_verdict FROM run") == [(None,)]


def test_a_check_that_hangs_takes_no_time_from_other_engines(store: ServiceStore) -> None:
    release, clock = threading.Event(), [0.0]
    one = StoredSession(run_key=1, attempt=1, handle="h", fingerprint=None, finding=None)

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        clock[0] += 100
        release.wait()
        yield from ()

    bulk = BulkSessionCheck(
        checks={
            "hangs": SessionCheck(hang),
            "answers": SessionCheck(lambda handles: [FOUND[SessionReason.WHOLE] for _ in handles]),
        },
        workspace=lambda key, attempt: Path("/"),
        check_s=99,
        monotonic=lambda: clock[0],
    )
    try:
        for _ in range(2):
            assert bulk.check_all("hangs", [one, one]) == [FOUND[SessionReason.NOT_ANSWERED]] * 2
            assert bulk.check_all("answers", [one]) == [FOUND[SessionReason.WHOLE]]
    finally:
        release.set()
    assert clock == [100.0]
    assert list(bulk.hanging) == ["hangs"]


def test_a_copy_keeps_its_checks_when_engines_are_reloaded() -> None:
    one = StoredSession(run_key=1, attempt=1, handle="h", fingerprint=None, finding=None)

    def finds(reason: SessionReason) -> SessionCheck:
        return SessionCheck(lambda handles: [FOUND[reason] for _ in handles])

    bulk = BulkSessionCheck(
        checks={"demo": finds(SessionReason.WHOLE)}, workspace=lambda key, attempt: Path("/")
    )
    bulk.hanging["demo"] = Future()
    plan = replace(bulk, hanging={})

    bulk.replace_checks({"demo": finds(SessionReason.NOT_ANSWERED)})

    assert plan.check_all("demo", [one]) == [FOUND[SessionReason.WHOLE]]
    assert bulk.check_all("demo", [one]) == [FOUND[SessionReason.NOT_ANSWERED]]
    assert not bulk.hanging


def test_a_defect_in_a_check_is_not_taken_for_a_timeout(store: ServiceStore) -> None:
    one = StoredSession(run_key=1, attempt=1, handle="h", fingerprint=None, finding=None)

    def fail(handles: Sequence[StoredHandle]) -> list[SessionFinding]:
        raise ZeroDivisionError

    bulk = BulkSessionCheck(
        checks={"demo": SessionCheck(fail)}, workspace=lambda key, attempt: Path("/")
    )
    with pytest.raises(ZeroDivisionError):
        bulk.check_all("demo", [one])


@pytest.mark.parametrize("unknown", UnknownSession)
def test_the_configured_policy_decides_on_sessions_that_cannot_be_judged(
    store: ServiceStore, tmp_path: Path, preset: str, unknown: UnknownSession
) -> None:
    home = SessionHome(preset, tmp_path.resolve() / "home")
    service = OneEngineService(store, home, tmp_path.resolve(), unknown)
    run, file = service.waiting()
    rewritten(file)
    rules, _ = service.planned()

    service.recover()

    kept = unknown is UnknownSession.KEEP
    assert service.recorded(run) == (
        ("WAITING_USER", None, "UNKNOWN", "not_known")
        if kept
        else ("FAILED", LOST, "UNKNOWN_REFUSED", "not_known")
    )
    assert rules == dict(reasons_by_id(store))
    assert "a format that this version does not know" in service.explained(run)
    assert f'unknown_session = "{unknown}"' in service.explained(run)


def test_an_explanation_shows_the_finding_and_not_the_handle(service: OneEngineService) -> None:
    run, file = service.waiting()
    cut_at_a_line(file)

    service.recover()

    assert "was stored, but its session file was cut off." in service.explained(run)
    assert run.session is not None
    assert run.session.handle not in service.explained(run)


def test_a_run_whose_session_is_back_is_reopened_and_kept_by_its_fingerprint(
    service: OneEngineService,
) -> None:
    run, file = service.waiting()
    away = file.with_suffix(".away")
    shutil.move(file, away)
    service.recover()
    fingerprint = service.store.column(run, "session_mark")
    shutil.move(away, file)
    reopen(service.store, run)

    service.recover()

    assert service.recorded(run) == ("WAITING_USER", None, "VALID", "unchanged")
    assert fingerprint is not None
    assert service.store.column(run, "session_mark") == fingerprint


def test_a_recovery_stops_between_two_bulks_of_checks(service: OneEngineService) -> None:
    service.waiting()
    stop = StopSignal()
    stop.request()

    with pytest.raises(RecoveryInterrupted):
        service.recover(stop=stop)

    assert service.store.rows("SELECT session_verdict FROM run") == [(None,)]


# -- the stored fingerprint --------------------------------------------------------------------

FINGERPRINT: Final = SessionFingerprint(1234, 5678)


def reopen(store: ServiceStore, run: Run, handle: str | None = None) -> Run:
    return reopening.reopen(
        store.db, run.run_id, handle=handle, session_type_of=lambda _: "jsonl",
        wait_s_of=lambda _: 60.0, owner=store.owner, etag=None, receipt=None,
        due_in=store.due_in, steady=store.steady, now=store.tick(),
    )  # fmt: skip


def asked(store: ServiceStore, **changes: Any) -> Run:
    """Return a run that has asked, with a session fingerprint."""
    turn = store.running(**changes)
    store.keep_session(turn, "handle")
    return store.end(turn, Asked(QUESTION), fingerprint=FINGERPRINT)


def test_a_fingerprint_is_recorded_with_its_question(store: ServiceStore) -> None:
    assert store.column(asked(store), "session_mark") == "1234 5678"


def test_a_question_without_a_fingerprint_clears_the_earlier_one(store: ServiceStore) -> None:
    run = asked(store)
    store.reply(run)
    turn = store.take()
    assert turn is not None

    store.end(turn, Asked(QUESTION))

    assert store.column(run, "session_mark") is None


def test_a_question_clears_the_finding_of_an_earlier_restart(store: ServiceStore) -> None:
    run = asked(store)
    store.reply(run)
    turn = store.take()
    assert turn is not None
    store.set(run, session_verdict="UNKNOWN", session_reason="not_known")

    store.end(turn, Asked(QUESTION), fingerprint=FINGERPRINT)

    assert store.column(run, "session_mark") == "1234 5678"
    assert store.column(run, "session_verdict") is None
    assert store.column(run, "session_reason") is None


@pytest.mark.parametrize(("handle", "expected"), [("handle", "1234 5678"), ("another", None)])
def test_a_new_handle_clears_the_fingerprint(
    store: ServiceStore, handle: str, expected: str | None
) -> None:
    run = asked(store)
    store.reply(run)
    turn = store.take()
    assert turn is not None

    session = Session(type="demo", handle=handle, turn=2)
    turns.record_session(store.db, turn, owner=store.owner, session=session, now=store.tick())

    assert store.column(run, "session_mark") == expected


def test_a_new_attempt_has_no_fingerprint(store: ServiceStore) -> None:
    run = asked(store)
    store.set(run, status="QUEUED", interaction_count=0, session_reason="whole")

    turn = store.take()

    assert turn is not None
    assert turn.reply is None
    assert store.column(run, "session_mark") is None
    assert store.column(run, "session_reason") is None


@pytest.mark.parametrize(
    ("handle", "expected"), [(None, "1234 5678"), ("handle", "1234 5678"), ("another", None)]
)
def test_a_reopened_run_keeps_the_fingerprint_of_its_own_handle_only(
    store: ServiceStore, handle: str | None, expected: str | None
) -> None:
    run = asked(store)
    store.set(run, session_verdict="INVALID", session_reason="missing")
    store.recover()
    assert store.column(run, "session_mark") == "1234 5678"

    reopen(store, run, handle)

    assert store.column(run, "session_mark") == expected
    assert store.column(run, "session_reason") is None
