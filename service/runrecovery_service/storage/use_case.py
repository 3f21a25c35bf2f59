"""Shared by all use cases: retries, conversion of driver errors, paging.

A use case is a function whose first argument is the database. It is one transaction unless its
docstring says otherwise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import structlog

from runrecovery_service.domain.errors import StorageBusy, StorageUnavailable
from runrecovery_service.domain.run import Page
from runrecovery_service.storage import postgresql
from runrecovery_service.storage.database import Database, Row, Stale, is_undecodable
from runrecovery_service.storage.driver_errors import (
    DRIVER_ERRORS,
    driver_message,
    error_chain,
    to_domain_error,
)
from runrecovery_service.storage.sql_dialects import DatabaseKind

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
UseCase = Callable[Concatenate[Database, P], R]

TRIES: Final = 8
"""The most tries of a use case whose rows other writers keep changing (PostgreSQL only)."""
CONFLICT_TRIES: Final = 6
"""The most tries of a transaction that PostgreSQL keeps rolling back because of conflicts."""
CONFLICT_PAUSE_S: Final = 0.01
PAGE_CHARS: Final = 600_000
"""The most characters of text in one page. In the worst case, JSON lists of numbers, one character
takes 5.5 bytes on the wire. A page then stays below 4 MiB, the default limit of gRPC clients."""

log = structlog.get_logger()

_RETRIED: Final[set[object]] = set()


def retried(use: UseCase[P, R]) -> UseCase[P, R]:
    """Run a use case in one transaction, and repeat it if its rows have changed meanwhile.

    Raises:
        StorageBusy: the rows changed during each of the `TRIES` tries.
    """

    @wraps(use)
    def run(db: Database, /, *args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(TRIES):
            try:
                with db.transaction():
                    return use(db, *args, **kwargs)
            except Stale:
                continue
        raise StorageBusy

    _RETRIED.add(run)
    return run


def is_retried(use: Callable[..., object]) -> bool:
    """Return whether a use case runs in a transaction of its own, by `retried`."""
    return use in _RETRIED


def retry_conflicts(use: Callable[[], R]) -> R:
    """Run a whole transaction and return its result; repeat it after a conflict in PostgreSQL."""
    for tries_left in reversed(range(CONFLICT_TRIES)):
        try:
            return use()
        except DRIVER_ERRORS as error:
            if not tries_left or not any(map(postgresql.is_conflict, error_chain(error))):
                raise
        time.sleep(random.uniform(0, CONFLICT_PAUSE_S * 2 ** (CONFLICT_TRIES - tries_left)))  # noqa: S311 - no secret
    raise AssertionError


def run_use_case(db: Database, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a use case and return its result; repeat it after conflicts and undecodable text.

    Raises:
        StorageBusy, StorageFull, StorageUnavailable: the database itself has failed.
    """
    try:
        return retry_conflicts(lambda: _run_decodable(db, use, *args, **kwargs))
    except DRIVER_ERRORS as error:
        meaning = to_domain_error(error)
        if meaning is None:
            raise
        log.warning(
            "storage.failed",
            error=driver_message(error),
            meaning=type(meaning).__name__,
            cause=meaning.cause,
        )
        if (
            db.dialect.kind is DatabaseKind.POSTGRESQL
            and not db.peewee.in_transaction()
            and (
                isinstance(meaning, StorageUnavailable)
                or not postgresql.is_idle(db.peewee.connection())
            )
        ):
            db.close()  # the connection may be dead; the next use opens a new one
        raise meaning from error


def _run_decodable(db: Database, use: UseCase[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a use case; if the store has damaged text, repeat it with lenient decoding."""
    try:
        return use(db, *args, **kwargs)
    except DRIVER_ERRORS as error:
        if not is_undecodable(error):
            raise
    db.decode_leniently()
    return use(db, *args, **kwargs)


def page_of(
    rows: Iterable[Row],
    limit: int,
    *,
    decode: Callable[[Row], T],
    key: Callable[[Row], tuple[int, ...]],
    texts: Callable[[Row], Iterable[Any]] = lambda row: row,
) -> Page[T]:
    """Return a page of `limit` rows, or of fewer rows if their texts are long.

    Args:
        rows: the rows of the page, and at least one more if further rows exist.
        key: returns the position of a row, after which the next page begins.
        texts: returns the columns of a row that can have long texts.
    """
    page: list[Row] = []
    chars = 0
    for row in rows:
        chars += sum(len(value) for value in texts(row) if isinstance(value, str))
        if len(page) == limit or (page and chars > PAGE_CHARS):
            return Page(rows=tuple(map(decode, page)), after=key(page[-1]))
        page.append(row)
    return Page(rows=tuple(map(decode, page)), after=None)
