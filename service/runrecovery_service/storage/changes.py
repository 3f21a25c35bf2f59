"""The one feed of changes: each commit announces the runs that it has changed.

Use it on the event loop only.

Watchers wait for one run, or for decisions. The execution subscribes to every change. A write whose
COMMIT answer was lost is announced as in doubt, so that subscribers read the records at once. Other
processes may write to a shared store too: `Storage.poll_shared` queries their changes, in one query
for all watchers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import structlog

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database

log = structlog.get_logger()

KEYS_PER_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class Change:
    """The changes that were committed since the last `Subscription.next`.

    Attributes:
        run_keys: the runs that have changed.
        in_doubt: whether a write failed that may nevertheless be committed. Its runs are unknown.
    """

    run_keys: frozenset[int]
    in_doubt: bool


class Subscription:
    """Collects every change. A context manager, whose end closes the subscription."""

    def __init__(self, subscriptions: dict[Subscription, None]) -> None:
        self._subscriptions = subscriptions
        self._subscriptions[self] = None
        self._run_keys: set[int] = set()
        self._in_doubt = False
        self._woken = asyncio.Event()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self._subscriptions.pop(self, None)

    async def next(self, timeout_s: float) -> Change | None:
        """Wait for changes and return them; None if there are none within `timeout_s` seconds.

        After a call of `wake`, return an empty change.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return None
        self._woken.clear()
        change = Change(frozenset(self._run_keys), self._in_doubt)
        self._run_keys, self._in_doubt = set(), False
        return change

    def wake(self) -> None:
        """Make `next` return without a change."""
        self._woken.set()

    def add(self, run_keys: Collection[int]) -> None:
        """Add changed runs."""
        self._run_keys.update(run_keys)
        self._woken.set()

    def add_doubt(self) -> None:
        """Add a change in doubt."""
        self._in_doubt = True
        self._woken.set()


class RunWaiters:
    """The events that a change of one run sets, and how many changes were announced to them."""

    def __init__(self) -> None:
        self.events: set[asyncio.Event] = set()
        self.changes = 0

    def wake(self) -> None:
        """Announce a change."""
        self.changes += 1
        for event in self.events:
            event.set()


class Changes:
    """Watchers and subscribers of one store."""

    def __init__(self) -> None:
        self._by_run: dict[int, RunWaiters] = {}
        self._of_decisions: set[asyncio.Event] = set()
        self._of_all_runs: set[asyncio.Event] = set()
        # In the order of their beginning, so that they always wake in the same order.
        self._subscriptions: dict[Subscription, None] = {}

    @property
    def runs_watched(self) -> list[int]:
        """Keys of the runs that have a watcher."""
        return list(self._by_run)

    @property
    def decisions_watched(self) -> bool:
        """Whether anyone watches decisions."""
        return bool(self._of_decisions)

    @contextmanager
    def of_run(self, run_key: int, event: asyncio.Event) -> Iterator[RunWaiters]:
        """Set the event with every change of a run. All that wait for a run share the waiters."""
        waiters = self._by_run.setdefault(run_key, RunWaiters())
        waiters.events.add(event)
        try:
            yield waiters
        finally:
            waiters.events.discard(event)
            if not waiters.events and self._by_run.get(run_key) is waiters:
                del self._by_run[run_key]

    @contextmanager
    def of_all_runs(self, event: asyncio.Event) -> Iterator[None]:
        """Set the event with every change of any run."""
        self._of_all_runs.add(event)
        try:
            yield
        finally:
            self._of_all_runs.discard(event)

    @contextmanager
    def of_decisions(self, event: asyncio.Event) -> Iterator[None]:
        """Set the event whenever there may be new decisions."""
        self._of_decisions.add(event)
        try:
            yield
        finally:
            self._of_decisions.discard(event)

    def subscribe(self) -> Subscription:
        """Return a subscription to every change from now on."""
        return Subscription(self._subscriptions)

    def announce(self, run_keys: Collection[int]) -> None:
        """Announce committed changes to watchers and subscribers."""
        self.wake_watchers(run_keys)
        if run_keys:
            for subscription in self._subscriptions:
                subscription.add(run_keys)

    def announce_doubt(self) -> None:
        """Announce a write that may have been committed although it failed."""
        for subscription in self._subscriptions:
            subscription.add_doubt()

    def wake_watchers(self, run_keys: Collection[int]) -> None:
        """Wake the watchers of these runs, but no subscriber."""
        for key in run_keys:
            if (waiters := self._by_run.get(key)) is not None:
                waiters.wake()
        if run_keys:
            for event in self._of_all_runs:
                event.set()

    def announce_decisions(self) -> None:
        """Wake the watchers of decisions."""
        for event in self._of_decisions:
            event.set()


def event_counts(db: Database, run_keys: Collection[int]) -> dict[int, int]:
    """Return the number of events that each of these runs has had so far."""
    keys = list(run_keys)
    found: dict[int, int] = {}
    for at in range(0, len(keys), KEYS_PER_QUERY):
        some = keys[at : at + KEYS_PER_QUERY]
        marks = ", ".join("?" for _ in some)
        found |= dict(db.fetch_all(f"SELECT id, event_count FROM run WHERE id IN ({marks})", some))
    return found


def decisions_stamp(db: Database) -> tuple[int, int]:
    """Return a value that changes when a recovery has decided on more runs, or ended."""
    row = db.fetch_one(
        "SELECT COALESCE(max(id), 0), COALESCE(sum(runs_scanned), 0)"
        " + COALESCE(sum(CASE WHEN state = 'RUNNING' THEN 0 ELSE 1 END), 0) FROM"
        " (SELECT id, runs_scanned, state FROM reconciliation ORDER BY id DESC LIMIT 100) AS latest"
    )
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


class SharedPoll:
    """Compares each poll of a shared store with the previous poll."""

    def __init__(self) -> None:
        self._counts: Mapping[int, int] = {}
        self._stamp = (0, 0)

    def changed(self, counts: Mapping[int, int]) -> list[int]:
        """Return the runs with new events since the last poll, and those missing in that poll."""
        before, self._counts = self._counts, counts
        return [key for key, count in counts.items() if before.get(key) != count]

    def has_decided(self, stamp: tuple[int, int]) -> bool:
        """Return whether the stamp of the decisions differs from that of the last poll."""
        before, self._stamp = self._stamp, stamp
        return before != stamp
