"""Sending a signal. The service and the shim send every signal through `send`.

The shim imports this module too, so it imports only light modules of the standard library.
"""

from __future__ import annotations

# Only type checkers need these names: importing `typing` would double the shim's memory.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
else:
    import _signal as signal  # without the enums of `signal`, which take half a Python start

NAMES: dict[int, str] = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGCONT: "SIGCONT",
    signal.SIGSTOP: "SIGSTOP",
    signal.SIGKILL: "SIGKILL",
}
"""Every signal that is sent."""
SENT = "sent"
GONE = "gone"
"""The process had ended before the signal was sent."""
UNPROVED = "unproved"
"""The process carried no marker any more, so no signal was sent."""
BARRED = "barred"
"""The kernel does not let this user signal the process."""


def send(
    pid: int,
    pidfd: int,
    number: int,
    *,
    prove: Callable[[], str | None],
    audit: Callable[[int, str, str | None, str], object],
) -> str:
    """Send one signal to one process if the process belongs to a launch now; audit the signal.

    Args:
        pid: for the audit only. The signal is sent through `pidfd`.
        pidfd: opened before this call. So `prove` reads about the process that gets the signal.
            If that process has ended and another one has its pid, no process gets the signal.
        number: the signal, one of NAMES.
        prove: returns the name of the marker that /proc shows now, or None if there is none.
        audit: called with pid, name of the signal, name of the marker and outcome, whatever the
            outcome is.

    Returns:
        SENT, GONE, UNPROVED or BARRED.
    """
    proof = prove()
    outcome = UNPROVED if proof is None else _send(pidfd, number)
    audit(pid, NAMES[number], proof, outcome)
    return outcome


def _send(pidfd: int, number: int) -> str:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return GONE
    except PermissionError:
        return BARRED
    return SENT
