"""The pauses before an interrupted turn is resumed."""

from __future__ import annotations

from typing import Final

FIRST_DELAY_S: Final = 10.0
"""The pause before the second resume. Each later pause is twice as long as the one before."""
LONGEST_DELAY_S: Final = 300.0


def resume_delay_s(resumes: int) -> float:
    """Return how long to wait before a turn that was resumed `resumes` times is resumed again.

    The first resume does not wait, because most restarts are planned. Later ones wait, because a
    turn that is interrupted again and again is possibly the cause of the restarts.
    """
    if resumes <= 0:
        return 0.0
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(resumes - 1, 10))
