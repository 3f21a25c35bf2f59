"""Sending a signal: the only function that does, for the service and for the shim alike.

The shim runs this too: the standard library only, and of that only what is light.
"""

from __future__ import annotations

import signal

# Names are imported at run time by nobody but type checkers: `typing` would double the shim.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SENT = "sent"
GONE = "gone"
"""It ended before the signal came."""
UNPROVED = "unproved"
"""What had been seen could not be read again: nothing was sent."""
BARRED = "barred"
"""The kernel does not let this user signal it."""


def send(
    pid: int,
    pidfd: int,
    number: int,
    *,
    prove: Callable[[], str | None],
    audit: Callable[[int, str, str | None, str], object],
) -> str:
    """Send one signal to one process, if it is proved, now, to be ours; say so in the audit.

    Args:
        pid: only to be told of; the signal goes through `pidfd`.
        pidfd: opened before this call: what `prove` then reads of `pid` is true of the process
            that the signal reaches, or the process is gone and nobody gets it.
        number: the signal.
        prove: reads the evidence from /proc and names it; None when there is none.
        audit: gets pid, the signal's name, the evidence and the outcome, whatever that is.

    Returns:
        SENT, GONE, UNPROVED or BARRED.
    """
    evidence = prove()
    outcome = UNPROVED if evidence is None else _send(pidfd, number)
    audit(pid, signal.Signals(number).name, evidence, outcome)
    return outcome


def _send(pidfd: int, number: int) -> str:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return GONE
    except PermissionError:
        return BARRED
    return SENT
