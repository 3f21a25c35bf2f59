"""Hands runs over to peers at a planned stop, before and after its decisions. PostgreSQL only.

`storage/hand_over.py` chooses the peer of each run.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import hand_over, instances, use_case
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """The hand-over of runs at one planned stop.

    Attributes:
        shares_workspaces: whether peers can resume the sessions of this instance.
    """

    owner: Owner
    clock: Clock
    shares_workspaces: bool

    def run(self, db: Database) -> None:
        """Hand over the runs that peers can continue.

        After an error, the remaining runs keep their owner, and none is lost: the stop decides on
        them. Afterwards peers can take the queued runs. The next start or a takeover finds the
        other runs.

        Raises:
            Fenced: a newer epoch of this instance has started.
        """
        try:
            # A separate use case, so that a conflict repeats only the hand-over, not the decisions.
            handed = use_case.run_use_case(db, self._hand_over)
        except Fenced:
            raise
        except Exception as error:  # no error may prevent the decisions of the stop
            log.error(  # noqa: TRY400 - an outage needs no traceback
                "handover.failed", **error_facts(error), exc_info=not is_outage(error)
            )
            return
        if handed:
            log.info("handover.done", runs=sum(handed.values()), peers=dict(handed))

    def _hand_over(self, db: Database) -> Mapping[str, int]:
        instances.announce_stop(db, self.owner)
        return hand_over.hand_over(
            db, self.owner, shares_workspaces=self.shares_workspaces, now=self.clock.now()
        )
