"""Ctrl-C while a command reads a stream or polls."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from runrecovery_service.cli import INTERRUPTED


@contextmanager
def exit_at_once() -> Iterator[None]:
    """Make Ctrl-C exit the process at once, inside the context. Only for commands that read.

    A KeyboardInterrupt raised in a callback of gRPC is lost, and the command would keep waiting for
    the next message.
    """

    def exit_now(_number: int, _frame: object) -> None:
        with suppress(Exception):  # the signal can have interrupted a write
            sys.stdout.flush()
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, exit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
