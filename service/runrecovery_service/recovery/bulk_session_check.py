"""Checks in bulk which sessions of agents can still be resumed.

A check reads files, and a file system does not always answer. Each bulk therefore has a time limit.
Sessions without a result at the limit get the finding `not_answered`, and the engine's check is not
called again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import field
from pathlib import Path
from typing import Final

from runrecovery_service import daemon_threads
from runrecovery_service.domain.session_check import SessionCheck, SessionFinding, StoredHandle
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import session_checks
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.recovery_scope import RecoveryScope
from runrecovery_service.storage.session_checks import StoredSession

SESSIONS_PER_CHECK: Final = 5000
CHECK_S: Final = 30.0
"""The time limit of one bulk, in seconds."""
STOP_POLL_S: Final = 0.1
"""How often a running check looks for a requested stop, in seconds."""

WorkspaceOf = Callable[[int, int], Path]
"""Returns the workspace of a run's attempt. Arguments: the run's key, and the attempt."""


@dataclass(slots=True, kw_only=True, eq=False)
class BulkSessionCheck:
    """Calls the session checks of all engines for one recovery, or for one plan.

    A recovery or a plan works with its own copy, which `replace_checks` does not change.

    Attributes:
        checks: the session check of each engine that has one.
        stop: interrupts a bulk; by default nothing interrupts it.
        check_s: the time limit of one bulk.
        monotonic: the clock of the time limit.
        hanging: the check of each engine whose check did not answer in time. It is not called
            again.
    """

    checks: Mapping[str, SessionCheck]
    workspace: WorkspaceOf
    stop: StopSignal = field(default_factory=StopSignal)
    check_s: float = CHECK_S
    monotonic: Callable[[], float] = time.monotonic
    hanging: dict[str, Future[None]] = field(default_factory=dict)

    def replace_checks(self, checks: Mapping[str, SessionCheck]) -> None:
        """Use the checks of reloaded engines from now on."""
        self.checks, self.hanging = checks, {}

    def check_all(self, engine: str, stored: Sequence[StoredSession]) -> list[SessionFinding]:
        """Return one finding for each session.

        Sessions without a result in time get the finding `not_answered`, and so do all later
        sessions of the engine.

        Raises:
            RecoveryInterrupted: a stop was requested.
        """
        check = self.checks[engine]
        is_called = stored and engine not in self.hanging
        findings = self._findings_in_time(engine, check, stored) if is_called else []
        return findings + [check.not_answered] * (len(stored) - len(findings))

    def _findings_in_time(
        self, engine: str, check: SessionCheck, stored: Sequence[StoredSession]
    ) -> list[SessionFinding]:
        """Return the findings that arrive within the time limit. The list may end early."""
        handles = [self._handle(session) for session in stored]
        findings: list[SessionFinding] = []

        def look() -> None:
            for finding in check.run(handles):
                findings.append(finding)  # noqa: PERF402 - the waiting thread must see each at once

        deadline = self.monotonic() + self.check_s
        running = daemon_threads.start(look)
        while not wait([running], STOP_POLL_S).done:
            if self.stop.is_set():
                raise RecoveryInterrupted
            if self.monotonic() >= deadline:
                self.hanging[engine] = running
                return findings.copy()  # a copy: the check may still append to the list
        running.result()
        return findings

    def _handle(self, session: StoredSession) -> StoredHandle:
        return StoredHandle(
            handle=session.handle,
            workspace=self.workspace(session.run_key, session.attempt),
            fingerprint=session.fingerprint,
            in_turn=session.in_turn,
        )


def changed_findings(
    db: Database, scope: RecoveryScope, bulk: BulkSessionCheck
) -> Iterator[dict[int, SessionFinding]]:
    """Check the sessions of all runs that a restart decides on.

    Yields:
        For each bulk: by run key, the findings that differ from the recorded ones.
    """
    for engine in bulk.checks:
        after = 0
        while stored := session_checks.sessions_to_check(
            db, scope, engine=engine, after=after, limit=SESSIONS_PER_CHECK
        ):
            findings = bulk.check_all(engine, stored)
            yield {
                session.run_key: finding
                for session, finding in zip(stored, findings, strict=True)
                if finding != session.finding
            }
            after = stored[-1].run_key
