"""What the exit code of the `runrecovery` command says."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """One number for one kind of ending. 130 is Ctrl-C, as everywhere."""

    OK = 0
    """It was done; for `health`: SERVING."""

    FAILED = 1
    """Something else went wrong; for `runs create --wait`: the run FAILED or was CANCELED; for
    `runs watch`: it ended otherwise than SUCCEEDED; for `check` and `demo`: something did not
    hold."""

    USAGE = 2
    """The command line, the configuration or the request is wrong as it stands."""

    HELD = 3
    """Another service holds the data directory, the database or the instance name."""

    STORAGE = 4
    """The data directory or the database cannot be used by this version, or the process may open
    too few files; nothing was changed."""

    LISTEN = 5
    """The listen address cannot be bound."""

    UNAVAILABLE = 6
    """The service (for `serve`: its database) does not answer, not yet, or not in time; trying
    again may help."""

    NOT_FOUND = 7
    """What was named does not exist."""

    REFUSED = 8
    """What exists is not in a state that allows this."""

    RECOVERY = 9
    """Recovery failed as often as the configuration allows; nothing was served."""

    CONTAINMENT = 11
    """`containment = "strict"`, and the probe of the start did not prove that much."""

    FENCED = 10
    """A newer epoch of this instance has taken over, or may soon: the lease was not renewed."""
