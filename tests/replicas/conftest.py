"""A dead instance and its successor, on one PostgreSQL database."""

from __future__ import annotations

import pytest
from replicas.dead_instance import Pair, make_pair
from runrecovery_service.storage.database import Database


@pytest.fixture(params=["postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Only PostgreSQL has several instances."""
    return str(request.param)


@pytest.fixture
def pair(database: Database) -> Pair:
    """Instance `a`, whose lease runs out at `expire`, and instance `b`."""
    return make_pair(database)
