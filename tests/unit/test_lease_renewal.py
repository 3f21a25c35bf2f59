"""When the lease is renewed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from runrecovery_service.ownership import LeaseRenewal
from runrecovery_service.stop_signal import StopSignal


@pytest.mark.parametrize("is_shared", [True, False], ids=["PostgreSQL", "SQLite"])
async def test_the_lease_is_renewed_and_trees_live_on_five_times_in_its_time(
    *, is_shared: bool
) -> None:
    unused: Any = None
    storage: Any = SimpleNamespace(is_shared=is_shared)
    renewal = LeaseRenewal(
        lease_ttl_s=15.0,
        storage=storage,
        owner=unused,
        turns=unused,
        health=unused,
        stop=StopSignal(),
    )

    pauses = {task.name: task.interval_s for task in renewal.tasks()}

    assert pauses == ({"lease-renewal": 3.0} | ({} if is_shared else {"tree-deadline": 3.0}))
