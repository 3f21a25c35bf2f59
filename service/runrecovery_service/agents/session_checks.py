"""Checks one session, or takes its fingerprint, within a time limit, while a caller waits."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import field, replace
from typing import Final

from runrecovery_service import daemon_threads
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.run import Run
from runrecovery_service.domain.session_check import (
    NOT_ANSWERED,
    SessionCheck,
    SessionFinding,
    SessionFingerprint,
    StoredHandle,
    apply_policy,
)
from runrecovery_service.domain.usage import StoredUsage
from runrecovery_service.engines.catalog import Catalog, Engine, check_sessions
from runrecovery_service.engines.sessions.files import CliSessions, SessionObservation
from runrecovery_service.engines.sessions.repair import Repair
from runrecovery_service.lazy_dataclass import dataclass

SESSION_TIMEOUT_S: Final = 10.0
"""How long to wait for an answer of the file system that has a session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionChecker:
    """Checks, fingerprints, repairs and counts the sessions of runs.

    Attributes:
        timeout_s: how long to wait for an answer of the file system that has a session.
    """

    workspaces: Workspaces
    timeout_s: float = SESSION_TIMEOUT_S
    _one_file: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def check(
        self,
        engine: Engine,
        run: Run,
        handle: str,
        fingerprint: SessionFingerprint | None,
        *,
        in_turn: bool = False,
    ) -> SessionFinding | None:
        """Return the engine's finding about a run's session, or None if the engine has no check.

        Args:
            fingerprint: the fingerprint of the session file when the run's question was recorded;
                None: not known.
            in_turn: whether the agent was killed during its turn, so that the end of the file can
                be incomplete.
        """
        stored = replace(self._stored(run, handle, fingerprint), in_turn=in_turn)
        return await check_session(engine, stored, timeout_s=self.timeout_s)

    async def fingerprint(self, run: Run, sessions: CliSessions, handle: str) -> SessionObservation:
        """Check a run's session; return the finding, and the fingerprint of its file now."""
        return await fingerprint_session(
            sessions, self._stored(run, handle), timeout_s=self.timeout_s
        )

    async def repair(self, run: Run, sessions: CliSessions, handle: str) -> list[Repair]:
        """Repair a run's session before a resume, and return the repair of each changed file.

        Raises:
            NotRepairable, OSError, NotKnown: a file could not be repaired. TimeoutError, which is
                an OSError, means that the file system did not answer in time.
        """
        stored, given_up = self._stored(run, handle), threading.Event()
        async with self._one_file:  # each call has a whole file in memory
            try:
                return await daemon_threads.run_within(
                    self.timeout_s, lambda: sessions.repair(stored, given_up)
                )
            finally:
                given_up.set()

    async def read_usage(self, run: Run, sessions: CliSessions, handle: str) -> StoredUsage:
        """Return the usage of the model calls that a run's session has stored.

        Raises:
            UsageNotKnown, OSError, NotKnown: the usage cannot be read. TimeoutError, which is an
                OSError, means that the file system did not answer in time.
        """
        stored = self._stored(run, handle)
        output = self.workspaces.output(run.key, run.attempt)
        async with (
            asyncio.timeout(self.timeout_s),
            self._one_file,
        ):  # the end of the turn waits for this read
            return await daemon_threads.run(lambda: sessions.read_usage(stored, output))

    def _stored(
        self, run: Run, handle: str, fingerprint: SessionFingerprint | None = None
    ) -> StoredHandle:
        workspace = self.workspaces.workspace(run.key, run.attempt)
        return StoredHandle(handle=handle, workspace=workspace, fingerprint=fingerprint)


def session_checks(catalog: Catalog) -> dict[str, SessionCheck]:
    """Return the session check of each engine that has one, by the engine's name."""
    checks = {name: catalog.get(name).session_check for name in catalog.names}
    return {name: check for name, check in checks.items() if check is not None}


async def check_session(
    engine: Engine, stored: StoredHandle, *, timeout_s: float, seen_before: bool = True
) -> SessionFinding | None:
    """Return the engine's finding about a session, or None if the engine has no check.

    Args:
        seen_before: see `engines.catalog.check_sessions`.
    """

    def check() -> list[SessionFinding]:
        return list(check_sessions(engine, [stored], seen_before=seen_before))

    if engine.session_store is None:
        return None
    try:
        (finding,) = await daemon_threads.run_within(timeout_s, check)
    except TimeoutError:
        return apply_policy(NOT_ANSWERED, engine.unknown_session)
    return finding


async def fingerprint_session(
    sessions: CliSessions, stored: StoredHandle, *, timeout_s: float
) -> SessionObservation:
    """Check a session; return the finding, and the fingerprint of its file now."""
    try:
        return await daemon_threads.run_within(timeout_s, lambda: sessions.observe(stored))
    except TimeoutError:
        return SessionObservation(NOT_ANSWERED, None)
