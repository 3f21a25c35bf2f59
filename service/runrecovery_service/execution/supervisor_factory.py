"""Creates the supervisor of each turn that the dispatcher takes from the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.session_checks import SessionChecker
from runrecovery_service.clock import Clock
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.execution.launcher import Launch, Launcher
from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.execution.turn_log import TurnLog
from runrecovery_service.execution.turn_permissions import TurnPermissions
from runrecovery_service.execution.turn_records import TurnRecords
from runrecovery_service.execution.turn_sessions import TurnSessions
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metric_counters import Meters
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.turns import Turn

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.execution.turn_spans import TurnSpans
    from runrecovery_service.spans import Tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecordsFactory:
    """Creates the records of each turn, with its log and its spans.

    Attributes:
        meters: the counters to update.
        tracer: starts the spans of turns; None: traces are off.
    """

    storage: Storage
    owner: Owner
    clock: Clock
    meters: Meters
    tracer: Tracer | None = None

    def records_of(self, turn: Turn) -> TurnRecords:
        """Return the records of a turn that was just taken from the queue, and begin its spans."""
        return TurnRecords(
            storage=self.storage,
            owner=self.owner,
            clock=self.clock,
            turn=turn,
            log=TurnLog(turn.run, self._begin_spans(turn), self.meters),
        )

    def _begin_spans(self, turn: Turn) -> TurnSpans | None:
        if self.tracer is None:
            return None
        from runrecovery_service.execution.turn_spans import begin_spans  # noqa: PLC0415 - see above

        return begin_spans(turn, self.tracer)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorFactory:
    """Creates the supervisor of each turn.

    Attributes:
        exit_grace_s: the key `exit_grace_s` of `config/settings.py`.
    """

    records: TurnRecordsFactory
    catalog: Catalog
    launcher: Launcher
    output: OutputFiles
    sessions: SessionChecker
    exit_grace_s: float

    def supervise(self, turn: Turn) -> TurnSupervisor:
        """Return a supervisor for a turn that was taken from the queue, and start nothing.

        The supervisor keeps the present engines, even if a later reload changes them.
        """
        catalog = self.catalog.snapshot()
        records = self.records.records_of(turn)
        launch = Launch(launcher=self.launcher, records=records)
        return TurnSupervisor(
            records=records,
            launch=launch,
            catalog=catalog,
            sessions=TurnSessions(
                records=records, launch=launch, catalog=catalog, checker=self.sessions
            ),
            permissions=TurnPermissions(records=records, workspaces=self.launcher.workspaces),
            output=self.output,
            threads=self.launcher.threads,
            exit_grace_s=self.exit_grace_s,
        )
