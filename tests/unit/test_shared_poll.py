"""A shared store is polled for the changes of other instances, whatever the store answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from runrecovery_service import peer_changes
from runrecovery_service.domain.errors import Fenced, StorageUnavailable
from runrecovery_service.stop_signal import StopSignal
from support.waiting import until_async


class Polled:
    """A store of which each poll has the next of these outcomes; the last one is repeated."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes: Iterator[Exception | None] = iter(outcomes)
        self._next: Exception | None = None
        self.polls = 0

    async def poll_shared(self) -> None:
        self.polls += 1
        self._next = next(self._outcomes, self._next)
        if self._next is not None:
            raise self._next


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_changes, "SHARED_POLL_S", 0.0)


async def test_an_outage_is_logged_once_until_a_poll_succeeds() -> None:
    away = StorageUnavailable()
    storage: Any = Polled(away, away, away, None, away, away, None)
    poll = peer_changes.shared_poll(storage, StopSignal())

    async def is_over() -> bool:
        return bool(storage.polls > 7)

    with structlog.testing.capture_logs() as logs:
        poll.start()
        await until_async(is_over, "all polls are over")
        await poll.finish()

    assert [line["event"] for line in logs] == ["storage.changes_not_seen"] * 2


@pytest.mark.parametrize("error", [RuntimeError("a defect"), Fenced("the lease")])
async def test_an_error_that_is_no_outage_stops_the_service(error: Exception) -> None:
    stop, storage = StopSignal(), Polled(error)
    task = peer_changes.shared_poll(storage, stop).start()  # type: ignore[arg-type]
    task.add_done_callback(stop.task_ended)

    async def is_stopped() -> bool:
        return stop.is_set()

    await until_async(is_stopped, "the service stops")

    assert stop.failure is error
