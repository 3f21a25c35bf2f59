"""The file in which a shim records the signals that it sends by itself."""

from __future__ import annotations

import json
from pathlib import Path

from runrecovery_service.process import signals
from runrecovery_service.process.markers import Identity
from runrecovery_service.process.safe_open import read_start


def killed_by_shim(journal: Path) -> frozenset[Identity]:
    """Return the processes that a shim killed by itself; none if there is no journal."""
    try:
        lines = read_start(journal).decode("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(identity for line in lines if (identity := _killed(line)) is not None)


def _killed(line: str) -> Identity | None:
    try:
        entry = json.loads(line)
        if (entry["signal"], entry["outcome"]) == ("SIGKILL", signals.SENT):
            return int(entry["pid"]), int(entry["start_ticks"])
    except (ValueError, KeyError, TypeError):  # cut off by a crash, or an error text of the shim
        pass
    return None
