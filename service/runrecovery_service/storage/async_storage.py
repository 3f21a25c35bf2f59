"""Runs the synchronous use cases of this package for the event loop.

SQLite: a read of a row or two runs on the event loop itself (17 µs, less than a thread hand-off).
Longer reads run on reader threads. Writes run on one writer thread, many to a commit.

PostgreSQL: everything runs in a bounded pool with one connection per thread. The renewal of the
lease has a thread and a connection of its own.

No transaction stays open across an `await`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import structlog

from runrecovery_service.domain.errors import NotNow, RunRecoveryError
from runrecovery_service.metric_counters import Meters
from runrecovery_service.storage.changes import (
    Changes,
    SharedPoll,
    decisions_stamp,
    event_counts,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.group_commit import GroupCommitWriter
from runrecovery_service.storage.loop_answers import LoopAnswer, LoopAnswers
from runrecovery_service.storage.postgresql import PostgreSQL, cut
from runrecovery_service.storage.reports import close_abandoned
from runrecovery_service.storage.reserved_connection import ReservedConnection
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.storage_threads import StorageThreads
from runrecovery_service.storage.store_timer import StoreTimer
from runrecovery_service.storage.use_case import UseCase, is_retried, run_use_case

if TYPE_CHECKING:
    from runrecovery_service.storage.peer_notices import PeerNotices

P = ParamSpec("P")
R = TypeVar("R")

READER_THREADS: Final = 2
POSTGRESQL_CONNECTIONS: Final = 8
STATEMENT_MOST_S: Final = 75.0
"""Time limit of a statement on a pooled PostgreSQL connection. The server's own limit is 60 s."""
CLOSE_S: Final = 5.0
"""How long a stop waits for running use cases. It then cuts their connections, and
waits for the same time again."""

log = structlog.get_logger()


