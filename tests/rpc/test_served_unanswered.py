"""Health means that the statements of the work answer, not only the renewal of the lease."""

from __future__ import annotations

from collections.abc import Callable

from support.service import Home, until

NewHome = Callable[..., Home]


def test_health_follows_the_statements_of_the_work(new_home: NewHome) -> None:
    home = new_home(lease_ttl_s=3.0)
    service, api = home.start()

    with home.store(writable=True) as store:  # only a launch needs this table
        store.execute("ALTER TABLE process_lease RENAME TO elsewhere")
    api.create("resumable", {}, run_id="queued")  # is accepted
    until(lambda: api.health_of() == "NOT_SERVING", "health says that the database fails")
    told = service.until_event("service.statements_failed")
    renewals_failed = service.events("service.lease_not_renewed")
    with home.store(writable=True) as store:
        store.execute("ALTER TABLE elsewhere RENAME TO process_lease")
    until(lambda: api.health_of() == "SERVING", "health says that the database answers again")

    assert told["times"] == 1
    assert renewals_failed == []
    api.until_ended("queued")
    assert service.stop() == 0
