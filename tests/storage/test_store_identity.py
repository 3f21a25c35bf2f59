"""Keys that are derived from the id of a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from runrecovery_service.domain.start_errors import DatabaseOutOfReach
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.store_identity import store_id, store_key
from support.pg_proxy import proxied


def test_a_key_is_made_from_the_id_of_the_store_and_the_purpose(
    new_database: Callable[[Path], Database], tmp_path: Path
) -> None:
    first, second = new_database(tmp_path / "first"), new_database(tmp_path / "second")
    for db, new in ((first, "a" * 32), (first, "c" * 32), (second, "b" * 32)):
        store_id(db, new=new)

    keys = [store_key(first, "x"), store_key(first, "y"), store_key(second, "x")]
    assert [len(key) for key in keys] == [32, 32, 32]
    assert len(set(keys)) == 3
    assert store_key(first, "x") == keys[0]


def test_a_store_without_an_id_has_no_key(database: Database) -> None:
    with pytest.raises(LookupError, match="the store has no id"):
        store_key(database, "x")


def test_a_start_that_loses_its_database_before_it_has_a_key_is_refused_and_may_be_repeated(
    postgresql_url: str, tmp_path: Path
) -> None:
    with proxied(postgresql_url) as proxy:
        db = open_database(proxy.url, tmp_path)
        db.close()  # as after the claim of the epoch
        proxy.refusing = True

        with pytest.raises(DatabaseOutOfReach, match="the PostgreSQL database"):
            store_key(db, "x")
