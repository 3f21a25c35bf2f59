"""Signals that come before the service has its own handlers for them.

Python would end the process with a traceback (SIGINT), or the system would end it (the others),
although nothing is wrong. Import this module first: it imports next to nothing.
"""

from __future__ import annotations

import errno
import os
import signal
from types import FrameType
from typing import Final

STOPS: Final = (signal.SIGTERM, signal.SIGINT)
HARMLESS: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""They would end a process that does not ask for them, and are sent to services as a matter of
course: to reload, to open the log anew."""
INTERRUPTED: Final = 130

NO_TERMINAL: Final = frozenset({errno.ENXIO, errno.EIO, errno.ENOENT})
"""What opening /dev/tty fails with then. A lack of descriptors, for one, says nothing of it."""

_kept: list[int] = []
_terminal: list[bool] = []


def leave(*, serves: bool) -> None:
    """Let Ctrl-C end a process that only imports and reads as yet. The service ends by SIGTERM as
    well, with 0 as at any stop, and keeps the harmless ones."""

    def exit_now(_number: int, _frame: FrameType | None) -> None:
        os._exit(0 if serves else INTERRUPTED)

    _handle(signal.SIGINT, exit_now)
    if serves:
        had_terminal()
        _handle(signal.SIGTERM, exit_now)
        for number in HARMLESS:
            _handle(number, _keep)


def interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    _handle(signal.SIGINT, signal.default_int_handler)


def keep() -> None:
    """From now on keep what comes, for `kept`: something is held that must be released in order.
    A second signal to stop ends the process at once."""
    for number in (*STOPS, *HARMLESS):
        _handle(number, _keep)


def kept() -> list[int]:
    """Return what came until now, in order, and forget it."""
    came = _kept.copy()
    _kept.clear()
    return came


def had_terminal() -> bool:
    """Return whether this process had a controlling terminal when this was first asked."""
    if not _terminal:
        _terminal.append(has_terminal())
    return _terminal[0]


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal now."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in NO_TERMINAL
    return True


def _keep(number: int, _frame: FrameType | None) -> None:
    if number in STOPS and any(before in STOPS for before in _kept):
        os._exit(128 + number)
    _kept.append(number)


def _handle(number: int, handler: signal._HANDLER) -> None:
    # Not SIG_IGN, which agents would inherit; and what is ignored already (nohup) stays so.
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)
