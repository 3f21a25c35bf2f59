"""The answer to a COMMIT is lost between replicas: the next try finds what was committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from replicas.dead_instance import Pair, make_pair, set_lease
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import RestartPolicy
from runrecovery_service.storage import dead_instances, hand_over, takeover, work_stealing
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.use_case import run_use_case
from runrecovery_service.storage.work_stealing import Taker
from support.pg_proxy import Proxy, proxied

AGAIN: dict[str, Any] = {"restart_policy": RestartPolicy.REQUEUE, "max_attempts": 2}


@dataclass
class Cut:
    """A pair whose connections lead through a proxy."""

    pair: Pair
    proxy: Proxy

    def lose(self, mark: str, use: Callable[[Database], object]) -> None:
        """Run a use case, and lose the answer to the COMMIT of the transaction with this mark."""
        self.proxy.lose_answer_after(mark)
        with pytest.raises(StorageUnavailable):
            run_use_case(self.pair.db, use)
        assert self.proxy.lost.is_set()


@pytest.fixture
def cut(postgresql_url: str, tmp_path: Path) -> Iterator[Cut]:
    with proxied(postgresql_url) as proxy:
        database = open_database(proxy.url, tmp_path)
        try:
            pair = make_pair(database)
            database.execute("UPDATE instance SET engines = '[\"demo\"]', max_running = 4")
            set_lease(database, "a", 60_000_000)
            set_lease(database, "b", 60_000_000)
            yield Cut(pair, proxy)
        finally:
            database.close()


def test_a_takeover_whose_fence_was_committed_unheard_is_continued_by_its_rescuer_alone(
    cut: Cut,
) -> None:
    pair = cut.pair
    run = pair.dead.create(**AGAIN)
    pair.expire()
    cut.lose("taken_over_at", lambda db: takeover.begin(db, pair.rules, "a"))
    third = pair.third()
    set_lease(pair.dead.db, "c", 60_000_000)

    assert dead_instances.find_dead(third.db, third.rules) == []
    assert takeover.begin(third.db, third.rules, "a") is None
    pair.take_over()

    assert pair.owners() == [(run.key, "b", pair.owner.epoch, "QUEUED")]


def test_a_page_of_a_takeover_that_was_committed_unheard_is_decided_once(cut: Cut) -> None:
    pair = cut.pair
    pair.keep_history()
    for _ in range(5):
        pair.dead.running(**AGAIN)
    pair.expire()
    taken = pair.begin()
    cut.lose("INSERT INTO recovery_event", lambda _: pair.recover(taken, batch_rows=2))
    decided = pair.dead.rows("SELECT count(*) FROM run WHERE owner = 'b'")
    assert 0 < decided[0][0] < 5

    pair.take_over(batch_rows=2)

    assert [(owner, status) for _, owner, _, status in pair.owners()] == [("b", "QUEUED")] * 5
    assert pair.dead.rows("SELECT count(*) FROM recovery_event GROUP BY run") == [(1,)] * 5
    assert pair.stale_writes() == []


def test_a_takeover_whose_end_was_committed_unheard_is_complete(cut: Cut) -> None:
    pair = cut.pair
    pair.dead.create()
    pair.expire()
    cut.lose("SET takeover_done_at", lambda _: pair.take_over())

    assert dead_instances.find_dead(pair.db, pair.rules) == []
    assert pair.dead.rows(
        "SELECT taken_over_by, takeover_done_at IS NOT NULL FROM instance WHERE name = 'a'"
    ) == [("b", True)]


def test_a_run_that_was_taken_from_a_peer_unheard_is_started_by_its_new_owner_alone(
    cut: Cut,
) -> None:
    pair = cut.pair
    run = pair.dead.create()
    pair.dead.advance(2)
    taker = Taker(owner=pair.owner, engines=("demo",), shares_workspaces=False)
    cut.lose(
        "FOR UPDATE OF r SKIP LOCKED",
        lambda db: work_stealing.take_from(
            db, taker, "a", now=pair.dead.now, steady=pair.dead.steady
        ),
    )

    assert work_stealing.find_peer(pair.db, taker, now=pair.dead.now) is None
    assert pair.dead.take() is None
    turn = pair.dead.take(owner=pair.owner)

    assert turn is not None
    assert (turn.run.key, turn.run.attempt) == (run.key, 1)


def test_a_hand_over_that_was_committed_unheard_is_continued_with_the_rest(cut: Cut) -> None:
    pair = cut.pair
    for _ in range(5):
        pair.dead.create()

    def hand_two_over(db: Database) -> dict[str, int]:
        return dict(
            hand_over.hand_over(
                db, pair.dead.owner, shares_workspaces=False, now=pair.dead.now, rows=2
            )
        )

    cut.proxy.lose_answer_after("UPDATE webhook_delivery SET instance")
    with pytest.raises(StorageUnavailable):
        run_use_case(pair.dead.db, hand_two_over)
    assert cut.proxy.lost.is_set()

    assert run_use_case(pair.dead.db, hand_two_over) == {"b": 3}
    assert [owner for _, owner, _, _ in pair.owners()] == ["b"] * 5
