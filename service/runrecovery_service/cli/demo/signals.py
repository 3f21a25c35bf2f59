"""Signals that end a demo."""

from __future__ import annotations

import signal
import sys


def exit_on_termination() -> None:
    """Let SIGTERM and SIGHUP end this process as `sys.exit` does, so that a demo cleans up.

    A SIGHUP that is ignored already, as under nohup, stays ignored.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
