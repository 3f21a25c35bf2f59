"""Runs the background tasks of the service: dispatcher, deadlines, sweeps, webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.webhooks.webhooks import Webhooks


class Sweeper(Protocol):
    """Works in rounds, from `start` to `stop`."""

    def start(self) -> None:
        """Start the rounds."""
        ...

    async def stop(self) -> None:
        """Stop, perhaps after the round that is under way."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweeper, with the conditions under which it runs.

    Attributes:
        name: names its step in the log of a stop.
        in_safe_mode: False: it does not start in safe mode.
        stop_grace_s: how much longer than another step its stop may take.
    """

    name: str
    sweeper: Sweeper
    in_safe_mode: bool = True
    stop_grace_s: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class BackgroundWork:
    """Launches and follows processes, carries out deadlines, cleans up, delivers webhooks.

    Attributes:
        sweeps: in the order in which they start and stop.
        threads: the threads of all of this work.
    """

    dispatcher: Dispatcher
    deadlines: Deadlines
    sweeps: Sequence[Sweep]
    webhooks: Webhooks
    threads: SteadyThreadPool

    def start(self, *, safe_mode: bool) -> None:
        """Start to work. In safe mode nothing launches a process, ends a wait or removes a run."""
        for sweep in self.sweeps:
            if sweep.in_safe_mode or not safe_mode:
                sweep.sweeper.start()
        self.webhooks.start()
        if not safe_mode:
            self.dispatcher.start()
            self.deadlines.start()
