"""Exchanges changes of runs with the other instances on one PostgreSQL database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from runrecovery_service.domain.errors import Exhausted, NotNow
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage

if TYPE_CHECKING:  # not imported with SQLite
    from runrecovery_service.storage.peer_notices import PeerNotices

SHARED_POLL_S: Final = 1.0
"""Seconds between two polls for changes of other instances."""
NOTICE_PAUSE_S: Final = 0.05
"""Pause between two messages with hints. Hints that arise meanwhile are sent together."""
LISTEN_AGAIN_S: Final = 5.0
"""Pause before a lost connection for hints is replaced. Meanwhile polls find all changes."""


def shared_poll(storage: Storage, stop: StopSignal) -> PeriodicTask:
    """Return the loop that polls a shared store for changes by other instances."""
    return PeriodicTask(
        name="shared-poll",
        step=storage.poll_shared,
        interval_s=SHARED_POLL_S,
        failure_event="storage.changes_not_seen",
        stop_signal=stop,
        retried=(NotNow, Exhausted),
    )


def notice_loops(notices: PeerNotices, stop: StopSignal) -> list[PeriodicTask]:
    """Return the loops that send hints to other instances, and receive hints from them."""
    return [
        PeriodicTask(
            name="peer-notices",
            step=notices.send,
            interval_s=NOTICE_PAUSE_S,
            failure_event="storage.notices_not_sent",
            stop_signal=stop,
            retried=(NotNow, Exhausted),
        ),
        PeriodicTask(
            name="peer-listener",
            step=notices.listen,
            interval_s=LISTEN_AGAIN_S,
            failure_event="storage.notices_not_heard",
            stop_signal=stop,
            first_wait_s=0.0,
            retried=(NotNow, Exhausted),
        ),
    ]
