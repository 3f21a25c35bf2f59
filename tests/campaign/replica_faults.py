"""The faults of the campaign of replicas."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from random import Random
from typing import Any, Final, TypeAlias

from campaign.judges import Rows
from campaign.load import Client, Journal
from campaign.replica_process import Replica
from support.processes import are_dead
from support.waiting import until

from bench.postgres import ScratchPostgres, crash, start_again

SETTINGS: Final = ("fsync=off", "max_connections=200")
REACTION_S: Final = 1.5
"""After the end of a lease, peers need about this long until they have taken over."""
IN_TRANSACTION_S: Final = 4.5
"""PostgreSQL ends a transaction that is idle for 5 s."""
SLOW_RENEWAL_SHARE: Final = 0.26
"""A renewal may take 0.3 of the time of a lease."""
ANSWERED_SHARE: Final = 0.05
"""The service has noted an answer by then. It renews again after 0.2 of the time of a lease."""
QUEUED_RUNS: Final = 36
"""More than three replicas do in the time that their peers leave them their own queue."""
OLD_QUEUES: Final = (
    "SELECT count(DISTINCT owner) FROM run WHERE status = 'QUEUED'"
    " AND updated_at < extract(epoch FROM clock_timestamp()) * 1000000 - 1200000"
)
"""The number of replicas with a run in their queue that peers may take."""
HAS_LONG_RUN: Final = (
    "SELECT count(*) FROM run WHERE engine = 'long' AND status = 'RUNNING' AND owner = '{owner}'"
)
EPOCH: Final = "SELECT epoch FROM instance_epoch WHERE name = '{name}'"
BEFORE_CHANGE: Final = "UPDATE run SET"
RENEWAL: Final = "UPDATE instance SET lease_until"

Fault: TypeAlias = Callable[[Replica], None]


class Faults:
    """Breaks replicas, their network and their database; a seed determines how.

    Attributes:
        counts: how often each fault was played.
    """

    def __init__(
        self,
        server: ScratchPostgres,
        replicas: Sequence[Replica],
        rows: Rows,
        journal: Journal,
        *,
        seed: int,
        ttl_s: float,
    ) -> None:
        self._server, self._replicas, self._rows, self._journal = server, replicas, rows, journal
        self._ttl_s = ttl_s
        self._random = Random(seed)  # noqa: S311 - a plan, no secret
        self._seed = seed
        self._servers = ExitStack()
        self._weights: dict[str, int] = {
            "kill": 4,
            "stop": 2,
            "stop_with_queues": 2,
            "freeze": 2,
            "freeze_in_transaction": 3,
            "freeze_after_slow_renewal": 1,
            "cut": 2,
            "silence": 2,
            "stall": 2,
            "lose_commit": 3,
            "crash_database": 1,
        }

    def play(self, only: str | None = None) -> str:
        """Play the next fault after a pause, and return what it was.

        Args:
            only: the fault to play; None: a random one.
        """
        self.pause(self._random.uniform(0.3, 2.0))
        (name,) = self._random.choices([*self._weights], [*self._weights.values()])
        replica = self._random.choice(self._replicas)
        fault: Fault = getattr(self, only or name)
        fault(replica)
        return only or name

    def end(self) -> None:
        """End every fault that may outlive its moment."""
        for replica in self._replicas:
            for way in replica.ways:
                way.mend()

    def close(self) -> None:
        """Stop the servers that were started again."""
        self._servers.close()

    def pause(self, seconds: float, *, but: Replica | None = None) -> None:
        """Keep the replicas up for a while, except one."""
        self._pause_until(lambda: False, seconds, but=but)

    def _pause_until(
        self, is_over: Callable[[], Any], seconds: float, *, but: Replica | None = None
    ) -> None:
        """Keep the replicas up, except one, until a condition holds, or some seconds are over."""
        end_s = time.monotonic() + seconds
        while True:
            for replica in self._replicas:
                if replica is not but:
                    replica.look()
            if time.monotonic() >= end_s or is_over():
                return
            time.sleep(0.05)

    def _one(self, sql: str) -> Any:
        ((value,),) = self._rows(sql)
        return value

    def _feed(self, engine: str, replicas: Sequence[Replica], count: int) -> None:
        """Create runs of an engine through some replicas."""
        apis = [replica.api for replica in replicas if replica.api is not None]
        feeder = Client(-1, self._seed, self._journal, lambda: apis, tries=1)
        for _ in range(count):
            feeder.create_run(engine, {})

    # -- faults ------------------------------------------------------------------------------------

    def kill(self, replica: Replica) -> None:
        """Kill a replica, and let peers notice before it is started again, or not."""
        replica.signal(signal.SIGKILL)
        self.pause(self._random.choice((0.0, self._ttl_s + REACTION_S)), but=replica)

    def stop(self, replica: Replica) -> None:
        """Stop a replica in order."""
        replica.signal(signal.SIGTERM)
        self.pause(self._random.choice((0.5, self._ttl_s + REACTION_S)), but=replica)

    def stop_with_queues(self, replica: Replica) -> None:
        """Stop a replica in order while its peers have runs in their queues that it may take."""
        self._feed("works", self._replicas, QUEUED_RUNS)
        everywhere = len(self._replicas)
        self._pause_until(lambda: self._one(OLD_QUEUES) == everywhere, self._ttl_s)
        self.stop(replica)

    def freeze(self, replica: Replica) -> None:
        """Freeze a replica for longer than its lease."""
        replica.signal(signal.SIGSTOP)
        self.pause(self._ttl_s + self._random.uniform(0.5, 2.5), but=replica)
        replica.signal(signal.SIGCONT)

    def freeze_in_transaction(self, replica: Replica) -> None:
        """Freeze a replica in a transaction, whose change of a run arrives after the lease."""
        way = replica.ways[0]
        way.hold_before(BEFORE_CHANGE)
        if way.holding.wait(2.0):
            replica.signal(signal.SIGSTOP)
            query = EPOCH.format(name=replica.name)
            epoch = self._one(query)
            self._pause_until(lambda: self._one(query) != epoch, IN_TRANSACTION_S, but=replica)
        way.release()
        self.pause(0.1, but=replica)
        replica.signal(signal.SIGCONT)

    def freeze_after_slow_renewal(self, replica: Replica) -> None:
        """Freeze a replica whose agent works, once it has the late answer to a renewal."""
        self._feed("long", [replica], 1)
        query = HAS_LONG_RUN.format(owner=replica.name)
        self._pause_until(lambda: self._one(query), self._ttl_s)
        way = replica.ways[-1]
        way.hold_answer_after(RENEWAL)
        if way.holding.wait(self._ttl_s / 2):
            self.pause(SLOW_RENEWAL_SHARE * self._ttl_s)
        way.release()
        self.pause(ANSWERED_SHARE * self._ttl_s)
        replica.signal(signal.SIGSTOP)
        self.pause(self._ttl_s * 1.2 + REACTION_S, but=replica)
        replica.signal(signal.SIGCONT)

    def cut(self, replica: Replica) -> None:
        """Cut every connection of a replica."""
        for way in replica.ways:
            way.cut()

    def silence(self, replica: Replica) -> None:
        """Let a replica's network drop everything for a while."""
        for way in replica.ways:
            way.silent = True
        self.pause(self._random.uniform(0.5, self._ttl_s + 2))
        for way in replica.ways:
            way.mend()

    def stall(self, replica: Replica) -> None:
        """Stall the connections that a replica has. New ones work."""
        for way in replica.ways:
            way.stall()

    def lose_commit(self, replica: Replica) -> None:
        """Cut a connection right after a COMMIT of it was sent."""
        replica.ways[0].lose_answer_after("BEGIN")
        replica.ways[0].lost.wait(2.0)

    def crash_database(self, _: Replica) -> None:
        """Crash PostgreSQL and start it again."""
        postmaster = int((self._server.folder / "data/postmaster.pid").read_text().split()[0])
        crash(self._server)
        until(lambda: are_dead([postmaster]), "the database is dead")
        self.pause(self._random.uniform(0.0, 1.0))
        self._servers.enter_context(start_again(self._server, *SETTINGS))
