"""The latest renewal of an instance is in its row, until the database loses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runrecovery_service.storage import instances
from runrecovery_service.storage.instances import Renewal
from storage.service_store import ServiceStore

RENEWED = Renewal(instance="a", epoch=7, started_us=1000, lease_until_us=5000)
STOPPED = Renewal(instance="a", epoch=7, started_us=1000, stopped_us=4000)


@pytest.mark.parametrize(
    ("noted", "found", "is_kept"),
    [
        (RENEWED, RENEWED, True),
        (RENEWED, replace(RENEWED, lease_until_us=5001), True),  # renewed, and not noted
        (RENEWED, STOPPED, True),  # stopped, and not noted
        (RENEWED, replace(RENEWED, epoch=8), True),  # taken over
        (RENEWED, replace(RENEWED, epoch=8, started_us=2000), True),  # started elsewhere
        (RENEWED, replace(RENEWED, lease_until_us=4999), False),
        (RENEWED, replace(RENEWED, epoch=8, lease_until_us=4999), False),  # and then taken over
        (RENEWED, replace(RENEWED, epoch=6, started_us=900), False),  # the claim is lost too
        (RENEWED, replace(RENEWED, epoch=7, started_us=900), False),  # and then taken over
        (RENEWED, None, False),
        (STOPPED, STOPPED, True),
        (STOPPED, replace(STOPPED, epoch=8), True),
        (STOPPED, RENEWED, False),  # the stop is lost
        (STOPPED, replace(STOPPED, stopped_us=3999), False),
    ],
)
def test_a_row_behind_the_noted_renewal_has_lost_it(
    noted: Renewal, found: Renewal | None, *, is_kept: bool
) -> None:
    assert noted.is_kept_by(found) is is_kept


def test_the_row_of_an_instance_has_its_latest_renewal_and_its_stop(store: ServiceStore) -> None:
    assert instances.latest_renewal(store.db, "never started") is None

    lease_until_us = instances.renew(store.db, store.owner)
    renewed = instances.latest_renewal(store.db, "default")
    stopped_us = instances.resign(store.db, store.owner)
    stopped = instances.latest_renewal(store.db, "default")

    assert renewed is not None
    assert stopped_us is not None
    assert (renewed.epoch, renewed.lease_until_us) == (1, lease_until_us)
    assert stopped == replace(renewed, lease_until_us=0, stopped_us=stopped_us)
