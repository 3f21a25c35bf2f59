"""Divides the limit on open files between runs, the database and client connections.

A client connection must not take the descriptors that a launch or a database connection needs.
So client connections get the rest.
"""

from __future__ import annotations

import resource
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

BASE: Final = 80
"""Descriptors for streams, locks, event loop and gRPC. An idle service has some 50 open."""
STORE: Final = 64
"""Descriptors for the store: up to eleven threads with a connection each, for which SQLite opens
three files."""
PER_RUN: Final = 20
"""Descriptors for each run: five pipes and the spool while the agent lives, ten more during its
launch, four for its output files."""
PER_WEBHOOK: Final = 10
"""Descriptors for each webhook: eight connections, and two look-ups of names."""
LEAST_CONNECTIONS: Final = 32


class TooFewOpenFiles(Exception):
    """The limit on open files is too low for the configuration.

    Attributes:
        limit: the limit.
        needed: the lowest limit that is enough.
    """

    def __init__(self, limit: int, needed: int) -> None:
        super().__init__(f"the limit on open files is {limit}; at least {needed} are needed")
        self.limit = limit
        self.needed = needed


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The shares of the limit on open files.

    Attributes:
        limit: the soft limit that the service needs, as far as the hard limit allows it.
        connections: how many clients may be connected at one time.
        agents_soft: the soft limit of agents, which the service itself was started with.
    """

    limit: int
    connections: int
    agents_soft: int

    @classmethod
    def plan(cls, *, runs: int, connections: int, webhooks: int = 0) -> OpenFiles:
        """Return how to divide the limit of this process.

        Args:
            runs: the highest number of runs at one time.
            connections: the wanted number of client connections.
            webhooks: the number of configured webhooks.

        Raises:
            TooFewOpenFiles: the limit is too low for the runs and a few connections.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = (_reserved(runs, webhooks) + connections) * 4 // 3 + 1
        limit = max(soft, min(wanted, hard))
        found = connections_within(limit, runs=runs, webhooks=webhooks)
        return cls(limit=limit, connections=min(found, connections), agents_soft=soft)

    def apply(self) -> None:
        """Raise the soft limit of this process to `limit`."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.limit, hard))


def connections_within(limit: int, *, runs: int, webhooks: int = 0) -> int:
    """Return how many client connections a limit on open files leaves.

    Raises:
        TooFewOpenFiles: fewer than `LEAST_CONNECTIONS`.
    """
    reserved = _reserved(runs, webhooks)
    left = limit - reserved
    if left < LEAST_CONNECTIONS:
        raise TooFewOpenFiles(limit, reserved + LEAST_CONNECTIONS)
    # A sweep may use a quarter of all descriptors: one for each process that it ends.
    return max(LEAST_CONNECTIONS, left - limit // 4)


def _reserved(runs: int, webhooks: int) -> int:
    return BASE + STORE + PER_RUN * runs + PER_WEBHOOK * webhooks
