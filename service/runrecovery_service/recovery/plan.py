"""Previews the decisions of a restart at this moment, without changing anything.

The rows are read in one snapshot. Sessions and kept output are read after the snapshot is closed,
because a transaction must not wait for a file system, which does not always answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from datetime import datetime

from runrecovery_service.clock import Clock
from runrecovery_service.domain.plan import (
    Decision,
    PlannedDecision,
    RecoveryPlan,
    Situation,
    Work,
    preview_decision,
    sum_decisions,
)
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact
from runrecovery_service.domain.run import Page, RunStatus
from runrecovery_service.domain.session_check import SessionFinding
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.recovery.bulk_session_check import SESSIONS_PER_CHECK, BulkSessionCheck
from runrecovery_service.recovery.find_end import FindEnd, find_no_end
from runrecovery_service.storage import found_ends, launch_records, recovery_preview
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.found_ends import OpenTurn
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.recovery_preview import PreviewedRun
from runrecovery_service.storage.recovery_scope import RecoveryScope
from runrecovery_service.storage.session_checks import StoredSession

_Session = tuple[StoredSession, Situation, Work]
"""A session to check, the situation of its run as the stored rows describe it, and the run's work.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """The rows from which the totals of all runs are counted.

    Attributes:
        situations: each situation by the stored rows, with the number and the work of its runs.
        sessions: the sessions to check, by engine.
        running: the RUNNING runs. The kept output can show that the turn of such a run has ended.
        launches: how many launches a restart would end.
    """

    situations: Sequence[tuple[Situation, Work]]
    sessions: Mapping[str, Sequence[_Session]] = field(repr=False)
    running: Sequence[PreviewedRun] = field(repr=False)
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one snapshot: a page of runs and, for the first page, the totals of all runs.

    `turns` are the running turns of the page; for the first page, the running turns of all runs.
    """

    page: Sequence[PreviewedRun] = field(repr=False)
    turns: Sequence[OpenTurn] = field(repr=False)
    after: tuple[int, ...] | None
    totals: _Totals | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Previews the next restart of one instance.

    Attributes:
        find_end: finds the ends of turns in their kept output.
    """

    owner: Owner
    sessions: BulkSessionCheck
    clock: Clock
    find_end: FindEnd = find_no_end

    def pinned(self) -> Planner:
        """Return a copy for one plan, whose session checks a reload does not replace."""
        return replace(self, sessions=replace(self.sessions))

    @property
    def _scope(self) -> RecoveryScope:
        return RecoveryScope(owner=self.owner, before=self.owner.epoch + 1)

    def read(self, db: Database, *, after: tuple[int, ...] | None, limit: int) -> Rows:
        """Read a page of runs, in the order in which a restart would decide on them.

        The first page also has the totals, read in the same snapshot.
        """
        now = self.clock.now()
        with db.snapshot():
            runs = recovery_preview.preview_page(
                db, self._scope, after=after[0] if after else 0, limit=limit + 1, now=now
            )
            page = runs[:limit]
            totals = None if after else self._read_totals(db, now)
            return Rows(
                page=page,
                turns=self._open_turns(db, page if totals is None else totals.running),
                after=(runs[limit - 1].run_key,) if len(runs) > limit else None,
                totals=totals,
            )

    def _open_turns(self, db: Database, runs: Sequence[PreviewedRun]) -> list[OpenTurn]:
        """Return the open turns from the first to the last of these runs."""
        keys = [run.run_key for run in runs]
        if not keys:
            return []
        return found_ends.open_turns(db, self._scope, first=min(keys), last=max(keys))

    def _read_totals(self, db: Database, now: datetime) -> _Totals:
        situations = recovery_preview.sum_situations(db, self._scope, now=now)
        # To find the running runs, the database reads the row of every unfinished run.
        is_any_running = any(run.status is RunStatus.RUNNING for run, _ in situations)
        return _Totals(
            situations=situations,
            sessions={engine: self._sessions(db, engine, now) for engine in self.sessions.checks},
            running=recovery_preview.preview_running(db, self._scope, now=now)
            if is_any_running
            else (),
            launches=len(
                launch_records.unclosed_launches(db, self.owner, before=self._scope.before)
            ),
        )

    def _sessions(self, db: Database, engine: str, now: datetime) -> list[_Session]:
        """Return the sessions of an engine. To save memory, equal situations are one object."""
        sessions: list[_Session] = []
        known: dict[Situation, Situation] = {}
        after = 0
        while runs := recovery_preview.preview_engine(
            db, self._scope, engine, after=after, limit=SESSIONS_PER_CHECK, now=now
        ):
            sessions += (
                (run.session, known.setdefault(run.situation, run.situation), run.work)
                for run in runs
                if run.session is not None
            )
            after = runs[-1].run_key
        return sessions

    def decide(self, rows: Rows) -> tuple[Page[PlannedDecision], RecoveryPlan | None]:
        """Check the sessions, and return the page of decisions; for the first page also the plan.

        This blocks. It does not use the store.
        """
        found, plan = self._check_page(rows.page), None
        ends = {
            turn.run_key: end.fact
            for turn in rows.turns
            if (end := self.find_end(turn)) is not None
        }
        if rows.totals is not None:
            plan = self._count(rows.totals, found, ends)
        decisions = tuple(
            PlannedDecision(
                run_id=run.run_id,
                engine=run.engine,
                status=run.situation.status,
                decision=preview_decision(_now(run, found, ends)),
            )
            for run in rows.page
        )
        return Page(rows=decisions, after=rows.after), plan

    def _check_page(self, page: Sequence[PreviewedRun]) -> dict[int, SessionFinding]:
        """Check the sessions of these runs, and return the findings by run key."""
        self._forget_finished_checks()
        found: dict[int, SessionFinding] = {}
        for engine in self.sessions.checks:
            stored = [run.session for run in page if run.engine == engine and run.session]
            keys = [session.run_key for session in stored]
            found |= zip(keys, self.sessions.check_all(engine, stored), strict=True)
        return found

    def _count(
        self, totals: _Totals, found: Mapping[int, SessionFinding], ends: Mapping[int, Fact]
    ) -> RecoveryPlan:
        """Add up all runs by stored situation, then correct runs whose situation now differs."""
        sums: defaultdict[Decision, Work] = defaultdict(Work)

        def correct(before: Situation, now: Situation, work: Work) -> None:
            if now != before:
                sums[preview_decision(before)] -= work
                sums[preview_decision(now)] += work

        for situation, work in totals.situations:
            sums[preview_decision(situation)] += work
        self._forget_finished_checks()
        of_ended: dict[int, SessionFinding] = {}
        for engine, sessions in totals.sessions.items():
            for (stored, situation, work), finding in _findings(
                self.sessions, engine, sessions, found
            ):
                correct(situation, _with_finding(situation, finding), work)
                if stored.run_key in ends:
                    of_ended[stored.run_key] = finding
        for run in totals.running:
            if run.run_key in ends:
                correct(_now(run, of_ended, {}), _now(run, of_ended, ends), run.work)
        return sum_decisions(sums.items(), launches=totals.launches)

    def _forget_finished_checks(self) -> None:
        """Allow new checks of engines whose hanging check has finished."""
        hanging = self.sessions.hanging
        for engine, check in list(hanging.items()):
            if check.done():
                hanging.pop(engine, None)


def _findings(
    bulk: BulkSessionCheck,
    engine: str,
    sessions: Sequence[_Session],
    known: Mapping[int, SessionFinding],
) -> Iterator[tuple[_Session, SessionFinding]]:
    """Yield each session with its finding; sessions with a known finding are not checked again."""
    for at in range(0, len(sessions), SESSIONS_PER_CHECK):
        portion = sessions[at : at + SESSIONS_PER_CHECK]
        unknown = [stored for stored, _, _ in portion if stored.run_key not in known]
        findings = iter(bulk.check_all(engine, unknown))
        for session in portion:
            finding = known.get(session[0].run_key)
            yield session, next(findings) if finding is None else finding


def _now(
    run: PreviewedRun, found: Mapping[int, SessionFinding], ends: Mapping[int, Fact]
) -> Situation:
    """Return the situation of a run, corrected by the findings in its session and kept output."""
    situation = _with_finding(run.situation, found.get(run.run_key))
    return replace(situation, facts=situation.facts | ends.get(run.run_key, NOTHING))


def _with_finding(situation: Situation, finding: SessionFinding | None) -> Situation:
    """Return the situation of a run, corrected by the finding about its session.

    Args:
        finding: None: the run has no session, or its engine has no session check.
    """
    if finding is None:
        return situation
    facts = situation.facts
    return replace(situation, facts=facts | Fact.HANDLE if finding.holds else facts & ~Fact.HANDLE)
