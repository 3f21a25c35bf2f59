"""What a restart at this moment would decide. Reads only; sessions are checked as it would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from runrecovery_service.domain.plan import (
    PlannedDecision,
    RecoveryPlan,
    Situation,
    Verdict,
    foresee,
    sum_up,
)
from runrecovery_service.domain.recovery_matrix import Fact
from runrecovery_service.domain.run import Page
from runrecovery_service.recovery.sessions import (
    INVALID,
    SessionCheck,
    Workspace,
    changed_verdicts,
)
from runrecovery_service.storage import converge, processes
from runrecovery_service.storage.converge import Foreseen, Reach
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Foresees the next restart of one instance, with the checks that this one has."""

    owner: Owner
    session_checks: Mapping[str, SessionCheck]
    workspace: Workspace

    @property
    def _reach(self) -> Reach:
        return Reach(owner=self.owner, before=self.owner.epoch + 1)

    def page(
        self, db: Database, *, after: tuple[int, ...] | None, limit: int
    ) -> Page[PlannedDecision]:
        """Return a page of decisions, in the order in which a restart would make them."""
        found = converge.foreseen_page(
            db, self._reach, after=after[0] if after else 0, limit=limit + 1
        )
        rows = tuple(
            PlannedDecision(
                run_id=run.run_id,
                engine=run.engine,
                status=run.situation.status,
                verdict=foresee(self._checked(run)),
            )
            for run in found[:limit]
        )
        return Page(rows=rows, after=(found[limit - 1].run_key,) if len(found) > limit else None)

    def first(self, db: Database, *, limit: int) -> tuple[Page[PlannedDecision], RecoveryPlan]:
        """Return the first page, and all of it in numbers, of one state of the store."""
        with db.snapshot():
            return self.page(db, after=None, limit=limit), self.totals(db)

    def totals(self, db: Database) -> RecoveryPlan:
        """Return all of it in numbers. Use it within one snapshot.

        Runs are counted by what a restart would see of them; those whose session is not any more
        what the store says of it are then moved, one by one.
        """
        counts: Counter[Verdict] = Counter()
        for situation, count in converge.situations(db, self._reach):
            counts[foresee(situation)] += count
        for verdicts in changed_verdicts(db, self._reach, self.session_checks, self.workspace):
            for run in converge.foreseen_of(db, self._reach, list(verdicts)):
                held = bool(run.handle) and verdicts[run.run_key] != INVALID
                counts[foresee(run.situation)] -= 1
                counts[foresee(_with_handle(run.situation, held=held))] += 1
        launches = processes.unclosed(db, self.owner, before=self._reach.before)
        return sum_up(counts.items(), launches=len(launches))

    def _checked(self, run: Foreseen) -> Situation:
        check = self.session_checks.get(run.engine)
        if check is None or not run.handle:
            return run.situation
        held = check(self.workspace(run.run_key, run.attempt), run.handle)
        return _with_handle(run.situation, held=held)


def _with_handle(seen: Situation, *, held: bool) -> Situation:
    facts = seen.facts | Fact.HANDLE if held else seen.facts & ~Fact.HANDLE
    return replace(seen, facts=facts)
