"""Handles signals that come before the service has installed its own handlers.

The module also records whether the process had a terminal, because after SIGHUP the terminal can be
gone.

Without these handlers Python would print a traceback (SIGINT), or the system would kill the process
(other signals), although nothing is wrong. Import this module first: it imports almost nothing.
"""

from __future__ import annotations

import errno
import os
import signal
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
HARMLESS_SIGNALS: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that do not stop the service; SIGHUP reloads. Without a handler they kill the process."""
INTERRUPTED: Final = 130

NO_TERMINAL: Final = frozenset({errno.ENXIO, errno.EIO, errno.ENOENT})
"""Errors of opening /dev/tty that show that there is no terminal. Other errors do not show it."""

_held: list[int] = []
_terminal: list[bool] = []


def exit_at_once(*, serves: bool) -> None:
    """From now on, exit without a traceback at Ctrl-C: there is nothing to release yet.

    Args:
        serves: whether the process is a service. A service also exits at SIGTERM, with code 0, and
            keeps harmless signals for `take_held`.
    """

    def exit_now(_number: int, _frame: FrameType | None) -> None:
        os._exit(0 if serves else INTERRUPTED)

    _handle(signal.SIGINT, exit_now)
    if serves:
        had_terminal()
        _handle(signal.SIGTERM, exit_now)
        for number in HARMLESS_SIGNALS:
            _handle(number, _hold)


def restore_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, as Python does by default."""
    _handle(signal.SIGINT, signal.default_int_handler)


def hold() -> None:
    """From now on, keep signals until `take_held` returns them.

    This process has locks, and must release them in order before it exits. Only a second stop
    signal exits at once.
    """
    for number in (*STOP_SIGNALS, *HARMLESS_SIGNALS):
        _handle(number, _hold)


def take_held() -> list[int]:
    """Return the signals that were kept, in the order of their arrival, and forget them."""
    signals = _held.copy()
    _held.clear()
    return signals


def had_terminal() -> bool:
    """Return whether this process had a controlling terminal at the first call."""
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


def _hold(number: int, _frame: FrameType | None) -> None:
    if number in STOP_SIGNALS and any(before in STOP_SIGNALS for before in _held):
        os._exit(128 + number)
    _held.append(number)


def _handle(number: int, handler: signal._HANDLER) -> None:
    # Never SIG_IGN, which agents would inherit. A signal that nohup ignores stays ignored.
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)
