"""Answers scrapes: gathers the numbers on the event loop, and writes them as text in a thread.

All scrapes of one second get the same text. At most one read of the store is under way, however
many scrapes there are. At least `STORE_READ_S` seconds pass between two reads, and more if a read
takes long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import field
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Final

from runrecovery_service import daemon_threads
from runrecovery_service.clock import Clock
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metrics.snapshot import Family
from runrecovery_service.periodic import FailureLog
from runrecovery_service.storage.run_counts import RunCount
from runrecovery_service.storage.usage import EngineUsage

if TYPE_CHECKING:  # not imported where there is no webhook
    from runrecovery_service.storage.webhook_deliveries import Backlog

TEXT_KEPT_S: Final = 1.0
STORE_READ_S: Final = 5.0
STORE_READ_MOST_S: Final = 30.0
"""The shortest and the longest pause between two reads."""
READ_PAUSES: Final = 9
"""The pause after a read, as a multiple of the time that the read took. So reads take a tenth of
the time."""
STORE_WAIT_S: Final = 0.5
"""How long a scrape waits for the store. After that, its answer has the counts of the last read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The counts that are read from the store.

    Attributes:
        runs: the unfinished runs.
        usage: the usage of turns, by engine and model.
        backlogs: the waiting deliveries of each webhook that has any, by the webhook's name.
    """

    runs: list[RunCount]
    usage: list[EngineUsage]
    backlogs: Mapping[str, Backlog]


@dataclass(slots=True, kw_only=True, eq=False)
class StoredCounts:
    """The counts of the latest read of the store.

    Attributes:
        read: reads the store.
        counts: None until the first answer of the store.
        read_at: the time of the latest answer.
    """

    read: Callable[[], Awaitable[Counts]]
    clock: Clock
    counts: Counts | None = field(default=None, init=False)
    read_at: datetime | None = field(default=None, init=False)
    _next_read_s: float = field(default=0.0, init=False)
    _reading: asyncio.Task[None] | None = field(default=None, init=False)
    _failures: FailureLog = field(init=False)

    def __post_init__(self) -> None:
        self._failures = FailureLog(failure_event="metrics.runs_not_read")

    async def refresh(self) -> None:
        """Start a read of the store if one is due, and wait at most `STORE_WAIT_S` for its end."""
        if self._reading is None and monotonic() >= self._next_read_s:
            self._reading = asyncio.create_task(self._read(), name="metrics-store")
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=STORE_WAIT_S)

    async def _read(self) -> None:
        begun_s = monotonic()
        try:
            self.counts = await self.read()
            self.read_at = self.clock.now()
            self._failures.note_success()
        except Exception as error:  # noqa: BLE001 - the edge of this task: the next scrape tries again
            self._failures.report(error)
        finally:
            ended_s = monotonic()
            pause_s = max(STORE_READ_S, READ_PAUSES * (ended_s - begun_s))
            self._next_read_s = ended_s + min(pause_s, STORE_READ_MOST_S)
            self._reading = None

    def stop(self) -> None:
        """Cancel the read of the store that is under way."""
        if self._reading is not None:
            self._reading.cancel()


@dataclass(slots=True, kw_only=True, eq=False)
class Collector:
    """Returns the text for a scrape.

    Attributes:
        families: returns every metric as it is now, on the event loop.
        render: writes the metrics as text. It takes milliseconds, and is called in its own thread.
    """

    stored: StoredCounts
    families: Callable[[], Iterable[Family]]
    render: Callable[[Iterable[Family]], bytes]
    _text: bytes = field(default=b"", init=False)
    _until_s: float = field(default=0.0, init=False)
    _making: asyncio.Task[None] | None = field(default=None, init=False)

    async def text(self) -> bytes:
        """Return the metrics, at most `TEXT_KEPT_S` old."""
        if monotonic() >= self._until_s:
            if self._making is None:
                self._making = asyncio.create_task(self._make(), name="metrics-text")
            # Shielded: other clients need the text even if this client disconnects.
            await asyncio.shield(self._making)
        return self._text

    async def _make(self) -> None:
        try:
            await self.stored.refresh()
            families = list(self.families())
            # Not in the shared threads: work on a disk that hangs may occupy all of them.
            self._text = await daemon_threads.run(lambda: self.render(families))
            self._until_s = monotonic() + TEXT_KEPT_S
        finally:
            self._making = None

    def stop(self) -> None:
        """Cancel the read and the text that are under way."""
        self.stored.stop()
        if self._making is not None:
            self._making.cancel()
