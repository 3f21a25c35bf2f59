"""A thread pool that continues with fewer threads when the system refuses new ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from runrecovery_service.domain.start_errors import ThreadsRefused


class SteadyThreadPool(ThreadPoolExecutor):
    """A pool that has at least one thread from the beginning.

    When the system refuses a new thread for a task, an existing thread runs the task. The base
    class raises RuntimeError in that case, although the task stays in its queue and runs later.
    """

    def __init__(self, max_workers: int, thread_name_prefix: str = "") -> None:
        """Start the first thread.

        Raises:
            ThreadsRefused: the system refuses it.
        """
        super().__init__(max_workers, thread_name_prefix)
        self._tasks_without_thread = 0
        try:
            self.submit(int).result()
        except RuntimeError as error:
            raise ThreadsRefused(str(error)) from error

    def _adjust_thread_count(self) -> None:
        # `submit` calls this once the task is in the queue. The base class counts idle threads: one
        # more for each task that ends; one less, or a new thread, for each task that is submitted.
        # A task without a thread of its own leaves that count one too high when it ends.
        while self._tasks_without_thread and self._idle_semaphore.acquire(timeout=0):
            self._tasks_without_thread -= 1
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise
            self._tasks_without_thread += 1
