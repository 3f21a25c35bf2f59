"""Counts the model calls of killed turns from their session files.

Reading a session file can hang, for example on a network file system. One time limit therefore
applies to all sessions of a recovery together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.session_check import StoredHandle
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.domain.turn import Asked
from runrecovery_service.domain.usage import StoredUsage, TurnUsage, at_end_of_turn
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.folders import NotKnown
from runrecovery_service.engines.sessions.stored_usage import FEWER_CALLS, UsageNotKnown
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.recovery.bulk_session_check import STOP_POLL_S, WorkspaceOf
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.found_ends import OpenTurn

log = structlog.get_logger()

OutputOf = Callable[[int, int], Path]
"""Returns the file with the output of a run's attempt. Arguments: the run's key, and the
attempt."""
COUNT_S: Final = 30.0
"""The time limit for counting in one recovery, in seconds. Turns that are not counted by then keep
the usage that they have reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KilledUsage:
    """Counts the model calls of the unfinished turns of one recovery.

    Attributes:
        output: returns the file with the printed output of an attempt.
        monotonic: the clock of the time limit.
    """

    catalog: Catalog
    workspace: WorkspaceOf
    output: OutputOf
    monotonic: Callable[[], float] = time.monotonic

    def count(
        self, turns: Iterable[OpenTurn], found: Mapping[int, FoundEnd], stop: StopSignal
    ) -> dict[int, TurnUsage]:
        """Return the usage of the turns by run key.

        Turns are left out if their session file adds nothing to the reported usage.

        Raises:
            RecoveryInterrupted: a stop was requested.
        """
        deadline = self.monotonic() + COUNT_S
        counted: dict[int, TurnUsage] = {}
        for turn in turns:
            end = found.get(turn.run_key)
            reported = turn.reported if end is None else end.used
            sessions = self._sessions(turn)
            is_last = end is not None and (end.is_last or not isinstance(end.end, Asked))
            if sessions is None or turn.session is None or (is_last and reported is not None):
                continue
            used = at_end_of_turn(
                reported,
                self._read(turn, sessions, turn.session.handle, deadline, stop),
                before=turn.session_usage,
                is_first=turn.session.turn == turn.turn,
            )
            if used is not None:
                counted[turn.run_key] = used
        return counted

    def _sessions(self, turn: OpenTurn) -> CliSessions | None:
        known = turn.engine in self.catalog.names
        sessions = self.catalog.get(turn.engine).sessions if known else None
        return None if sessions is None or sessions.ledger is None else sessions

    def _read(
        self,
        turn: OpenTurn,
        sessions: CliSessions,
        handle: str,
        deadline: float,
        stop: StopSignal,
    ) -> StoredUsage | None:
        workspace = self.workspace(turn.run_key, turn.attempt)
        stored = StoredHandle(handle=handle, workspace=workspace)
        try:
            output = self.output(turn.run_key, turn.attempt)
            reading = daemon_threads.start(lambda: sessions.read_usage(stored, output))
            self._wait(reading, deadline, stop)
            found = reading.result()
            if not found.lacks_calls(turn.session_usage):
                return found
            reason = FEWER_CALLS
        except RecoveryInterrupted:
            raise
        except UsageNotKnown as error:
            reason = str(error)
        except NotKnown:
            reason = "not_known"
        except Exception as error:  # noqa: BLE001 - no agent's file may prevent a start
            reason = type(error).__name__
        log.warning("recovery.session_usage_not_read", run_id=turn.run_id, reason=reason)
        return None

    def _wait(self, reading: Future[StoredUsage], deadline: float, stop: StopSignal) -> None:
        """Wait until the session is read.

        Raises:
            RecoveryInterrupted: a stop was requested.
            TimeoutError: the time limit of the recovery has passed.
        """
        while not wait([reading], STOP_POLL_S).done:
            if stop.is_set():
                raise RecoveryInterrupted
            if self.monotonic() >= deadline:
                raise TimeoutError


def with_counted(
    found: Mapping[int, FoundEnd], counted: Mapping[int, TurnUsage]
) -> dict[int, FoundEnd]:
    """Return the found ends, each with its counted usage if there is one."""
    return {key: replace(end, used=counted.get(key, end.used)) for key, end in found.items()}
