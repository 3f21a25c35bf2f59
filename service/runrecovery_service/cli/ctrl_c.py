"""Ctrl-C while a stream is read."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from runrecovery_service.cli import INTERRUPTED


@contextmanager
def exit_at_once() -> Iterator[None]:
    """Let Ctrl-C end this process where it stands, which only reads.

    A KeyboardInterrupt that happens to be raised in a callback of gRPC is lost, and who waits for
    the next piece of a stream would go on waiting.
    """

    def leave(_number: int, _frame: object) -> None:
        with suppress(Exception):  # it may have come in the middle of a write
            sys.stdout.flush()
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
