"""Real databases: every test that takes `database` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from runrecovery_service.storage.database import Database, open_database

from bench.postgres import ScratchPostgres, scratch_postgres

_NAMES = itertools.count(1)
_TEMPLATE = "migrated"


@pytest.fixture(scope="session")
def _postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScratchPostgres]:
    """A server of this worker, started by the first test that needs it."""
    with scratch_postgres() as server:
        # Durability is PostgreSQL's own; without it the tests need a fraction of the time.
        server.set_up(fsync="off", full_page_writes="off")
        open_database(server.create(_TEMPLATE), tmp_path_factory.mktemp("template")).close()
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database_url(request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Make stores; the URL of a SQLite one is empty: it lies in the data directory."""
    if request.param == "sqlite":
        yield lambda: ""
        return
    server: ScratchPostgres = request.getfixturevalue("_postgres")
    made: list[str] = []

    def make() -> str:
        made.append(f"test{next(_NAMES)}")
        return server.create(made[-1], template=_TEMPLATE)

    yield make
    for name in made:
        server.drop(name)


@pytest.fixture
def postgresql_url(_postgres: ScratchPostgres) -> Iterator[str]:
    """The URL of an empty PostgreSQL store."""
    name = f"test{next(_NAMES)}"
    yield _postgres.create(name, template=_TEMPLATE)
    _postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a store that no version has been in yet."""
    if request.param == "sqlite":
        yield ""
        return
    server: ScratchPostgres = request.getfixturevalue("_postgres")
    name = f"test{next(_NAMES)}"
    yield server.create(name)
    server.drop(name)


@pytest.fixture
def database(new_database_url: Callable[[], str], tmp_path: Path) -> Iterator[Database]:
    """An open, empty store."""
    db = open_database(new_database_url(), tmp_path)
    yield db
    db.close()


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What the service does on its loop is tried on the loop that it has in production."""
    if "execution" in item.path.parts:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
