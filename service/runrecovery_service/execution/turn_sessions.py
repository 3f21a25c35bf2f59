"""The agent's session in one turn: checks before a resume, and the fingerprint at a question."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from runrecovery_service.agents.session_checks import SessionChecker
from runrecovery_service.domain.session_check import (
    REASON_TEXTS,
    SessionFinding,
    SessionFingerprint,
    SessionReason,
)
from runrecovery_service.domain.turn import Asked, TurnEnd
from runrecovery_service.domain.usage import TurnUsage, at_end_of_turn
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.dialect import Resumed
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.folders import NotKnown
from runrecovery_service.engines.sessions.repair import NotRepairable
from runrecovery_service.engines.sessions.stored_usage import FEWER_CALLS, UsageNotKnown
from runrecovery_service.execution.launcher import Launch
from runrecovery_service.execution.turn_records import TurnRecords
from runrecovery_service.lazy_dataclass import dataclass

NOT_ENDED: Final = "not_ended"
HOME_CHECK_S: Final = 1.0
"""Pause between two checks for the missing home directory of an agent CLI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSessions:
    """Checks the session of one turn's run, and takes its fingerprint."""

    records: TurnRecords
    launch: Launch
    catalog: Catalog
    checker: SessionChecker

    @property
    def workspace(self) -> Path:
        """The workspace of the run's attempt."""
        run = self.records.turn.run
        return self.checker.workspaces.workspace(run.key, run.attempt)

    async def session_problem(self, engine: Engine, resumed: Resumed | None) -> str | None:
        """Return why the session cannot be resumed, or None if it can or if this is not known.

        Agent CLIs do not check their sessions. They resume even an incomplete one.
        """
        if resumed is None or engine.sessions is None:
            return None
        fingerprint = await self.records.read_fingerprint()
        finding = await self._check(engine, resumed.session.handle, fingerprint)
        if finding is None or finding.reason is None:
            return None
        if finding.reason is SessionReason.NOT_ANSWERED:
            self._warn_not_seen(finding.reason.value)
        if finding.holds:
            return None
        return f"The session cannot be resumed: {REASON_TEXTS[finding.reason]}."

    async def repair(self, engine: Engine, resumed: Resumed | None) -> None:
        """Repair the session that is about to be resumed.

        If the repair fails, the CLI gets the session without a repair. Some versions of the CLI can
        resume it.
        """
        if resumed is None or engine.sessions is None:
            return
        log = self.records.log
        try:
            repairs = await self.checker.repair(
                self.records.turn.run, engine.sessions, resumed.session.handle
            )
        except (OSError, NotRepairable, NotKnown) as error:
            reason = str(error) if isinstance(error, NotRepairable) else type(error).__name__
            log.warning("execution.session_not_repaired", reason=reason)
        else:
            for each in repairs:
                log.info("execution.session_repaired", lines=each.lines, after_bytes=each.after)

    async def _check(
        self, engine: Engine, handle: str, fingerprint: SessionFingerprint | None
    ) -> SessionFinding | None:
        """Wait until the CLI's home directory exists, and return the finding about the session.

        Without this wait, the CLI would be launched and create an empty home without sessions.
        """
        turn = self.records.turn
        is_reported = False
        while True:
            finding = await self.checker.check(
                engine, turn.run, handle, fingerprint, in_turn=turn.interruption is not None
            )
            is_away = (
                finding is not None and finding.reason is SessionReason.HOME_AWAY and finding.holds
            )
            if not is_away:
                return finding
            if not is_reported:
                self._warn_not_seen(SessionReason.HOME_AWAY.value)
            is_reported = True
            await self.launch.demand_wanted()
            await asyncio.sleep(HOME_CHECK_S)

    async def fingerprint(self, end: TurnEnd, *, gone: bool) -> SessionFingerprint | None:
        """Return the fingerprint of the session file, by which a restart checks the file.

        Return None if a process can still write to the file, or if the file was not found.

        Args:
            gone: whether all processes of the turn have ended.
        """
        sessions = self._cli_sessions()
        if sessions is None or not isinstance(end, Asked):
            return None
        if not gone:
            self._warn_not_seen(NOT_ENDED)
            return None
        run = await self.records.read_run()
        if run.session is None:
            return None
        seen = await self.checker.fingerprint(run, sessions, run.session.handle)
        if seen.fingerprint is None:
            self._warn_not_seen((seen.finding.reason or SessionReason.NOT_ANSWERED).value)
        return seen.fingerprint

    async def usage(self, used: TurnUsage | None, *, gone: bool, is_last: bool) -> TurnUsage | None:
        """Return the usage of the turn.

        If the agent reported no total, count the model calls in its session.

        Args:
            used: the usage that the agent has reported; None: it has reported none.
            gone: whether all processes of the turn have ended.
            is_last: whether the turn ends the run, so that no later turn needs the session's usage.
        """
        sessions = self._cli_sessions()
        if sessions is None or sessions.ledger is None:
            return used
        if is_last and used is not None and not used.is_of_calls:
            return used
        run = await self.records.read_run()
        if run.session is None:
            return used
        turn, stored, reason = self.records.turn, None, "" if gone else NOT_ENDED
        if gone:
            try:
                stored = await self.checker.read_usage(run, sessions, run.session.handle)
            except (OSError, UsageNotKnown, NotKnown) as error:
                reason = str(error) if isinstance(error, UsageNotKnown) else type(error).__name__
        if stored is not None and stored.lacks_calls(turn.session_usage):
            reason = FEWER_CALLS
        if reason:
            self.records.log.warning("execution.session_usage_not_read", reason=reason)
        is_first = run.session.turn == turn.run.turn
        return at_end_of_turn(used, stored, before=turn.session_usage, is_first=is_first)

    def _cli_sessions(self) -> CliSessions | None:
        name = self.records.turn.run.engine
        return self.catalog.get(name).sessions if name in self.catalog.names else None

    def _warn_not_seen(self, reason: str) -> None:
        self.records.log.warning("execution.session_not_seen", reason=reason)
