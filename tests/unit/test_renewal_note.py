"""The note of the latest renewal: a planned stop replaces the renewal in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runrecovery_service.ownership import Ownership
from runrecovery_service.renewal_note import NOTE_FILE, RenewalNote
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.instances import Owner, Renewal

OWNER = Owner("a", 7, "t")
START = Renewal(instance="a", epoch=7, started_us=1000)


async def test_a_service_that_has_resigned_has_noted_its_stop(tmp_path: Path) -> None:
    """Otherwise the next start could not notice that a failover has lost the stop."""

    async def write(*_: object) -> int:
        return 4000

    unused: Any = None
    storage: Any = SimpleNamespace(write=write)
    lease: Any = SimpleNamespace(note=RenewalNote(tmp_path, START))
    ownership = Ownership(
        lease=lease,
        trials=unused,
        storage=storage,
        owner=OWNER,
        locks=unused,
        stop=StopSignal(),
    )

    await ownership.resign()

    assert json.loads((tmp_path / NOTE_FILE).read_text("utf-8")) == {
        "instance": "a",
        "epoch": 7,
        "started_us": 1000,
        "lease_until_us": 0,
        "stopped_us": 4000,
    }
