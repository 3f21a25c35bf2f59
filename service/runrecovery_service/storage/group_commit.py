"""Writes to SQLite on one thread. Many writes share one commit, and so one sync of the disk."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

import structlog

from runrecovery_service.domain.errors import RunRecoveryError
from runrecovery_service.metric_counters import Histogram
from runrecovery_service.required_threads import start_thread
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS
from runrecovery_service.storage.use_case import run_use_case

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)

WRITES_PER_COMMIT: Final = 64

log = structlog.get_logger()


class Answer(Protocol[R_contra]):
    """Takes the outcome of a write. `concurrent.futures.Future` is one."""

    def set_running_or_notify_cancel(self) -> bool:
        """Return whether the write is still wanted."""

    def done(self) -> bool:
        """Return whether there is an outcome."""

    def set_result(self, result: R_contra, /) -> None:
        """Take the result of the write."""

    def set_exception(self, error: BaseException, /) -> None:
        """Take the error of the write."""


class GroupCommitWriter:
    """The writer thread. Queued writes share a commit, each in its own savepoint.

    A write with a domain error is rolled back alone. If the shared transaction fails, each write is
    tried again in its own transaction, so that one bad write cannot make the others fail.
    """

    def __init__(self, db: Database, commit_writes: Histogram | None = None) -> None:
        """Start the thread.

        Args:
            commit_writes: counts the writes of each commit.
        """
        self._db = db
        self._commit_writes = commit_writes
        self._waiting: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = start_thread(self._work, "storage-writer")

    def put(
        self, use: Callable[[Database], R], answer: Answer[R], *, in_transaction: bool = False
    ) -> None:
        """Queue a write.

        Args:
            answer: gets the result of the write after its commit.
            in_transaction: the write runs in a transaction of its own (`use_case.retried`), so that
                it needs no second one around it.
        """
        self._waiting.put(_Write(use, answer, in_transaction=in_transaction))

    def close(self, within_s: float | None = None) -> None:
        """Finish the queued writes and end the thread.

        Args:
            within_s: the longest wait, in seconds, for a disk that may hang; None: no limit.
        """
        self._waiting.put(None)
        self._thread.join(within_s)

    def _work(self) -> None:
        is_open = True
        while is_open:
            batch, is_open = self._next_batch()
            try:
                self._commit(batch)
            except BaseException as error:  # noqa: BLE001 - the thread must survive every error
                for write in batch:
                    write.fail(error)
        self._db.close()

    def _next_batch(self) -> tuple[list[_Write], bool]:
        batch: list[_Write] = []
        write = self._waiting.get()
        while write is not None:
            if write.answer.set_running_or_notify_cancel():
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
                self._note_commit(len(batch))
                for write in batch:
                    write.resolve()
                return
        for write in batch:
            write.perform(self._db)
            self._note_commit(1)

    def _note_commit(self, writes: int) -> None:
        if self._commit_writes is not None:
            self._commit_writes.observe(writes)


class _MayHaveEnded(Exception):
    """A write failed in a way that may have ended the shared transaction."""


SHARED_COMMIT_ERRORS: Final[tuple[type[Exception], ...]] = (*DRIVER_ERRORS, _MayHaveEnded)


class _Write:
    """A queued write and its result."""

    def __init__(
        self, use: Callable[[Database], R], answer: Answer[R], *, in_transaction: bool
    ) -> None:
        self._use = use
        self._run: Callable[[Database], object] = use if in_transaction else self._in_transaction
        self.answer: Answer[Any] = answer
        self._result: object = None
        self._error: RunRecoveryError | None = None

    def attempt(self, db: Database) -> None:
        """Run the write inside a shared transaction. A domain error is a result, not a failure."""
        self._error = None
        try:
            self._result = self._run(db)
        except RunRecoveryError as error:
            self._error = error
        except Exception as error:
            raise _MayHaveEnded from error

    def resolve(self) -> None:
        """Pass the result to the caller, after the commit."""
        if self._error is not None:
            self.answer.set_exception(self._error)
        else:
            self.answer.set_result(self._result)

    def fail(self, error: BaseException) -> None:
        """Pass an unexpected error to the caller, unless it already has a result."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def perform(self, db: Database) -> None:
        """Run the write in its own transaction, and pass the result to the caller."""
        try:
            result = run_use_case(db, self._run)
        except BaseException as error:  # noqa: BLE001 - the caller gets every error
            self.answer.set_exception(error)
        else:
            self.answer.set_result(result)

    def _in_transaction(self, db: Database) -> object:
        with db.transaction():
            return self._use(db)
