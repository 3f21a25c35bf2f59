"""What a restart at this moment would decide. Reads only; sessions are checked as it would.

Rows are read in one snapshot, and sessions are looked at when that is closed: a transaction does
not wait for files, which may lie on storage that does not answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runrecovery_service.domain.plan import (
    Decision,
    PlannedDecision,
    RecoveryPlan,
    Situation,
    preview_decision,
    sum_decisions,
)
from runrecovery_service.domain.recovery_matrix import Fact
from runrecovery_service.domain.run import Page
from runrecovery_service.domain.session_check import SessionCheck, SessionFinding
from runrecovery_service.recovery.sessions import (
    CHECK_S,
    SESSIONS_PER_CHECK,
    Asker,
    Silent,
    Workspace,
)
from runrecovery_service.storage import converge, processes
from runrecovery_service.storage.converge import Foreseen, Reach, StoredSession
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner

_Session = tuple[StoredSession, Situation]
"""A session that is to be looked at, and what a restart would see of its run by the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """What all runs are counted by: what a restart would see of them by the record, those of them
    whose session is to be looked at, and the launches that it would end."""

    situations: Sequence[tuple[Situation, int]]
    sessions: Mapping[str, Sequence[_Session]] = field(repr=False)
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the store said at one moment: of a page of runs, and of all of them for the first."""

    page: Sequence[Foreseen] = field(repr=False)
    after: tuple[int, ...] | None
    totals: _Totals | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Foresees the next restart of one instance, with the checks that this one has."""

    owner: Owner
    session_checks: Mapping[str, SessionCheck]
    workspace: Workspace
    check_s: float = CHECK_S
    _silent: Silent = field(default_factory=dict)

    @property
    def _reach(self) -> Reach:
        return Reach(owner=self.owner, before=self.owner.epoch + 1)

    def read(self, db: Database, *, after: tuple[int, ...] | None, limit: int) -> Rows:
        """Read a page of runs, in the order in which a restart would decide on them; with the
        first one also what all of them are counted by, of one state of the store."""
        with db.snapshot():
            runs = converge.foreseen_page(
                db, self._reach, after=after[0] if after else 0, limit=limit + 1
            )
            return Rows(
                page=runs[:limit],
                after=(runs[limit - 1].run_key,) if len(runs) > limit else None,
                totals=None if after else self._read_totals(db),
            )

    def _read_totals(self, db: Database) -> _Totals:
        return _Totals(
            situations=converge.situations(db, self._reach),
            sessions={engine: self._sessions(db, engine) for engine in self.session_checks},
            launches=len(processes.unclosed(db, self.owner, before=self._reach.before)),
        )

    def _sessions(self, db: Database, engine: str) -> list[_Session]:
        """Read the sessions of an engine. There may be very many: what they share is kept once."""
        sessions: list[_Session] = []
        known: dict[Situation, Situation] = {}
        after = 0
        while runs := converge.foreseen_of_engine(
            db, self._reach, engine, after=after, limit=SESSIONS_PER_CHECK
        ):
            sessions += (
                (run.session, known.setdefault(run.situation, run.situation))
                for run in runs
                if run.session is not None
            )
            after = runs[-1].run_key
        return sessions

    def decide(self, rows: Rows) -> tuple[Page[PlannedDecision], RecoveryPlan | None]:
        """Look at the sessions, and return the page of decisions, and of the first one all in
        numbers. Blocking, and it needs no store."""
        found, plan = self._looked_at(rows.page), None
        if rows.totals is not None:
            plan = self._counted(rows.totals, found)
        decisions = tuple(
            PlannedDecision(
                run_id=run.run_id,
                engine=run.engine,
                status=run.situation.status,
                decision=preview_decision(_with(run.situation, found.get(run.run_key))),
            )
            for run in rows.page
        )
        return Page(rows=decisions, after=rows.after), plan

    def _looked_at(self, page: Sequence[Foreseen]) -> dict[int, SessionFinding]:
        """Return what the checks say of these runs' sessions, by run key."""
        asker, found = self._asker(), dict[int, SessionFinding]()
        for engine in self.session_checks:
            stored = [run.session for run in page if run.engine == engine and run.session]
            keys = [session.run_key for session in stored]
            found |= zip(keys, asker.ask(engine, stored), strict=True)
        return found

    def _counted(self, totals: _Totals, found: Mapping[int, SessionFinding]) -> RecoveryPlan:
        """Count all runs by what the record says of them; those whose session is not any more what
        it says are then moved, one by one."""
        counts: Counter[Decision] = Counter()
        for situation, count in totals.situations:
            counts[preview_decision(situation)] += count
        asker = self._asker()
        for engine, sessions in totals.sessions.items():
            for (_, situation), finding in _answered(asker, engine, sessions, found):
                now = _with(situation, finding)
                if now != situation:
                    counts[preview_decision(situation)] -= 1
                    counts[preview_decision(now)] += 1
        return sum_decisions(counts.items(), launches=totals.launches)

    def _asker(self) -> Asker:
        """Return what asks the checks; none of those that are still at an earlier question."""
        for engine, asked in list(self._silent.items()):
            if asked.done():
                self._silent.pop(engine, None)
        return Asker(
            checks=self.session_checks,
            workspace=self.workspace,
            check_s=self.check_s,
            silent=self._silent,
        )


def _answered(
    asker: Asker, engine: str, sessions: Sequence[_Session], known: Mapping[int, SessionFinding]
) -> Iterator[tuple[_Session, SessionFinding]]:
    """Yield each session with what the check says of it; those that are known are not asked of."""
    for at in range(0, len(sessions), SESSIONS_PER_CHECK):
        some = sessions[at : at + SESSIONS_PER_CHECK]
        open_ones = [stored for stored, _ in some if stored.run_key not in known]
        answers = iter(asker.ask(engine, open_ones))
        for one in some:
            finding = known.get(one[0].run_key)
            yield one, next(answers) if finding is None else finding


def _with(situation: Situation, finding: SessionFinding | None) -> Situation:
    """Return what a restart would see of a run with a session of which its check says this; None:
    the run has none, or its engine no check."""
    if finding is None:
        return situation
    facts = situation.facts
    return replace(situation, facts=facts | Fact.HANDLE if finding.holds else facts & ~Fact.HANDLE)
