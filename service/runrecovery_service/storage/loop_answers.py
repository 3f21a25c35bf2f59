"""Passes the outcomes of writes from other threads to the event loop.

Each wake-up of the loop from another thread costs a system call. So outcomes that come together, as
those of one commit do, share a wake-up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class LoopAnswers:
    """Answers that have an outcome, and wait for the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._ready: deque[LoopAnswer[Any]] = deque()
        self._is_loop_woken = False

    def put(self, answer: LoopAnswer[Any]) -> None:
        """Let the loop end an answer. Callable from any thread."""
        self._ready.append(answer)
        if not self._is_loop_woken:
            self._wake_loop()

    def _wake_loop(self) -> None:
        self._is_loop_woken = True
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._end_all)

    def _end_all(self) -> None:
        self._is_loop_woken = False  # first: an answer that is put from now on wakes the loop
        try:
            while self._ready:
                self._ready.popleft().end()
        finally:
            if self._ready:  # the others get their outcome in spite of an unexpected error
                self._wake_loop()


class LoopAnswer(Generic[R]):
    """The answer to one write. A writer sets its outcome as that of a `concurrent.futures.Future`.

    Attributes:
        future: what the caller waits for. To cancel it drops the write, if the write has not begun.
        error: the error of the write; None if the write succeeded.
        changed: the keys of the runs that the write has changed.
    """

    def __init__(self, answers: LoopAnswers, on_end: Callable[[LoopAnswer[R]], object]) -> None:
        """Make an answer without an outcome.

        Args:
            on_end: called on the loop before `future` resolves, and even if `future` is cancelled.
        """
        self._answers = answers
        self._on_end = on_end
        self._is_done = False
        self._result: R | None = None
        self.future: asyncio.Future[R] = answers.loop.create_future()
        self.error: BaseException | None = None
        self.changed: frozenset[int] = frozenset()

    def set_running_or_notify_cancel(self) -> bool:
        """Return whether the caller still wants the write."""
        return not self.future.cancelled()

    def done(self) -> bool:
        """Return whether there is an outcome."""
        return self._is_done

    def set_result(self, outcome: tuple[R, frozenset[int]]) -> None:
        """Take the result of the write and the keys of the runs that it has changed."""
        self._result, self.changed = outcome
        self._finish()

    def set_exception(self, error: BaseException) -> None:
        """Take the error of the write."""
        self.error = error
        self._finish()

    def _finish(self) -> None:
        self._is_done = True
        self._answers.put(self)

    def follow(self, write: Future[tuple[R, frozenset[int]]]) -> None:
        """Take the outcome of a write of a thread pool, which is cancelled with `future`."""
        write.add_done_callback(self._take)
        self.future.add_done_callback(lambda future: future.cancelled() and write.cancel())

    def _take(self, write: Future[tuple[R, frozenset[int]]]) -> None:
        if write.cancelled():
            return
        error = write.exception()
        if error is None:
            self.set_result(write.result())
        else:
            self.set_exception(error)

    def end(self) -> None:
        """Resolve the future. Called on the loop."""
        self._on_end(self)
        if self.future.cancelled():
            return
        if self.error is None:
            self.future.set_result(self._result)  # type: ignore[arg-type] # set with the outcome
        else:
            self.future.set_exception(self.error)
