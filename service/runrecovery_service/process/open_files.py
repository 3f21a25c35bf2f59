"""How many files this process may have open, and what for: runs, the store, connections.

A connection that somebody opens must not cost a run the descriptors of its launch, nor the store
those of a thread's connection. So connections get what the others leave.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Final

BASE: Final = 80
"""Streams, locks, loop, gRPC; some 50 in an idle service."""
STORE: Final = 64
"""Eleven threads at most, each with a connection; SQLite opens three files for one."""
PER_RUN: Final = 20
"""Five pipes while the agent lives; its launch takes ten more, its output four at a time."""
LEAST_CONNECTIONS: Final = 32


class TooFewOpenFiles(Exception):
    """The limit is too low for what is configured.

    Attributes:
        limit: what it is.
        needed: the least that works.
    """

    def __init__(self, limit: int, needed: int) -> None:
        super().__init__(f"the limit on open files is {limit}; at least {needed} are needed")
        self.limit = limit
        self.needed = needed


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """How the limit on open files is divided.

    Attributes:
        limit: the soft limit that the service is to have: as much as is needed and allowed.
        connections: how many callers may be connected at one time.
        agents_soft: the soft limit of agents: what the service was started with.
    """

    limit: int
    connections: int
    agents_soft: int

    @classmethod
    def plan(cls, *, runs: int, connections: int) -> OpenFiles:
        """Divide what this process may have.

        Args:
            runs: how many may run at one time.
            connections: how many are wanted.

        Raises:
            TooFewOpenFiles: there is not enough for the runs and a few connections.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _limit_for(runs, connections)
        limit = max(soft, min(wanted, hard))
        found = connections_within(limit, runs=runs)
        return cls(limit=limit, connections=min(found, connections), agents_soft=soft)

    def take(self) -> None:
        """Raise the soft limit of this process."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.limit, hard))


def connections_within(limit: int, *, runs: int) -> int:
    """Return how many connections a limit leaves.

    Raises:
        TooFewOpenFiles: too few.
    """
    left = limit - _reserved(runs)
    if left < LEAST_CONNECTIONS:
        raise TooFewOpenFiles(limit, _reserved(runs) + LEAST_CONNECTIONS)
    # A sweep may hold a quarter of all: one descriptor for each process that it ends.
    return max(LEAST_CONNECTIONS, left - limit // 4)


def _reserved(runs: int) -> int:
    return BASE + STORE + PER_RUN * runs


def _limit_for(runs: int, connections: int) -> int:
    return (_reserved(runs) + connections) * 4 // 3 + 1
