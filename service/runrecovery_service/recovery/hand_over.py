"""Hands runs over to peers at a planned stop, before and after its decisions. PostgreSQL only."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced, error_facts
from runrecovery_service.storage import instances, sharing
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """The hand-over of one stop.

    Attributes:
        shares_workspaces: peers can resume the sessions of this instance.
    """

    owner: Owner
    clock: Clock
    shares_workspaces: bool

    def run(self, db: Database) -> None:
        """Hand over the runs that peers can continue. After an error the rest keep their owner.

        Raises:
            Fenced: a newer epoch of this instance has started.
        """
        try:
            instances.announce_stop(db, self.owner)
            handed = sharing.hand_over(
                db,
                self.owner,
                shares_workspaces=self.shares_workspaces,
                now=self.clock.now(),
            )
        except Fenced:
            raise
        except Exception as error:  # noqa: BLE001 - an error must not prevent the decisions of the stop
            log.warning("handover.failed", **error_facts(error))
            return
        if handed:
            log.info("handover.done", runs=sum(handed.values()), peers=dict(handed))
