"""Scrapes are answered from one text a second and one read of the store in five seconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.metric_counters import Meters, SharedCounter
from runrecovery_service.metrics import collector
from runrecovery_service.metrics.collector import Collector, Counts, StoredCounts
from runrecovery_service.metrics.exposition import render
from runrecovery_service.metrics.snapshot import Family, families_of
from runrecovery_service.storage.run_counts import RunCount
from support.clock import FakeClock

RUNS = [RunCount(status=RunStatus.QUEUED, engine="a", runs=1, oldest_since=None)]
COUNTS = Counts(runs=RUNS, usage=[], backlogs={})


class Store:
    """A store that answers when the test lets it, and counts its reads."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.error: Exception | None = None
        self.reads = 0

    async def read(self) -> Counts:
        self.reads += 1
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return COUNTS


class Renders:
    """A renderer that counts the texts that it makes."""

    texts = 0

    def __call__(self, _: Iterable[Family]) -> bytes:
        self.texts += 1
        return b"text %d" % self.texts


async def test_a_hundred_scrapes_at_once_cost_one_text_and_one_read() -> None:
    store, renders = Store(), Renders()
    made = Collector(
        stored=StoredCounts(read=store.read, clock=FakeClock()), families=list, render=renders
    )

    texts = await asyncio.gather(*(made.text() for _ in range(100)))
    texts += [await made.text() for _ in range(100)]

    assert (set(texts), store.reads, renders.texts) == ({b"text 1"}, 1, 1)


async def test_an_old_text_is_made_again_without_reading_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector, "TEXT_KEPT_S", 0.0)
    store, renders = Store(), Renders()
    made = Collector(
        stored=StoredCounts(read=store.read, clock=FakeClock()), families=list, render=renders
    )

    texts = [await made.text() for _ in range(3)]

    assert (texts, store.reads) == ([b"text 1", b"text 2", b"text 3"], 1)


async def test_a_store_that_hangs_delays_no_scrape_for_long_and_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector, "STORE_READ_MOST_S", 0.0)
    monkeypatch.setattr(collector, "STORE_WAIT_S", 0.01)
    store, clock = Store(), FakeClock()
    stored = StoredCounts(read=store.read, clock=clock)
    await stored.refresh()
    read_at = stored.read_at
    store.may_answer.clear()
    clock.advance(60)

    for _ in range(5):
        await stored.refresh()

    assert (stored.counts, stored.read_at, store.reads) == (COUNTS, read_at, 2)
    store.may_answer.set()
    await stored.refresh()
    assert stored.read_at == clock.wall


async def test_a_store_that_fails_is_logged_once_and_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector, "STORE_READ_MOST_S", 0.0)
    store = Store()
    store.error = StorageUnavailable()
    stored = StoredCounts(read=store.read, clock=FakeClock())

    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await stored.refresh()
    store.error = None
    await stored.refresh()

    assert [line["event"] for line in logs] == ["metrics.runs_not_read"]
    assert (stored.counts, store.reads) == (COUNTS, 4)


@pytest.mark.parametrize(
    ("read_s", "pause_s"), [(0.0, 5.0), (0.5, 5.0), (0.75, 6.75), (2.0, 18.0), (60.0, 30.0)]
)
@pytest.mark.parametrize("error", [None, StorageUnavailable()])
async def test_the_pause_after_a_read_begins_with_its_end_and_grows_with_its_duration(
    monkeypatch: pytest.MonkeyPatch, read_s: float, pause_s: float, error: Exception | None
) -> None:
    now_s, reads = 1_000.0, 0

    async def read() -> Counts:
        nonlocal now_s, reads
        reads += 1
        now_s += read_s
        if error is not None:
            raise error
        return COUNTS

    monkeypatch.setattr(collector, "monotonic", lambda: now_s)
    stored = StoredCounts(read=read, clock=FakeClock())
    await stored.refresh()
    ended_s = now_s

    await stored.refresh()
    now_s = ended_s + pause_s - 0.1
    await stored.refresh()
    assert reads == 1
    now_s = ended_s + pause_s
    await stored.refresh()
    assert reads == 2


async def test_a_text_that_cannot_be_made_is_tried_again_by_the_next_scrape() -> None:
    families = iter([RuntimeError("no text"), None])

    def read() -> list[Family]:
        if (error := next(families)) is not None:
            raise error
        return []

    made = Collector(
        stored=StoredCounts(read=Store().read, clock=FakeClock()), families=read, render=Renders()
    )

    with pytest.raises(RuntimeError, match="no text"):
        await made.text()
    assert await made.text() == b"text 1"


async def test_other_scrapes_get_their_text_when_one_client_disconnects() -> None:
    store = Store()
    store.may_answer.clear()
    made = Collector(
        stored=StoredCounts(read=store.read, clock=FakeClock()), families=list, render=Renders()
    )
    first, second = asyncio.create_task(made.text()), asyncio.create_task(made.text())
    await asyncio.sleep(0)

    first.cancel()
    store.may_answer.set()

    assert await second == b"text 1"


async def test_a_scrape_is_answered_while_other_work_hangs_in_every_shared_thread() -> None:
    hangs = threading.Event()
    made = Collector(
        stored=StoredCounts(read=Store().read, clock=FakeClock()), families=list, render=Renders()
    )
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        hanging = asyncio.create_task(asyncio.to_thread(hangs.wait))
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(10):
                assert await made.text() == b"text 1"
            assert not hanging.done()
        finally:
            hangs.set()
        await hanging


def test_the_text_has_cumulated_buckets_and_the_names_as_they_are() -> None:
    meters, shared = Meters(), SharedCounter("runrecovery_x_total", "X.", "level")
    shared.add("error")
    for writes in (1, 3, 100):
        meters.commit_writes.observe(writes)

    text = render(families_of(meters, shared)).decode()

    assert '\nrunrecovery_x_total{level="error"} 1.0\n' in text
    assert '\nrunrecovery_commit_size_writes_bucket{le="1.0"} 1.0\n' in text
    assert '\nrunrecovery_commit_size_writes_bucket{le="4.0"} 2.0\n' in text
    assert '\nrunrecovery_commit_size_writes_bucket{le="+Inf"} 3.0\n' in text
    assert "\nrunrecovery_commit_size_writes_count 3.0\n" in text
    assert "\nrunrecovery_commit_size_writes_sum 104.0\n" in text
    assert "\nrunrecovery_process_open_fds " in text
