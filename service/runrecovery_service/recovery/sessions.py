"""Which session handles can still be resumed by, asked of their engines' checks in bulk.

A check looks at files that may lie on storage that does not answer. Each bulk has its time; what is
not answered by then counts as not answered, and that engine is not asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runrecovery_service import daemon_threads
from runrecovery_service.domain.errors import RecoveryInterrupted
from runrecovery_service.domain.session_check import SessionCheck, SessionFinding, StoredHandle
from runrecovery_service.storage import converge
from runrecovery_service.storage.converge import Reach, StoredSession
from runrecovery_service.storage.database import Database

SESSIONS_PER_CHECK: Final = 5000
CHECK_S: Final = 30.0
"""How long a bulk may take."""
STOP_LOOK_S: Final = 0.1
"""How often it is looked for a stop meanwhile."""

Workspace = Callable[[int, int], Path]
"""Gives the workspace of a run's key and attempt."""
Silent = dict[str, "Future[None]"]
"""The engines whose checks did not answer in time, and what they are still at."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Asks the checks of one recovery, or of one plan.

    Attributes:
        stopping: True once the service is to stop.
        check_s: how long a bulk may take.
        silent: the engines that did not answer in time; they are not asked any more.
    """

    checks: Mapping[str, SessionCheck]
    workspace: Workspace
    stopping: Callable[[], bool] = _never
    check_s: float = CHECK_S
    now: Callable[[], float] = time.monotonic
    silent: Silent = field(default_factory=dict)

    def ask(self, engine: str, stored: Sequence[StoredSession]) -> list[SessionFinding]:
        """Return what the engine's check says of each.

        Raises:
            RecoveryInterrupted: the service is to stop.
        """
        check = self.checks[engine]
        wanted = stored and engine not in self.silent
        answers = self._answers(engine, check, stored) if wanted else []
        return answers + [check.not_answered] * (len(stored) - len(answers))

    def _answers(
        self, engine: str, check: SessionCheck, stored: Sequence[StoredSession]
    ) -> list[SessionFinding]:
        """Return the answers that come in time."""
        handles = [self._handle(one) for one in stored]
        answers: list[SessionFinding] = []

        def look() -> None:
            for finding in check.run(handles):
                answers.append(finding)  # noqa: PERF402 - whoever waits sees each at once

        until = self.now() + self.check_s
        asked = daemon_threads.start(look)
        while not wait([asked], STOP_LOOK_S).done:
            if self.stopping():
                raise RecoveryInterrupted
            if self.now() >= until:
                self.silent[engine] = asked
                return answers.copy()  # the check may go on
        asked.result()
        return answers

    def _handle(self, one: StoredSession) -> StoredHandle:
        return StoredHandle(
            handle=one.handle,
            workspace=self.workspace(one.run_key, one.attempt),
            fingerprint=one.mark,
        )


def changed_findings(
    db: Database, reach: Reach, asker: Asker
) -> Iterator[dict[int, SessionFinding]]:
    """Check the handles of every run that a restart decides on, and yield, in portions and by run
    key, each finding that is not the one on record."""
    for engine in asker.checks:
        after = 0
        while stored := converge.sessions_to_check(
            db, reach, engine=engine, after=after, limit=SESSIONS_PER_CHECK
        ):
            found = asker.ask(engine, stored)
            yield {
                one.run_key: new
                for one, new in zip(stored, found, strict=True)
                if new != one.finding
            }
            after = stored[-1].run_key
