"""Health is SERVING only while the store answers the statements that runs need."""

from __future__ import annotations

from collections.abc import Callable

from support.service import Home
from support.stores import change
from support.waiting import until

NewHome = Callable[..., Home]


def test_health_follows_the_statements_that_runs_need(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    home = new_home(database=new_database_url(), lease_ttl_s=3.0)
    service, api = home.start()

    change(home, "ALTER TABLE process_lease RENAME TO elsewhere")  # only a launch needs it
    until(lambda: api.health_of() == "NOT_SERVING", "health says that the database fails")
    told = service.until_event("service.statements_failed")
    api.create("resumable", {}, run_id="queued")  # is accepted
    renewals_failed = service.events("service.lease_not_renewed")
    change(home, "ALTER TABLE elsewhere RENAME TO process_lease")
    until(lambda: api.health_of() == "SERVING", "health says that the database answers again")

    assert told["times"] == 1
    assert renewals_failed == []
    api.until_ended("queued")
    assert service.stop() == 0
