"""The threads of a simulated service: their work runs on the loop, after a latency.

Only the recovery has a real thread, because it needs a database connection of its own. It runs
while the loop waits, so that one of the two runs at a time, and gives way after each commit.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from runrecovery_service.metric_counters import Histogram
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.group_commit import (
    WRITES_PER_COMMIT,
    Answer,
    GroupCommitWriter,
    _Write,
)
from runrecovery_service.storage.reserved_connection import ReservedConnection
from runrecovery_service.storage.storage_threads import StorageThreads
from simulation.world import World

R = TypeVar("R")


class LoopPool(SteadyThreadPool):
    """A pool without threads."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._max_workers = 1

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Run the call after a latency; at once if the caller blocks until it is done."""
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                self._world.demand_alive()
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - the future raises it
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._world.loop.is_blocked:
            run()
        else:
            self._world.loop.call_later(self._world.latency_s(), run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - its signature
        """Do nothing: there is no thread."""


class LoopWriter(GroupCommitWriter):
    """The writer. Writes that come within one latency share a commit."""

    def __init__(self, db: Database, commit_writes: Histogram | None, world: World) -> None:
        self._db, self._commit_writes, self._world = db, commit_writes, world
        self._queued: list[_Write] = []
        self._is_due = False

    def put(
        self, use: Callable[[Database], R], answer: Answer[R], *, in_transaction: bool = False
    ) -> None:
        """Queue a write."""
        self._queued.append(_Write(use, answer, in_transaction=in_transaction))
        if self._world.loop.is_blocked:
            self._flush()
        elif not self._is_due:
            self._is_due = True
            self._world.loop.call_later(self._world.latency_s(), self._flush)

    def close(self, within_s: float | None = None) -> None:
        """Finish the queued writes."""
        self._flush()

    def _flush(self) -> None:
        self._is_due = False
        queued, self._queued = self._queued, []
        batch = [one for one in queued if one.answer.set_running_or_notify_cancel()]
        while batch:
            part, batch = batch[:WRITES_PER_COMMIT], batch[WRITES_PER_COMMIT:]
            try:
                self._world.demand_alive()
                self._commit(part)
            except BaseException as error:  # noqa: BLE001 - as in the base class
                for write in part:
                    write.fail(error)


class Recoverer:
    """A thread that runs only while the loop waits for it."""

    def __init__(self, world: World, work: Callable[[], object]) -> None:
        self._world, self._work = world, work
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._result: object = None
        self.is_done = False
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # as in `daemon_threads.start`
        self.thread = threading.Thread(target=self._run, name="simulated", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            self._world.demand_alive()
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - the future raises it
            self._error = error
        self.is_done = True
        self._has_stopped.release()

    def advance(self) -> None:
        """Let the thread run until it gives way or ends. Called on the loop."""
        if self.is_done:
            return
        self._may_run.release()
        self._has_stopped.acquire()
        if not self.is_done:
            self._world.loop.call_later(self._world.latency_s(), self.advance)
            return
        self.thread.join()
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._result)

    def give_way(self) -> None:
        """Let the loop run. Called in the thread.

        Raises:
            Cut: the service has crashed meanwhile.
        """
        self._has_stopped.release()
        self._may_run.acquire()
        self._world.demand_alive()


class LoopThreads(StorageThreads):
    """Makes the threads of a simulated storage."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.recoverers: list[Recoverer] = []

    def pool(self, workers: int) -> SteadyThreadPool:
        """See `StorageThreads`."""
        return LoopPool(self._world)

    def writer(self, db: Database, commit_writes: Histogram | None) -> GroupCommitWriter:
        """See `StorageThreads`."""
        return LoopWriter(db, commit_writes, self._world)

    def reserved(self, db: Database, name: str = "") -> ReservedConnection:
        """See `StorageThreads`."""
        return ReservedConnection(db, LoopPool(self._world))

    def start(self, work: Callable[[], R]) -> Future[R]:
        """See `StorageThreads`."""
        return LoopPool(self._world).submit(work)

    async def run_alone(self, work: Callable[[], R]) -> R:
        """See `StorageThreads`."""
        recoverer = Recoverer(self._world, work)
        self.recoverers.append(recoverer)
        self._world.loop.call_soon(recoverer.advance)
        result: R = await asyncio.wrap_future(recoverer.future)
        return result

    def after_commit(self) -> None:
        """Let others run after a commit of the thread that has one of its own."""
        for recoverer in self.recoverers:
            if recoverer.thread is threading.current_thread():
                recoverer.give_way()

    def end(self) -> None:
        """End every thread, after a crash."""
        for recoverer in self.recoverers:
            recoverer.advance()
