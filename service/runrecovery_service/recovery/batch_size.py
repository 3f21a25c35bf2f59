"""The size of the batches in which a recovery decides on runs."""

from __future__ import annotations

from typing import Final

SMALLEST_BATCH: Final = 500


def next_batch_rows(rows: int, elapsed_s: float, *, most: int, batch_s: float) -> int:
    """Return the size of the next batch: smaller after a slow batch, larger after a fast one."""
    if elapsed_s > batch_s:
        return max(min(SMALLEST_BATCH, most), rows // 2)
    if elapsed_s < batch_s / 4:
        return min(most, rows * 2)
    return rows
