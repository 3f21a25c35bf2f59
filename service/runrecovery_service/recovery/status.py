"""The progress and the result of the recovery of this start."""

from __future__ import annotations

from concurrent.futures import Future

from runrecovery_service.domain.reconciliation import Containment, Reconciliation
from runrecovery_service.lazy_dataclass import dataclass


@dataclass(slots=True)
class RecoveryStatus:
    """The progress of one recovery, which the recovery writes and GetRecoveryStatus reads.

    Attributes:
        lost_commits: the note about commits that the database lost; None: no loss is known.
        probe: the containment probe, which runs in parallel with the start; None at a planned stop.
        report: the report of the recovery; None until it is committed.
        report_id: the reconciliation_id of the report; None until the store has the report.
    """

    probe: Future[Containment] | None = None
    report_id: str | None = None
    report: Reconciliation | None = None
    lost_commits: str | None = None

    @property
    def containment(self) -> Containment | None:
        """The result of the probe; None while the probe runs."""
        return self.probe.result() if self.probe is not None and self.probe.done() else None
