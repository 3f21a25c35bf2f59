"""An event loop whose time is virtual: when nothing is ready, it jumps to the next timer.

Everything runs on one thread, so the same calls give the same order. Real pipes work: they are
polled without waiting.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack

Ts = TypeVarTuple("Ts")


class Stuck(Exception):
    """Nothing is ready and no timer is set, so that nothing can happen any more."""


class _Selector(selectors.PollSelector):
    """Polls descriptors without waiting. Instead of a wait, the time of the loop advances."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0) if self._descriptors else []
        if not ready and timeout is None:
            raise Stuck
        if not ready and timeout is not None:
            self.now_s += max(0.0, timeout)
        return ready

    @property
    def _descriptors(self) -> Mapping[Any, selectors.SelectorKey]:
        return self.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop of a simulation.

    Attributes:
        latency_s: returns how long the next blocking call takes.
        tasks: the tasks that have not ended, in the order of their creation. `asyncio.all_tasks`
            has no order, and a history must always end them in the same one.
        is_blocked: whether a blocking call is running, which waits for all that it causes.
    """

    def __init__(self, latency_s: Callable[[], float]) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self.latency_s = latency_s
        self.blocking_calls: dict[asyncio.Future[Any], None] = {}
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.is_blocked = False
        self.set_task_factory(self._new_task)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._virtual.now_s

    def _new_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **named: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **named)
        self.tasks[task] = None
        task.add_done_callback(lambda done: self.tasks.pop(done, None))
        return task

    def stand_still(self, seconds: float) -> None:
        """Let time pass although nothing runs. Timers that expire meanwhile are late."""
        self._virtual.now_s += seconds

    def run_for(self, seconds: float) -> None:
        """Run until so much time has passed, or `stop` is called."""
        timer = self.call_later(seconds, self.stop)
        self.run_forever()
        timer.cancel()

    def run_once(self) -> None:
        """Run what is ready now."""
        self.call_soon(self.stop)
        self.run_forever()

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Schedule a callback. Only one thread of a simulation runs at a time."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], Any], *args: *Ts
    ) -> asyncio.Future[Any]:
        """Run the call on the loop after a latency, and return the future of its result."""
        future: asyncio.Future[Any] = self.create_future()
        self.blocking_calls[future] = None
        future.add_done_callback(lambda done: self.blocking_calls.pop(done, None))

        def run() -> None:
            if future.cancelled():  # a thread would run it nevertheless, or not, if it had to wait
                return
            was_blocked, self.is_blocked = self.is_blocked, True
            try:
                result = func(*args)
            except BaseException as error:  # noqa: BLE001 - the future raises it
                future.set_exception(error)
            else:
                future.set_result(result)
            finally:
                self.is_blocked = was_blocked

        self.call_later(self.latency_s(), run)
        return future

    def _make_self_pipe(self) -> None:
        """Make none: no other thread and no signal wakes this loop."""

    def _close_self_pipe(self) -> None:
        """See `_make_self_pipe`."""

    def _write_to_self(self) -> None:
        """See `_make_self_pipe`."""
