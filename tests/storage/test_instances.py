"""Epochs only rise, and one name is held by one service."""

from __future__ import annotations

from functools import partial

import pytest
from runrecovery_service.domain.errors import Fenced, Held
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner

from .conftest import World, boot


def test_every_start_takes_the_next_epoch(world: World) -> None:
    assert [world.restart().epoch, world.restart().epoch] == [2, 3]


def test_names_have_epochs_of_their_own(world: World) -> None:
    world.restart()

    assert Owner("other", 1) == instances.claim(world.db, boot("other"), now=world.now)


@pytest.mark.parametrize("change", [{"host_id": "elsewhere"}, {"data_dir": "/other"}])
def test_a_live_lease_is_held_against_another_place(world: World, change: dict[str, str]) -> None:
    before = world.dump("instance")

    with pytest.raises(Held) as held:
        instances.claim(world.db, boot(**change), now=world.now)

    assert "pid 7 on host host" in str(held.value)
    assert before == world.dump("instance")


def test_a_lease_that_was_given_up_is_free_for_every_place(world: World) -> None:
    instances.resign(world.db, world.owner)

    assert instances.claim(world.db, boot(host_id="elsewhere"), now=world.now).epoch == 2


def test_a_renewed_lease_holds_and_an_older_epoch_is_fenced(world: World) -> None:
    instances.resign(world.db, world.owner)
    instances.renew(world.db, world.owner)
    with pytest.raises(Held):
        instances.claim(world.db, boot(host_id="elsewhere"), now=world.now)
    old = world.owner
    world.restart()

    for refused in (instances.renew, instances.demand_current):
        with pytest.raises(Fenced):
            refused(world.db, old)
    instances.demand_current(world.db, world.owner)


def test_an_older_epoch_cannot_give_up_a_newer_ones_lease(world: World) -> None:
    old = world.owner
    world.restart()

    instances.resign(world.db, old)

    with pytest.raises(Held):
        instances.claim(world.db, boot(host_id="elsewhere"), now=world.now)


def test_starts_at_once_get_epochs_of_their_own(world: World) -> None:
    use = partial(instances.claim, world.db, boot(), now=world.now)

    claimed = world.all_at_once([use] * 12, threads=12)

    assert list(range(2, 14)) == sorted(o.epoch for o in claimed if isinstance(o, Owner))


def test_first_starts_at_once_get_epochs_of_their_own_or_are_refused(world: World) -> None:
    use = partial(instances.claim, world.db, boot("new"), now=world.now)

    claimed = world.all_at_once([use] * 12, threads=12)

    epochs = sorted(owner.epoch for owner in claimed if isinstance(owner, Owner))
    assert list(range(1, len(epochs) + 1)) == epochs
    assert {Owner, Held} >= {type(answer) for answer in claimed}


def test_the_lease_ends_by_the_clock_of_the_database(database: Database, world: World) -> None:
    row = database.fetch_one(f"SELECT lease_until - {database.dialect.now_us} FROM instance")  # noqa: S608

    assert row is not None
    assert 0 < row[0] <= instances.LEASE_TTL_S * 1e6
