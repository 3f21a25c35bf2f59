"""If a connection to PostgreSQL is cut around a COMMIT, the next try does the write once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.domain.usage import TurnUsage, Usage
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.use_case import run_use_case
from storage.every_write import ENDS, WRITES, Prepared, content
from storage.service_store import ServiceStore, boot
from storage.test_repeated_writes import settled
from support.pg_proxy import Proxy, proxied

Write = Callable[[Prepared], object]

USED: Final = TurnUsage(turn=Usage(input_tokens=7, output_tokens=3, model="m"))
OF_A_TURN: Final = [f"{type(end).__name__} turn" for end in ENDS]
CALLS: Final = ["reply", "cancel a queued run", "cancel a running run", "reopen"]
CASES: Final[dict[str, Write]] = {
    **{name: WRITES[name] for name in (*OF_A_TURN, *CALLS)},
    "a turn with usage": lambda p: p.store.end(p.gated, Succeeded({"x": 1}), used=USED),
}
NEXT_COMMIT: Final = "BEGIN"


@pytest.fixture
def database_kind() -> str:
    """PostgreSQL only, because SQLite has no connection that can be cut."""
    return "postgresql"


@dataclass
class Cut:
    """A store whose connection leads through a proxy."""

    prepared: Prepared
    proxy: Proxy

    def fails(self, write: Write) -> None:
        """Try a write whose connection is cut."""
        with pytest.raises(StorageUnavailable):
            self.write(write)
        assert self.proxy.lost.is_set()

    def write(self, write: Write) -> None:
        """Try a write once, as the service does."""
        run_use_case(self.prepared.store.db, lambda _: write(self.prepared))


def prepare(db: Database) -> Prepared:
    """Return runs in every situation, and add a webhook that gets all of their later events."""
    owner = instances.claim(db, boot(), now=ServiceStore.now)
    prepared = Prepared(ServiceStore(db=db, owner=owner))
    db.webhooks = (WebhookFilter(name="w", events=frozenset(WebhookEvent)),)
    return prepared


def outcome(prepared: Prepared) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the store, without the columns that differ between two tries."""
    return settled(content(prepared.store) | prepared.store.dump("webhook_delivery"))


@pytest.fixture
def cut(postgresql_url: str, tmp_path: Path) -> Iterator[Cut]:
    with proxied(postgresql_url) as proxy:
        db = open_database(proxy.url, tmp_path)
        try:
            yield Cut(prepare(db), proxy)
        finally:
            db.close()


@pytest.mark.parametrize("name", CASES)
def test_a_write_whose_commit_was_not_answered_is_not_done_twice(
    cut: Cut, database: Database, name: str
) -> None:
    write, undisturbed = CASES[name], prepare(database)
    write(undisturbed)

    cut.proxy.lose_answer_after(NEXT_COMMIT)
    cut.fails(write)
    assert outcome(cut.prepared) == outcome(undisturbed)
    cut.write(write)

    assert outcome(cut.prepared) == outcome(undisturbed)


@pytest.mark.parametrize("name", CASES)
def test_a_write_whose_commit_never_arrived_is_done_by_the_next_try(
    cut: Cut, database: Database, name: str
) -> None:
    write, undisturbed = CASES[name], prepare(database)
    before = outcome(cut.prepared)
    write(undisturbed)
    assert before != outcome(undisturbed)

    cut.proxy.lose_commit_after(NEXT_COMMIT)
    cut.fails(write)
    assert outcome(cut.prepared) == before
    cut.write(write)

    assert outcome(cut.prepared) == outcome(undisturbed)
