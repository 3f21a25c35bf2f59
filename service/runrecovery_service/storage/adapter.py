"""The one adapter between the event loop and the synchronous functions of this room.

SQLite: a point read runs inline (17 µs, less than a thread hand-off), a longer read on a reader
thread, writes on one writer thread that puts waiting writes into one commit. PostgreSQL:
everything in a bounded pool, a connection per thread, but for the renewal of the lease, which has a
thread and a connection of its own. No transaction is held across an `await`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from threading import get_ident
from time import monotonic
from typing import Final, ParamSpec, TypeVar

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.domain.errors import (
    NotNow,
    RunRecoveryError,
    error_facts,
)
from runrecovery_service.storage.changes import (
    Changes,
    SharedPoll,
    decisions_stamp,
    event_counts,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS
from runrecovery_service.storage.postgresql import PostgreSQL, cut
from runrecovery_service.storage.recovery import close_abandoned
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.use_case import UseCase, run_use_case
from runrecovery_service.thread_pool import SteadyThreadPool
from runrecovery_service.threads import start_thread

P = ParamSpec("P")
R = TypeVar("R")

READER_THREADS: Final = 2
POSTGRESQL_CONNECTIONS: Final = 8
WRITES_PER_COMMIT: Final = 64
SHARED_LOOK_S: Final = 1.0
STATEMENT_MOST_S: Final = 75.0
"""How long a statement on a PostgreSQL connection of the pool may take; the server ends it after
60 s."""
CLOSE_S: Final = 5.0
"""How long what is under way may take at the end; then it is cut off, and has as long again."""

log = structlog.get_logger()


class Storage:
    """Runs use-case functions off, or quickly on, the event loop."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._inline = db.dialect.kind is DatabaseKind.SQLITE
        self._pool = SteadyThreadPool(
            READER_THREADS if self._inline else POSTGRESQL_CONNECTIONS,
            thread_name_prefix="storage",
        )
        self._writer = GroupCommitWriter(db) if self._inline else None
        self._reserved = None if self._inline else ReservedConnection(db)
        if self._reserved is not None:
            self._reserved.open()  # before others can have taken the last one
        self._replacement: ReservedConnection | None = None
        self._trials = ReservedConnection(db, "storage-trial")
        self._under_way: dict[int, tuple[float, object]] = {}
        self.changes = Changes()

    @property
    def is_shared(self) -> bool:
        """True when other machines may use the same store, so that only leases fence."""
        return not self._inline

    async def point(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a read of a row or two."""
        if self._inline:
            return run_use_case(self._db, use, *args, **kwargs)
        return await self.read(use, *args, **kwargs)

    async def read(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a read of many rows."""
        return await asyncio.wrap_future(self._submit(lambda db: use(db, *args, **kwargs)))

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
        """Cut off the connections of the pool from which no answer came for too long. The server
        ends a statement before; so it is the network that lost the answer."""
        peewee = self._db.peewee
        for begun, connection in list(self._under_way.values()):
            if isinstance(peewee, PostgreSQL):  # each statement of a use has its own time
                begun = max(begun, peewee.last_begun(connection))  # noqa: PLW2901
            if monotonic() - begun > STATEMENT_MOST_S:
                log.warning("storage.connection_cut", seconds=round(monotonic() - begun, 1))
                cut(connection)

    async def write(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one transaction, return once it is durable, and announce the runs that it changed.

        A failure that does not exclude a commit is announced as a change in doubt.
        """
        try:
            return await self._write(self.changes.announce, use, *args, **kwargs)
        except Exception as error:
            if isinstance(error, NotNow) or not isinstance(error, RunRecoveryError):
                self.changes.announce_doubt()
            raise

    async def write_own(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one transaction of the execution itself; return once it is durable.

        Only watchers are woken: the subscriber is the one who writes, and it repeats or checks
        what is in doubt.
        """
        return await self._write(self.changes.wake_watchers, use, *args, **kwargs)

    async def _write(
        self,
        announce: Callable[[frozenset[int]], None],
        use: UseCase[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        def noted(db: Database) -> tuple[R, frozenset[int]]:
            db.take_changed_runs()  # left over from a use that was rolled back
            return use(db, *args, **kwargs), db.take_changed_runs()

        writing = (self._submit if self._writer is None else self._writer.submit)(noted)
        try:
            result, touched = await asyncio.wrap_future(writing)
        except asyncio.CancelledError:  # it may be committed even so
            self._announce_once_done(writing, announce)
            raise
        announce(touched)
        return result

    def _announce_once_done(
        self,
        writing: Future[tuple[R, frozenset[int]]],
        announce: Callable[[frozenset[int]], None],
    ) -> None:
        loop = asyncio.get_running_loop()

        def announce_outcome(done: Future[tuple[R, frozenset[int]]]) -> None:
            if done.exception() is None:
                announce(done.result()[1])
            else:
                self.changes.announce_doubt()

        def on_done(done: Future[tuple[R, frozenset[int]]]) -> None:
            if not done.cancelled():
                with suppress(RuntimeError):  # the loop is closed: no subscriber is left
                    loop.call_soon_threadsafe(announce_outcome, done)

        writing.add_done_callback(on_done)

    async def follow_shared(self) -> None:
        """For ever: see what others have written into a store that they share with us."""
        look = SharedPoll()
        while True:
            await asyncio.sleep(SHARED_LOOK_S)
            try:
                if keys := self.changes.runs_watched:
                    self.changes.wake_watchers(look.changed(await self.read(event_counts, keys)))
                if self.changes.decisions_watched:
                    await self.read(close_abandoned)  # they would bar what comes after them
                    if look.has_decided(await self.read(decisions_stamp)):
                        self.changes.announce_decisions()
            except Exception as error:  # noqa: BLE001 - whatever it was, the next look comes
                log.warning("storage.changes_not_seen", **error_facts(error))

    async def renewal(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the small write that keeps this instance the owner; it never queues behind reads."""
        if self._reserved is None:
            return await self.write(use, *args, **kwargs)
        self._cut_hanging()
        reserved = self._replaced(self._reserved)
        try:
            return await asyncio.wrap_future(reserved.submit(lambda db: use(db, *args, **kwargs)))
        except asyncio.CancelledError:  # it takes too long: the network may be silent
            if self._replacement is None:
                self._replacement = ReservedConnection(self._db)
                self._replacement.open()
            raise

    def _replaced(self, reserved: ReservedConnection) -> ReservedConnection:
        """Return the replacement of the lease's connection once it stands. Until then the old one
        is kept: it may only be slow, and another client may take its place at the server."""
        replacement = self._replacement
        if replacement is None or (stands := replacement.stands) is None:
            return reserved
        self._replacement = None
        if not stands:
            replacement.close()
            return reserved
        reserved.give_up()
        self._reserved = replacement
        return replacement

    async def attempt(self, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a trial: on a thread of its own, where it does not queue behind callers."""
        try:
            return await asyncio.wrap_future(
                self._trials.submit(lambda db: use(db, *args, **kwargs))
            )
        except asyncio.CancelledError:
            self._trials.cut()
            raise

    async def alone(self, use: Callable[[Database], R]) -> R:
        """Run a long use, of many transactions, on a thread and a connection of its own."""
        return await daemon_threads.run(lambda: self._alone(use))

    def _alone(self, use: Callable[[Database], R]) -> R:
        try:
            self._db.decode_leniently()  # a recovery that has begun is not begun again
            return run_use_case(self._db, use)
        finally:
            self._db.close()

    def demand_in_place(self) -> None:
        """Raise StoreLost if a file of a SQLite store was removed or replaced."""
        self._db.demand_in_place()

    def abandon(self) -> None:
        """Let every use of a PostgreSQL database fail, now and later: nothing may be written any
        more, and nobody is to wait for an answer that a silent network does not bring."""
        self._db.abandon()

    def close(self, within_s: float = CLOSE_S) -> None:
        """Finish what was submitted and close every connection, but that of the main thread. What
        takes too long is cut off, and if it hangs even so, left to itself."""
        if self._writer is not None:
            self._writer.close(within_s)
        # So that every thread of the pool takes exactly one of these.
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


class ReservedConnection:
    """A thread with a connection that is kept, so that others cannot take the last one."""

    def __init__(self, db: Database, name: str = "storage-lease") -> None:
        self._db = db
        self._thread = SteadyThreadPool(1, thread_name_prefix=name)
        self._connection: object = None
        self._opening: Future[None] | None = None

    def open(self) -> None:
        """Begin to connect."""
        self._opening = self.submit(_connect)

    @property
    def stands(self) -> bool | None:
        """Whether `open` has connected; None: not yet known."""
        if self._opening is None or not self._opening.done():
            return None
        return self._opening.exception() is None

    def submit(self, use: Callable[[Database], R]) -> Future[R]:
        """Run a use on it."""

        def kept(db: Database) -> R:
            self._connection = db.peewee.connection()
            return use(db)

        return self._thread.submit(lambda: run_use_case(self._db, kept))

    def give_up(self) -> None:
        """Cut the use off that is under way, and end."""
        self.close()
        self.cut()

    def cut(self) -> None:
        """Have the use that is under way fail."""
        cut(self._connection)

    def close(self) -> Future[None]:
        """End after what was submitted."""
        closing = self._thread.submit(self._db.close)
        self._thread.shutdown(wait=False)
        return closing


def _connect(db: Database) -> None:
    """Use a connection, which opens it."""


class GroupCommitWriter:
    """One thread that writes. Waiting writes share a commit, each in a savepoint of its own.

    A write that fails is rolled back alone. If the shared transaction itself fails, every write
    of it is tried again by itself, so that one cannot take the others down.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = start_thread(self._work, "storage-writer")

    def submit(self, use: Callable[[Database], R]) -> Future[R]:
        """Queue a write; the future resolves after its commit."""
        future: Future[R] = Future()
        self._waiting.put(_Write(use, future))
        return future

    def close(self, within_s: float | None = None) -> None:
        """Finish what waits and end the thread, which a disk that hangs may keep for longer."""
        self._waiting.put(None)
        self._thread.join(within_s)

    def _work(self) -> None:
        open_for_work = True
        while open_for_work:
            batch, open_for_work = self._next_batch()
            try:
                self._commit(batch)
            except BaseException as error:  # noqa: BLE001 - the edge of the thread: it must go on
                for write in batch:
                    write.fail(error)
        self._db.close()

    def _next_batch(self) -> tuple[list[_Write], bool]:
        batch: list[_Write] = []
        write = self._waiting.get()
        while write is not None:
            if write.future.set_running_or_notify_cancel():
                batch.append(write)
            if len(batch) >= WRITES_PER_COMMIT or self._waiting.empty():
                return batch, True
            write = self._waiting.get()
        return batch, False

    def _commit(self, batch: list[_Write]) -> None:
        if len(batch) > 1:
            try:
                with self._db.transaction():
                    for write in batch:
                        write.attempt(self._db)
            except SHARED_COMMIT_ERRORS:
                log.info("storage.shared_commit_failed", writes=len(batch))
            else:
                for write in batch:
                    write.resolve()
                return
        for write in batch:
            write.perform(self._db)


class _Undecided(Exception):
    """A write met something that may have ended the shared transaction."""


SHARED_COMMIT_ERRORS: Final[tuple[type[Exception], ...]] = (*DRIVER_ERRORS, _Undecided)


class _Write:
    """A write that waits, and what came of it."""

    def __init__(self, use: Callable[[Database], R], future: Future[R]) -> None:
        self.use: Callable[[Database], object] = use
        self.future: Future[object] = future  # type: ignore[assignment] # R is only between caller and future
        self._result: object = None
        self._error: RunRecoveryError | None = None

    def attempt(self, db: Database) -> None:
        """Try it inside a shared transaction; a refusal by the domain is a result."""
        self._error = None
        try:
            with db.transaction():
                self._result = self.use(db)
        except RunRecoveryError as error:
            self._error = error
        except Exception as error:
            raise _Undecided from error

    def resolve(self) -> None:
        """Tell the caller, after the commit."""
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._result)

    def fail(self, error: BaseException) -> None:
        """Tell the caller of something unforeseen, unless it has its answer."""
        if not self.future.done():
            self.future.set_exception(error)

    def perform(self, db: Database) -> None:
        """Do it in a transaction of its own and tell the caller."""
        try:
            result = run_use_case(db, self._alone)
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: the caller gets it
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def _alone(self, db: Database) -> object:
        with db.transaction():
            return self.use(db)
