"""A connection that replaces a lost one never leads to a standby, whose rows may be old."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psycopg
import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.use_case import run_use_case
from support.pg_proxy import proxied
from support.waiting import until

from bench.postgres import memory_place, run_postgres, run_standby

READ_ONLY: Final = "is read-only"


def role_of_the_server(db: Database) -> Row | None:
    """Return whether the server is a standby."""
    return db.fetch_one("SELECT pg_is_in_recovery()")


@pytest.mark.timeout(300)
def test_a_read_after_a_reconnect_is_refused_by_a_standby_until_it_is_promoted(
    tmp_path: Path,
) -> None:
    with run_postgres("fsync=off", place=memory_place()) as primary:
        url = primary.create("runs")
        with run_standby(primary, "fsync=off") as standby, proxied(url) as proxy:
            db = open_database(proxy.url, tmp_path)

            def role() -> Row | StorageUnavailable | None:
                try:
                    return run_use_case(db, role_of_the_server)
                except StorageUnavailable as error:
                    return error

            def is_refused() -> bool:
                found = role()
                assert found != (True,)
                return isinstance(found, StorageUnavailable) and READ_ONLY in str(found.cause)

            try:
                assert role() == (False,)
                proxy.direct_to(standby.url("runs"))
                until(is_refused, "the standby is refused")
                with psycopg.connect(standby.url("runs"), autocommit=True) as server:
                    server.execute("SELECT pg_promote()")
                until(lambda: role() == (False,), "the promoted standby answers")
            finally:
                db.close()
