"""Measures the duration of requests to the store, and counts failures of the store."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import Final

from runrecovery_service.domain.errors import StorageBusy, StorageFull, StorageUnavailable
from runrecovery_service.metric_counters import Meters

OPERATIONS: Final = ("read_row", "read", "write", "renewal")
STORE_ERRORS: Final = (StorageBusy, StorageFull, StorageUnavailable)


class StoreTimer:
    """Measures one request: a context manager around it, or `stop` at its end.

    Use it on the event loop only.

    Args:
        operation: one of `OPERATIONS`.
    """

    __slots__ = ("_begun", "_meters", "_operation")

    def __init__(self, meters: Meters, operation: str) -> None:
        self._meters = meters
        self._operation = operation
        self._begun = perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(error)

    def stop(self, error: BaseException | None) -> None:
        """Record the time since this object was made, and the error of the request, if any."""
        self._meters.storage_seconds.observe(perf_counter() - self._begun, self._operation)
        if isinstance(error, STORE_ERRORS):
            self._meters.storage_errors.add(self._operation, type(error).__name__)