class Storage:
    """Runs use cases for the event loop: reads, durable writes, and long exclusive work."""

    def __init__(
        self, db: Database, meters: Meters | None = None, threads: StorageThreads | None = None
    ) -> None:
        """Start the threads. Call `hear_peers` later, once the instance is known.

        Args:
            meters: count the times and errors of the store; None: nothing is counted.
            threads: makes the threads; None: threads of the system.
        """
        self._db = db
        self.threads = threads or StorageThreads()
        self._meters = meters
        self._inline = db.dialect.kind is DatabaseKind.SQLITE
        self._writer: GroupCommitWriter | None = None
        self._reserved: ReservedConnection | None = None
        self._replacement: ReservedConnection | None = None
        with ExitStack() as made:  # ends the other threads if the system refuses one
            self._pool = self.threads.pool(
                READER_THREADS if self._inline else POSTGRESQL_CONNECTIONS
            )
            made.callback(self._pool.shutdown)
            if self._inline:
                self._writer = self.threads.writer(
                    db, None if meters is None else meters.commit_writes
                )
                made.callback(self._writer.close)
            else:
                self._reserved = self.threads.reserved(db.direct or db)
                made.callback(self._reserved.close)
                self._reserved.open()  # first, before other clients take the last connection
            self._trials = self.threads.reserved(db, "storage-trial")
            made.pop_all()
        self._under_way: dict[int, tuple[float, object]] = {}
        self.changes = Changes()
        self.notices: PeerNotices | None = None
        self._answers: LoopAnswers | None = None
        self._poll = SharedPoll()

    def hear_peers(self, instance: str) -> None:
        """Exchange hints with the other instances of a shared store, by `notices`."""
        if self.is_shared:
            # Imported here: SQLite has no peers.
            from runrecovery_service.storage.peer_notices import PeerNotices  # noqa: PLC0415

            self.notices = PeerNotices(self._db, self, instance)

    @property
    def is_shared(self) -> bool:
        """Whether other machines can use the store. If so, only leases separate their services."""
        return not self._inline

    async def read_row(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a read of a row or two."""
        if not self._inline:
            return await self.read(use, *args, **kwargs)
        if self._meters is None:
            return run_use_case(self._db, use, *args, **kwargs)
        with StoreTimer(self._meters, "read_row"):
            return run_use_case(self._db, use, *args, **kwargs)

    async def read(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a read of many rows."""
        with self._timed("read"):
            return await asyncio.wrap_future(
                self._submit(lambda db: _on_primary(db, lambda: use(db, *args, **kwargs)))
            )

    def _timed(self, operation: str) -> AbstractContextManager[object]:
        return nullcontext() if self._meters is None else StoreTimer(self._meters, operation)

    def _submit(self, use: Callable[[Database], R]) -> Future[R]:
        def noted(db: Database) -> R:
            if not self._inline:
                self._under_way[get_ident()] = (monotonic(), db.peewee.connection())
            return use(db)

        def read() -> R:
            try:
                return run_use_case(self._db, noted)
            finally:
                self._under_way.pop(get_ident(), None)

        return self._pool.submit(read)

    def _cut_hanging(self) -> None:
        """Cut the pool's connections whose statement exceeds `STATEMENT_MOST_S`.

        The server ends every statement earlier than that, so such a connection is dead.
        """
        peewee = self._db.peewee
        for begun, connection in list(self._under_way.values()):
            if isinstance(peewee, PostgreSQL):  # the limit is per statement, not per use case
                begun = max(begun, peewee.last_begun(connection))  # noqa: PLW2901
            if monotonic() - begun > STATEMENT_MOST_S:
                log.warning("storage.connection_cut", seconds=round(monotonic() - begun, 1))
                cut(connection)

    async def write(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one transaction, return once it is durable, and announce the runs that it changed.

        If the write fails although it may have been committed, it is announced as a change in
        doubt.
        """
        return await self.start_write(use, *args, **kwargs)

    def start_write(
        self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[R]:
        """Begin what `write` does, and return the future of its result.

        To cancel the future drops the write, if the write has not begun.
        """
        return self._start_write(self._announce, use, *args, **kwargs)

    async def write_own(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one transaction of the execution itself; return once it is durable.

        Only watchers are woken. The execution made the change itself, and checks or repeats a write
        that is in doubt.
        """
        return await self._start_write(self._announce_own, use, *args, **kwargs)

    def _start_write(
        self,
        announce: Callable[[LoopAnswer[R]], None],
        use: UseCase[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> asyncio.Future[R]:
        def noted(db: Database) -> tuple[R, frozenset[int]]:
            db.take_changed_runs()  # forget the runs of a use case that was rolled back
            return use(db, *args, **kwargs), db.take_changed_runs()

        if self._answers is None:
            self._answers = LoopAnswers(asyncio.get_running_loop())
        answer = LoopAnswer(self._answers, self._metered(announce))
        if self._writer is None:
            answer.follow(self._submit(noted))
        else:
            self._writer.put(noted, answer, in_transaction=is_retried(use))
        return answer.future

    def _metered(
        self, announce: Callable[[LoopAnswer[R]], None]
    ) -> Callable[[LoopAnswer[R]], None]:
        """Return `announce`, preceded by measurements of the write that begins now."""
        meters = self._meters
        if meters is None:
            return announce
        timer = StoreTimer(meters, "write")

        def measure(answer: LoopAnswer[R]) -> None:
            timer.stop(answer.error)
            if self._writer is None and answer.error is None:
                meters.commit_writes.observe(1)
            announce(answer)

        return measure

    def _announce(self, answer: LoopAnswer[Any]) -> None:
        if isinstance(answer.error, NotNow) or not isinstance(
            answer.error, RunRecoveryError | None
        ):
            self.changes.announce_doubt()
        self.changes.announce(answer.changed)

    def _announce_own(self, answer: LoopAnswer[Any]) -> None:
        if answer.error is not None and answer.future.cancelled():
            self.changes.announce_doubt()  # no caller is left to check or repeat the write
        self.changes.wake_watchers(answer.changed)

    async def poll_shared(self) -> None:
        """Look for changes by other instances in a shared store, and wake their watchers."""
        self._db.queue_counts.clear()
        if keys := self.changes.runs_watched:
            counts = await self.read(event_counts, keys)
            self.changes.wake_watchers(self._poll.changed(counts))
        if self.changes.decisions_watched:
            await self.read(close_abandoned)  # an abandoned report blocks the decision feed
            if self._poll.has_decided(await self.read(decisions_stamp)):
                self.changes.announce_decisions()

    async def renew(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the renewal of the lease. It never queues behind reads."""
        if self._reserved is None:
            return await self.write(use, *args, **kwargs)
        self._cut_hanging()
        reserved = self._replaced(self._reserved)
        try:
            with self._timed("renewal"):
                return await asyncio.wrap_future(
                    reserved.submit(lambda db: use(db, *args, **kwargs))
                )
        except asyncio.CancelledError:  # the caller's time limit: the network may drop packets
            if self._replacement is None:
                self._replacement = self.threads.reserved(self._db.direct or self._db)
                self._replacement.open()
            raise

    def _replaced(self, reserved: ReservedConnection) -> ReservedConnection:
        """Return a new connection for the renewals of the lease, once it is connected.

        Until then the old connection stays open: perhaps it is just slow, and after a close another
        client could take the last connection of the server.
        """
        replacement = self._replacement
        if replacement is None or (is_connected := replacement.is_connected) is None:
            return reserved
        self._replacement = None
        if not is_connected:
            replacement.close()
            return reserved
        reserved.abort()
        self._reserved = replacement
        return replacement

    async def run_trial(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a trial on a thread of its own, so that it does not queue behind callers."""
        try:
            return await asyncio.wrap_future(
                self._trials.submit(lambda db: use(db, *args, **kwargs))
            )
        except asyncio.CancelledError:
            self._trials.cut()
            raise

    async def run_exclusive(self, use: Callable[[Database], R]) -> R:
        """Run long work of many transactions on a thread and a connection of its own."""
        return await self.threads.run_alone(lambda: self._run_exclusive(use))

    def _run_exclusive(self, use: Callable[[Database], R]) -> R:
        try:
            self._db.decode_leniently()  # damaged text must not interrupt a recovery
            return run_use_case(self._db, use)
        finally:
            self._db.queue_counts.clear()  # a recovery queues runs without marking them
            self._db.close()

    def demand_in_place(self) -> None:
        """Raise StoreLost if a file of a SQLite store was removed or replaced."""
        self._db.demand_in_place()

    def abandon(self) -> None:
        """Make every use of a PostgreSQL database fail, present and later ones.

        Afterwards nothing can be written, and no caller waits for a silent network.
        """
        self._db.abandon()

    def close(self, within_s: float = CLOSE_S) -> None:
        """Finish the submitted use cases and close every connection but the main thread's.

        A use case that exceeds `within_s` seconds has its connection cut. A use case that still
        hangs is abandoned.
        """
        if self._writer is not None:
            self._writer.close(within_s)
        # The barrier makes every thread of the pool take exactly one of these tasks.
        barrier = threading.Barrier(self._pool._max_workers)  # noqa: SLF001 - no public count
        closing = [self._pool.submit(self._close_thread, barrier) for _ in range(barrier.parties)]
        own = (self._reserved, self._replacement, self._trials)
        closing += [connection.close() for connection in own if connection is not None]
        if wait(closing, within_s).not_done:
            self.abandon()
        hanging = wait(closing, within_s).not_done
        barrier.abort()
        self._pool.shutdown(wait=not hanging)
        self._db.close()

    def _close_thread(self, barrier: threading.Barrier) -> None:
        with suppress(threading.BrokenBarrierError):
            barrier.wait()
        self._db.close()


def _on_primary(db: Database, read: Callable[[], R]) -> R:
    """Run a read. Return its result only if the primary server has answered, not a standby."""
    try:
        result = read()
    except RunRecoveryError:  # perhaps from a standby, which lacks the row
        db.demand_primary()
        raise
    db.demand_primary()
    return result
