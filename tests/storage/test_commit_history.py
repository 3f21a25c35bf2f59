"""A log position below an acknowledged one shows that PostgreSQL has lost commits."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from runrecovery_service.domain.errors import CommitsLost
from runrecovery_service.storage import instances
from runrecovery_service.storage.commit_history import CommitHistory, LogPosition, position_of
from runrecovery_service.storage.sql_dialects import NO_POSITION, DatabaseKind
from storage.service_store import ServiceStore

FAR = 2**60
"""Beyond every log position of a real server."""
AT_US = 1_764_460_800_000_000
AT = "2025-11-30 00:00:00 UTC"


@pytest.fixture
def history(store: ServiceStore) -> CommitHistory:
    """The history of a start with an acknowledged position on timeline 5 of the test's server."""
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("only PostgreSQL reports positions")
    history = CommitHistory(store.owner.instance, 15.0)
    history.demand_kept(store.db, history.acknowledged, LogPosition(5, FAR, AT_US))
    return history


def commit_at(store: ServiceStore, history: CommitHistory, timeline: int, lsn: int) -> None:
    """Begin and commit a transaction at a log position."""
    before, position = history.acknowledged, LogPosition(timeline, lsn, AT_US)
    history.demand_kept(store.db, before, position)
    history.note(position)


@pytest.mark.parametrize("position", [(5, FAR), (5, FAR + 1), (6, FAR), (7, FAR + 9)])
def test_a_server_that_has_what_it_acknowledged_is_used(
    store: ServiceStore, history: CommitHistory, position: tuple[int, int]
) -> None:
    commit_at(store, history, *position)

    assert history.acknowledged[:2] == position


@pytest.mark.parametrize("position", [(5, FAR - 1), (6, FAR - 1), (4, FAR + 1)])
def test_a_server_that_lacks_what_it_acknowledged_is_refused(
    store: ServiceStore, history: CommitHistory, position: tuple[int, int]
) -> None:
    with pytest.raises(CommitsLost, match=f"until {AT}"):
        commit_at(store, history, *position)

    assert history.acknowledged == (5, FAR, AT_US)


def test_a_transaction_that_was_slower_than_others_is_no_loss(
    store: ServiceStore, history: CommitHistory
) -> None:
    before = history.acknowledged
    commit_at(store, history, 5, FAR + 100)

    history.demand_kept(store.db, before, LogPosition(5, FAR + 50, AT_US))


def test_positions_of_another_server_are_not_compared(
    store: ServiceStore, history: CommitHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_system", "another")

    commit_at(store, history, 1, 7)

    assert history.acknowledged == (1, 7, AT_US)


def test_each_transaction_reads_its_position_on_the_servers_timeline(
    store: ServiceStore, history: CommitHistory
) -> None:
    positions = []
    for _ in range(2):
        with store.db.transaction():
            positions.append(instances.demand_current(store.db, store.owner))

    first, second = positions
    assert first is not None
    assert second is not None
    assert first.timeline == second.timeline == 1
    assert 0 < first.lsn < second.lsn
    assert first.at_us < second.at_us


def test_a_database_that_reports_no_position_has_none(store: ServiceStore) -> None:
    row = store.db.fetch_one(f"SELECT {NO_POSITION}")

    assert row is not None
    assert position_of(row) is None


def test_a_renewal_that_the_store_has_lost_is_reported_with_its_times(store: ServiceStore) -> None:
    first_us, second_us = (instances.renew(store.db, store.owner, ttl_s=15) for _ in range(2))
    instances.renew(store.db, store.owner, ttl_s=15, acknowledged_us=second_us)
    store.db.execute("UPDATE instance SET lease_until = ?", (AT_US + 15_000_000,))

    with pytest.raises(CommitsLost) as lost:
        instances.renew(store.db, store.owner, ttl_s=15, acknowledged_us=second_us)

    assert first_us <= second_us
    until = datetime.fromtimestamp(second_us / 1e6 - 15, UTC)
    assert str(lost.value) == (
        "the database has lost commits that it acknowledged"
        f" after {AT} until {until:%Y-%m-%d %H:%M:%S} UTC"
    )
