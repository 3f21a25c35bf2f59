"""Two services on one PostgreSQL: a planned stop that hands runs over, and a takeover."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from crash_points.kills import Kill
from crash_points.scenario import FULL, SETTINGS, Scenario, engines_of, webhook_of
from crash_points.snapshot import Snapshot
from crash_points.world import Crashed, World
from support.service import Home
from support.webhook_receiver import Receiver

LEASE_TTL_S: Final = 20.0
"""On a busy machine a shorter lease would run out."""
TAKEOVER_S: Final = 45.0
"""The longest wait for a takeover, which does not come if the dead instance has no work."""


@dataclass(slots=True, kw_only=True, eq=False)
class ReplicaScenario(Scenario):
    """The steps of instance `a`, the world, and its peer `b`.

    Attributes:
        later: the second kill, until the first has happened.
    """

    peer: World
    later: list[Kill] = field(default_factory=list)

    @property
    def worlds(self) -> tuple[World, ...]:
        """The services."""
        return (self.peer, self.world)

    def plan(self) -> list[Callable[[], None]]:
        """Return the steps."""
        return [
            self.start, self.create_first, self.settle, self.hand_over, self.start,
            self.create_second, self.settle, self.kill, self.await_takeover, self.start,
            self.let_go, self.finish, self.stop, self.rest,
        ]  # fmt: skip

    def create_first(self) -> None:
        """Fill the slots of `a`, and its queue."""
        for kind in ("waits", "sticky", "works", "steps", "holds"):
            getattr(self, kind)(f"{kind}-1")
        for number in range(5):
            self.works(f"queued-{number}")

    def create_second(self) -> None:
        """Create the runs that a takeover meets."""
        for kind in ("waits", "sticky", "works", "steps", "holds"):
            getattr(self, kind)(f"{kind}-2")

    def hand_over(self) -> None:
        """Stop `a` as planned."""
        self.world.stop()

    def await_takeover(self) -> None:
        """Wait until the peer has taken `a` over."""
        ends = time.monotonic() + TAKEOVER_S
        self.peer.until(lambda: self._is_taken() or time.monotonic() > ends, "a is taken over")

    def _is_taken(self) -> bool:
        rows = Snapshot.read(self.peer.home).tables["instance"]
        return any(row["name"] == "a" and row["takeover_done_at"] is not None for row in rows)

    def recover(self, crashed: World) -> None:
        """Start the killed service. If the peer is to be killed, let it begin a takeover first."""
        later = self.later.pop(0) if self.later else None
        if later is None or later.instance == crashed.instance:
            crashed.kills += [] if later is None else [later]
            crashed.recover()
            return
        crashed.bury()
        self.peer.kills.append(later)
        self.peer.arm()
        try:
            self.await_takeover()
        except Crashed as again:
            again.world.recover()
        self.peer.disarm()
        crashed.start()


@contextmanager
def replicas(
    folder: Path, kills: Sequence[Kill], *, database: str, end_s: float
) -> Iterator[ReplicaScenario]:
    """Make the scenario of two services on a database that has every migration."""
    first, later = list(kills[:1]), list(kills[1:])
    with Receiver() as receiver, ExitStack() as homes:
        engines, webhooks = engines_of(folder), [webhook_of(folder, receiver)]
        worlds = {}
        for name in ("a", "b"):
            place = folder / name
            place.mkdir()
            home = Home(
                place, engines=engines, webhooks=webhooks, database=database, instance=name,
                lease_ttl_s=LEASE_TTL_S, max_concurrent=8, **SETTINGS,
            )  # fmt: skip
            own = [kill for kill in first if kill.instance == name]
            worlds[name] = World(homes.enter_context(home), place, own, end_s, instance=name)
        a, b = worlds["a"], worlds["b"]
        b.acknowledged, b.outcomes, b.problems = a.acknowledged, a.outcomes, a.problems
        yield ReplicaScenario(
            world=a, peer=b, folder=folder, size=FULL, receiver=receiver, later=later
        )
