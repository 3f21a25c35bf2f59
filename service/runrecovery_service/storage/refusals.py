"""Converts a database's errors at a start into refusals with a reason and a remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runrecovery_service.domain.start_errors import DatabaseOutOfReach, DatabaseRefused
from runrecovery_service.storage.driver_errors import (
    DRIVER_ERRORS,
    UNREACHABLE,
    UNREACHABLE_REMEDY,
    driver_message,
    fault_of,
)


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Convert each database error inside the block into a refusal of the start.

    Args:
        name: the name of the database in the error.

    Raises:
        DatabaseRefused: the database cannot be used.
        DatabaseOutOfReach: the database does not answer in time. A later start may succeed.
    """
    try:
        yield
    except DRIVER_ERRORS as error:
        fault, message = fault_of(error), driver_message(error)
        if fault is None:
            raise DatabaseRefused(name, message) from error
        refused = DatabaseRefused if fault.lasts else DatabaseOutOfReach
        # PostgreSQL's own message names the cause: role, password, database, host or TLS.
        if fault is UNREACHABLE:
            reason = f"{message.removesuffix('.')}; {UNREACHABLE_REMEDY}"
        else:
            reason = fault.refusal(message)
        raise refused(name, reason) from error
    except OSError as error:
        raise DatabaseRefused(name, error.strerror or "cannot be opened") from error
