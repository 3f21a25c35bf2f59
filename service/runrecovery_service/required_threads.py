"""Threads without which the service cannot run: it ends if the system refuses one."""

from __future__ import annotations

import threading
from collections.abc import Callable

from runrecovery_service.domain.start_errors import ThreadsRefused


def start_thread(do: Callable[[], object], name: str) -> threading.Thread:
    """Run `do` in a daemon thread, and return the thread.

    Raises:
        ThreadsRefused: the system refuses a thread (pids.max, ulimit -u, memory).
    """
    thread = threading.Thread(target=do, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadsRefused(str(error)) from error
    return thread
