"""A thread pool that continues with fewer threads when the system refuses new ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from runrecovery_service.domain.start_errors import ThreadsRefused


class SteadyThreadPool(ThreadPoolExecutor):
    """A pool that has at least one thread from the beginning.

    When the system refuses a new thread for a task, an existing thread runs the task. The base
    class would raise RuntimeError, although the task stays in the queue and runs later.
    """

    def __init__(self, max_workers: int, thread_name_prefix: str = "") -> None:
        """Start the first thread.

        Raises:
            ThreadsRefused: the system refuses the thread.
        """
        super().__init__(max_workers, thread_name_prefix)
        self._tasks_without_thread = 0
        try:
            self.submit(int).result()
        except RuntimeError as error:
            raise ThreadsRefused(str(error)) from error

    def _adjust_thread_count(self) -> None:
        # `submit` calls this after it has queued the task. The base class counts idle threads: plus
        # one when a task ends; minus one, or a new thread, when a task is submitted. A task for
        # which no thread could be started did not lower the count, so its end makes the count one
        # too high.
        while self._tasks_without_thread and self._idle_semaphore.acquire(timeout=0):
            self._tasks_without_thread -= 1
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise
            self._tasks_without_thread += 1
