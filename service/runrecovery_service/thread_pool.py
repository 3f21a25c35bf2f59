"""A thread pool that a lack of threads (pids.max, ulimit -u) slows down, and does not fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from runrecovery_service.domain.errors import ThreadsRefused


class SteadyThreadPool(ThreadPoolExecutor):
    """Has at least one thread from the beginning. What the system refuses a new thread for is run
    by one of those that there are; each later task asks for a new thread again.

    The base class raises RuntimeError then, although the task stays in its queue and is run later.
    """

    def __init__(self, max_workers: int, thread_name_prefix: str = "") -> None:
        """Start the first thread.

        Raises:
            ThreadsRefused: the system has none.
        """
        super().__init__(max_workers, thread_name_prefix)
        self._without_thread = 0
        try:
            self.submit(int).result()
        except RuntimeError as error:
            raise ThreadsRefused(str(error)) from error

    def _adjust_thread_count(self) -> None:
        # Called by `submit` once the task is in the queue. The base class counts idle threads: one
        # more for each task that ends, one less or a new thread for each that is submitted.
        while self._without_thread and self._idle_semaphore.acquire(timeout=0):
            self._without_thread -= 1
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise
            self._without_thread += 1
