"""Fakes for a recovery: functions that end launches and remove trust entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.recovery.reconcile import RecordRemovals
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.launch_records import LaunchRecord

ClearTrust = Callable[[Database, RecordRemovals, Callable[[], bool]], TrustClearing]


def end_nothing(_: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
    """Find no launch."""
    return {}


def clear_nothing(*_: object) -> TrustClearing:
    """Find no trust entry."""
    return TrustClearing()


@dataclass(frozen=True, slots=True)
class FakeLaunchEnder:
    """Ends launches by a function."""

    end_launches: Callable[[Sequence[LaunchRecord]], Mapping[int, Ending]] = end_nothing

    def end(self, launches: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
        """See `EndsLaunches`."""
        return self.end_launches(launches)


@dataclass(frozen=True, slots=True)
class FakeTrustCleaner:
    """Clears trust entries by a function."""

    clear: ClearTrust = clear_nothing

    def remove_stale_on(
        self, db: Database, record: RecordRemovals, is_over: Callable[[], bool]
    ) -> TrustClearing:
        """See `TrustCleaner`."""
        return self.clear(db, record, is_over)
