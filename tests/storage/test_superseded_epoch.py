"""Once a newer epoch is claimed, the older one writes nothing more."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from storage.every_write import WRITES, Prepared, content
from storage.service_store import ServiceStore, boot


@pytest.fixture
def prepared(store: ServiceStore) -> Prepared:
    return Prepared(store)


class _Undone(Exception):
    pass


def changes(prepared: Prepared, what: str) -> bool:
    """Return whether a write changes anything. The change is undone."""
    store, before = prepared.store, content(prepared.store)
    after = before
    with suppress(_Undone), store.db.transaction():
        WRITES[what](prepared)
        after = content(store)
        raise _Undone
    assert before == content(store)
    return before != after


@pytest.mark.parametrize("what", WRITES)
def test_no_write_of_a_superseded_epoch_changes_the_store(prepared: Prepared, what: str) -> None:
    store = prepared.store
    assert changes(prepared, what)
    store.db.guard(partial(instances.demand_current, owner=store.owner))
    of_the_next_start = Database(store.db.peewee, store.db.dialect, store.db.name)
    instances.claim(of_the_next_start, boot(), now=store.tick())
    before = content(store)

    with pytest.raises(Fenced):
        WRITES[what](prepared)

    assert before == content(store)


def test_a_check_of_the_epoch_counts_until_its_transaction_ends_or_undoes_a_step(
    store: ServiceStore,
) -> None:
    db, owner = store.db, store.owner
    with db.transaction():
        assert not db.is_known_current(owner)
        instances.demand_checked(db, owner)
        assert db.is_known_current(owner)
        assert not db.is_known_current(replace(owner, epoch=owner.epoch + 1))
        with pytest.raises(ZeroDivisionError), db.transaction():
            raise ZeroDivisionError
        assert not db.is_known_current(owner)
        instances.demand_checked(db, owner)
    with db.transaction():
        assert not db.is_known_current(owner)
