"""Exit codes of the `runrecovery` command."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import TypeVar

ValueT = TypeVar("ValueT")


class ExitCode(IntEnum):
    """One code per kind of outcome. 130 means Ctrl-C, as usual."""

    OK = 0
    """Success; for `health`: SERVING."""

    FAILED = 1
    """Any other failure.

    For `runs create --wait`: the run FAILED or was CANCELED. For `runs watch`: the run did not end
    as SUCCEEDED. For `check`: problems were found. For `demo`: a claim did not hold.
    """

    USAGE = 2
    """The command line, the configuration or the request is invalid."""

    HELD = 3
    """Another service uses the data directory, the database or the instance name."""

    STORAGE = 4
    """This version cannot use the data directory or the database, or a limit on files or threads is
    too low."""

    LISTEN = 5
    """The listen address cannot be bound."""

    UNAVAILABLE = 6
    """The service (for `serve`: its database) does not answer in time. A retry can succeed."""

    NOT_FOUND = 7
    """The run, report or name does not exist."""

    REFUSED = 8
    """The state of the run or file does not allow the command."""

    RECOVERY = 9
    """Recovery failed as often as the configuration allows; the service never served."""

    CONTAINMENT = 11
    """`containment = "strict"`, but the start could not prove that it finds hidden processes."""

    DENIED = 12
    """The service does not know the caller, or does not allow the caller to do this."""

    FENCED = 10
    """A newer start of this instance has taken over, or could do so because the lease ran out."""


def of_class(table: Mapping[type, ValueT], kind: type[Exception], *, otherwise: ValueT) -> ValueT:
    """Return the value of an error class; for a class that is not listed, its parent's value."""
    return next((table[each] for each in kind.__mro__ if each in table), otherwise)
