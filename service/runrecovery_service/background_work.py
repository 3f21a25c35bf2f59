"""Runs the background tasks of the service: dispatcher, deadlines, sweeps, webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.webhooks.webhooks import Webhooks


class Sweeper(Protocol):
    """Repeats a task in rounds, from `start` to `stop`."""

    def start(self) -> None:
        """Start the rounds."""
        ...

    async def stop(self) -> None:
        """Stop the rounds. A round that is under way may finish first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweeper, with the conditions under which it runs.

    Attributes:
        name: the name of the sweeper in the log, if its stop fails.
        in_safe_mode: whether the sweeper also runs in safe mode.
        stop_grace_s: seconds that its stop may take on top of `lifecycle.STEP_S`.
    """

    name: str
    sweeper: Sweeper
    in_safe_mode: bool = True
    stop_grace_s: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class BackgroundWork:
    """All background tasks of the service: launches, deadlines, sweeps, webhooks.

    Attributes:
        sweeps: in the order in which they start and stop.
        threads: the pool for blocking calls that all of them share.
    """

    dispatcher: Dispatcher
    deadlines: Deadlines
    sweeps: Sequence[Sweep]
    webhooks: Webhooks
    threads: SteadyThreadPool

    def start(self, *, safe_mode: bool) -> None:
        """Start all tasks. In safe mode none launches a process, ends a wait or removes a run."""
        for sweep in self.sweeps:
            if sweep.in_safe_mode or not safe_mode:
                sweep.sweeper.start()
        self.webhooks.start()
        if not safe_mode:
            self.dispatcher.start()
            self.deadlines.start()
