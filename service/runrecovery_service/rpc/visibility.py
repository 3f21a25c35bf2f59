"""Limits the present call to the runs that its caller may see.

For a run of another engine the call gets the same answer as for a run that does not exist. The
engine of a run never changes, so one read before the call's own read or write is enough.
"""

from __future__ import annotations

from runrecovery_service.rpc.callers import CALLER
from runrecovery_service.storage import runs
from runrecovery_service.storage.async_storage import Storage


def visible_engines() -> frozenset[str] | None:
    """Return the engines whose runs the caller may see; None: all."""
    return CALLER.get().engines


async def demand_visible(storage: Storage, run_id: str) -> None:
    """Raise RunNotFound for a run that is hidden from the caller. Reads nothing if none is."""
    caller = CALLER.get()
    if caller.engines is not None:
        found = await storage.read_row(runs.get, run_id)
        caller.demand_visible(run_id, found.engine)
