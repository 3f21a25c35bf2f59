"""Fixtures of a service's store, and of a host with an agent CLI."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore, boot
from storage.trust_host import ORIGINAL, CliHost


@pytest.fixture
def store(database: Database) -> ServiceStore:
    """A store with the first epoch of instance `default`."""
    owner = instances.claim(database, boot(), now=datetime(2026, 11, 24, 11, tzinfo=UTC))
    return ServiceStore(db=database, owner=owner)


@pytest.fixture
def shared(store: ServiceStore) -> ServiceStore:
    """A store that many connections, and several instances, use at once."""
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("SQLite has one writer and one instance at a time")
    return store


@pytest.fixture
def new_store(
    new_database: Callable[[Path], Database], tmp_path: Path
) -> Callable[[], ServiceStore]:
    """Make stores, each with the first epoch of instance `default`."""
    numbers = itertools.count()

    def make() -> ServiceStore:
        db = new_database(tmp_path / f"store-{next(numbers)}")
        return ServiceStore(db=db, owner=instances.claim(db, boot(), now=ServiceStore.now))

    return make


@pytest.fixture
def host(store: ServiceStore, tmp_path: Path) -> CliHost:
    """A host whose Codex has a configuration file with text of the user."""
    made = CliHost(path=tmp_path / "codex", store=store)
    made.path.mkdir()
    made.file.write_bytes(ORIGINAL)
    return made
