"""Services that handle a failing database wrongly, which the campaign must detect."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal


@dataclass(frozen=True, slots=True)
class FaultMutant:
    """A change of the service, and the failures that reveal it.

    Attributes:
        kind: a key of `SQLITE_KINDS` or `POSTGRESQL_KINDS`.
        sites: a regular expression that finds the names of the sites.
    """

    apply: Callable[[], None]
    kind: str
    sites: str
    database: Literal["sqlite", "postgresql"] = "sqlite"


def _break(owner: Any, name: str, broken: Callable[..., Any]) -> None:
    """Replace an attribute, which must exist, by a broken one."""
    getattr(owner, name)
    setattr(owner, name, broken)


def skip_failed_records() -> None:
    """Log a record of a turn that could not be written, and go on without it."""
    from runrecovery_service.domain.errors import is_outage
    from runrecovery_service.execution import turn_records

    async def try_once(do: Callable[[], Any], turn_log: Any) -> Any:
        try:
            return await do()
        except Exception as error:
            if not is_outage(error):
                raise
            turn_log.warning("execution.write_skipped")

    _break(turn_records, "retry_until_done", try_once)


def acknowledge_failed_commits() -> None:
    """Roll a transaction back whose COMMIT failed, and report success."""
    import peewee as pw

    commit = pw.Database.commit

    def commit_or_forget(self: Any) -> None:
        try:
            commit(self)
        except pw.PeeweeException:
            if self.connection().in_transaction:
                self.rollback()

    _break(pw.Database, "commit", commit_or_forget)


def leave_transactions_open() -> None:
    """Leave a transaction open after an error of the database."""
    import peewee as pw

    rollback = pw._transaction.rollback

    def rollback_or_leave(self: Any, *given: Any) -> None:
        if not isinstance(sys.exc_info()[1], pw.PeeweeException):
            rollback(self, *given)

    _break(pw._transaction, "rollback", rollback_or_leave)


def forget_receipts() -> None:
    """Carry out a repeated request once more."""
    from runrecovery_service.storage import requests

    _break(requests, "find_effect", lambda *_: None)
    _break(requests, "record_effect", lambda *_, **__: None)


def skip_failed_decisions() -> None:
    """Skip the runs on which a recovery could not decide."""
    from runrecovery_service.storage import recovery_apply
    from runrecovery_service.storage.driver_errors import DRIVER_ERRORS

    apply_batch, tally = recovery_apply.apply_batch, recovery_apply.Tally

    def apply_or_skip(*given: Any, **named: Any) -> Any:
        try:
            return apply_batch(*given, **named)
        except DRIVER_ERRORS:
            return tally()

    _break(recovery_apply, "apply_batch", apply_or_skip)


def recover_once() -> None:
    """End the service after the first recovery that fails."""
    from runrecovery_service.recovery_runner import RecoveryRunner

    recover = RecoveryRunner.recover

    async def try_once(self: Any) -> Any:
        self.tries = 1
        return await recover(self)

    _break(RecoveryRunner, "recover", try_once)


def end_at_a_failed_renewal() -> None:
    """End the service when one renewal of its lease fails."""
    from runrecovery_service.domain.errors import Fenced, NotNow
    from runrecovery_service.storage.async_storage import Storage

    renew = Storage.renew

    async def renew_or_end(self: Any, *given: Any, **named: Any) -> Any:
        try:
            return await renew(self, *given, **named)
        except NotNow as error:
            raise Fenced("the lease") from error

    _break(Storage, "renew", renew_or_end)


def answer_internal() -> None:
    """Take a database that is busy for a defect of the service."""
    from runrecovery_service.domain.errors import StorageBusy
    from runrecovery_service.storage import use_case
    from runrecovery_service.storage.driver_errors import to_domain_error

    def unless_busy(error: Exception) -> Any:
        meaning = to_domain_error(error)
        return None if isinstance(meaning, StorageBusy) else meaning

    _break(use_case, "to_domain_error", unless_busy)


def keep_dead_connections() -> None:
    """Use a connection again that was lost."""
    from runrecovery_service.storage.database import Database

    _break(Database, "close", lambda _: None)


def forget_takes() -> None:
    """Keep a run that was taken by a commit whose answer was lost."""
    from runrecovery_service.execution.dispatcher import Dispatcher

    async def forget(self: Any) -> None:
        self._is_take_in_doubt = False

    _break(Dispatcher, "_give_back", forget)


MUTANTS: Final[Mapping[str, FaultMutant]] = {
    "skipped-records": FaultMutant(skip_failed_records, "busy", r"turn_ends\.record_end"),
    "acknowledged-failures": FaultMutant(acknowledge_failed_commits, "full", "^COMMIT"),
    "open-transactions": FaultMutant(leave_transactions_open, "full", "^COMMIT"),
    "skipped-decisions": FaultMutant(skip_failed_decisions, "damaged", "apply_batch"),
    "one-recovery": FaultMutant(recover_once, "busy", r"RecoveryRunner\.recover"),
    "fatal-renewal": FaultMutant(end_at_a_failed_renewal, "damaged", r"instances\.renew"),
    "internal": FaultMutant(answer_internal, "busy", "RunService|run_pages|decisions"),
    "no-receipts": FaultMutant(
        forget_receipts, "lost-afterwards", r"^COMMIT.*runs\.create", "postgresql"
    ),
    "dead-connections": FaultMutant(
        keep_dead_connections, "lost", r"instances\.renew", "postgresql"
    ),
    "forgotten-takes": FaultMutant(
        forget_takes, "lost-afterwards", "^COMMIT.*take_next", "postgresql"
    ),
}
