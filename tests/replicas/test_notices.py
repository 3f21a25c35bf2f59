"""Hints between instances: heard by the owner at once, and heard again after a lost connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service.peer_changes import notice_loops
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import peer_notices
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.changes import Change, Subscription
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.peer_notices import PeerNotices

LONG_S: Final = 60.0


class Listener:
    """An instance that hears hints, and sends them."""

    def __init__(self, storage: Storage, changes: Subscription) -> None:
        assert storage.notices is not None
        self.storage, self.changes = storage, changes
        self.notices: PeerNotices = storage.notices

    async def next(self) -> Change:
        """Return what the execution of the instance gets to know next."""
        change = await self.changes.next(LONG_S)
        assert change is not None
        return change


@asynccontextmanager
async def listening(url: str, path: Path, instance: str) -> AsyncIterator[Listener]:
    """Hear hints for an instance, until the end of the block."""
    db = open_database(url, path)
    storage, stop = Storage(db), StopSignal()
    storage.hear_peers(instance)
    listener = Listener(storage, storage.changes.subscribe())
    tasks = [loop.start() for loop in notice_loops(listener.notices, stop)]
    try:
        assert (await listener.next()).in_doubt  # it listens: earlier hints may have been missed
        yield listener
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(storage.close)
        db.close()


async def test_the_owner_of_a_run_hears_what_a_caller_has_changed_through_a_peer(
    postgresql_url: str, tmp_path: Path
) -> None:
    async with (
        listening(postgresql_url, tmp_path, "owner") as owner,
        listening(postgresql_url, tmp_path, "peer") as peer,
    ):
        peer.notices.announce("another", 1)
        peer.notices.announce("owner", 7)
        peer.notices.announce("owner", 8)

        heard = await owner.next()

        assert (set(heard.run_keys), heard.in_doubt) == ({7, 8}, False)


async def test_many_hints_of_one_moment_all_arrive(postgresql_url: str, tmp_path: Path) -> None:
    wanted, heard = set(range(10**15, 10**15 + 1000)), set[int]()
    async with listening(postgresql_url, tmp_path, "owner") as owner:
        for run_key in wanted:
            owner.notices.announce("owner", run_key)

        while heard != wanted:
            heard |= (await owner.next()).run_keys


async def test_a_lost_connection_is_replaced_and_what_it_has_missed_counts_as_in_doubt(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runrecovery_service.peer_changes.LISTEN_AGAIN_S", 0.05)
    async with listening(postgresql_url, tmp_path, "owner") as owner:
        await owner.storage.read(
            lambda db: db.fetch_all(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query = 'LISTEN runrecovery'"
            )
        )
        assert (await owner.next()).in_doubt

        owner.notices.announce("owner", 7)

        assert (await owner.next()).run_keys == {7}


@pytest.mark.parametrize(
    "noise",
    [
        "",
        "no JSON",
        "7",
        '["owner"]',
        '["owner", 7]',
        '["owner", ["x"]]',
        '["owner", [1e999]]',
        '["owner", [NaN]]',
        "[" * 7_000,
    ],
    ids=lambda noise: noise[:20],
)
async def test_a_hint_that_no_instance_has_sent_is_ignored(
    postgresql_url: str, tmp_path: Path, noise: str
) -> None:
    async with listening(postgresql_url, tmp_path, "owner") as owner:
        await owner.storage.read(
            lambda db: db.execute("SELECT pg_notify(?, ?)", (peer_notices.CHANNEL, noise))
        )
        owner.notices.announce("owner", 7)

        assert (await owner.next()).run_keys == {7}
