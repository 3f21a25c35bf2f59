"""Fixtures of all folders: real databases, whole services, and a search for defects.

A test that takes `database` runs on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest
import structlog
import uvloop
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from support.defects import defect_in
from support.migrated_store import copy_migrated_store
from support.postgres_pool import PostgresPool
from support.service import Home
from support.waiting import until

from bench.postgres import START_S, ScratchPostgres, memory_place, start_keeper

# All workers share one server: databases are named by worker, and connections are enough for all.
# Durability is PostgreSQL's own; without it the tests need a fraction of the time. Its log may be
# in memory.
_SETTINGS: Final = (
    "max_connections=400",
    "fsync=off",
    "full_page_writes=off",
    "max_wal_size=256MB",
    "autovacuum=off",
)
_WORKER: Final = os.environ.get("PYTEST_XDIST_WORKER", "main")
_NAMES: Final = (f"{_WORKER}_{number}" for number in itertools.count(1))
_TEMPLATE: Final = f"{_WORKER}_migrated"
# Whoever runs the tests by `nohup` or in the background of a script ignores these, and all that
# they start would.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of an example depends on the load of the machine, so no test fails because of it.
hypothesis.settings.register_profile(
    "any load",
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    # A change is judged by the same examples each time. `make explore` tries other ones.
    derandomize=True,
)
hypothesis.settings.register_profile(
    "explore",
    hypothesis.settings.get_profile("any load"),
    max_examples=1000,
    derandomize=False,
)
hypothesis.settings.load_profile("any load")

# The tests start some hundred Python processes, which shall not compile the same modules each time:
# they keep the compiled ones, as pip does where it installs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tests are not in UTC: a time that is read or written in the zone of the machine is then another
# one. This form needs no database of time zones.
os.environ["TZ"] = "TEST-05:45"
time.tzset()

# By default, structlog prints an exception with the values of all variables, which takes a second.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

_KEEPER: Final = pytest.StashKey[subprocess.Popen[bytes]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    """Start the server that all workers share, in their controller."""
    if _wanted_file(node.config).exists():
        _start_postgres(node.config)


@pytest.hookimpl(tryfirst=True)  # before xdist reports the collection to the controller
def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server if a test wants it; a worker leaves that to its controller."""
    if not any(map(_wants_postgres, session.items)):
        return
    if hasattr(session.config, "workerinput"):
        _wanted_file(session.config).touch()
    else:
        _start_postgres(session.config)


def _wants_postgres(item: pytest.Item) -> bool:
    """Return whether a test uses the shared server, by its fixtures and their parameters."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return "_postgres" in getattr(item, "fixturenames", ()) or "postgresql" in parameters


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the server. If this process is killed instead, the server's keeper ends the server."""
    if keeper := config.stash.get(_KEEPER, None):
        keeper.communicate()


def _start_postgres(config: pytest.Config) -> None:
    if _KEEPER not in config.stash:
        with _folder_file(config).open("wb") as output:
            config.stash[_KEEPER] = start_keeper(_SETTINGS, output, place=memory_place())


def _wanted_file(config: pytest.Config) -> Path:
    """Return the file by which a worker tells its controller that a test wants the server."""
    return _folder_file(config).with_name("postgres-wanted")


def _folder_file(config: pytest.Config) -> Path:
    """Return the file that names the server's folder; all workers know the file."""
    own: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return (own.parent if hasattr(config, "workerinput") else own) / "postgres"


@pytest.fixture(scope="session")
def _postgres(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> ScratchPostgres:
    """The session's server. What a test does to a whole server, it does to one of its own."""
    file = _folder_file(pytestconfig)
    folder = until(file.read_text, "PostgreSQL answers", timeout_s=START_S)
    server = ScratchPostgres(Path(folder.rstrip("\n")))
    open_database(server.create(_TEMPLATE), tmp_path_factory.mktemp("template")).close()
    return server


@pytest.fixture(scope="session")
def _postgres_pool(_postgres: ScratchPostgres) -> Iterator[PostgresPool]:
    """Databases for tests of this process, one after another."""
    pool = PostgresPool(_postgres, _NAMES, _TEMPLATE)
    yield pool
    pool.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """The database of a test that runs on both."""
    return str(request.param)


@pytest.fixture
def new_database_url(
    request: pytest.FixtureRequest, database_kind: str
) -> Iterator[Callable[[], str]]:
    """Make stores; the URL of a SQLite one is empty: it lies in the data directory.

    A PostgreSQL database is new and serves this test only, whatever the test does to it.
    """
    if database_kind == "sqlite":
        yield lambda: ""
        return
    server: ScratchPostgres = request.getfixturevalue("_postgres")
    made: list[str] = []

    def make() -> str:
        made.append(next(_NAMES))
        return server.create(made[-1], template=_TEMPLATE)

    yield make
    for name in made:
        server.drop(name)


@pytest.fixture
def postgresql_url(_postgres: ScratchPostgres) -> Iterator[str]:
    """The URL of an empty PostgreSQL store."""
    name = next(_NAMES)
    yield _postgres.create(name, template=_TEMPLATE)
    _postgres.drop(name)


@pytest.fixture
def empty_database_url(request: pytest.FixtureRequest, database_kind: str) -> Iterator[str]:
    """The URL of a store that no version has been in yet."""
    if database_kind == "sqlite":
        yield ""
        return
    server: ScratchPostgres = request.getfixturevalue("_postgres")
    name = next(_NAMES)
    yield server.create(name)
    server.drop(name)


@pytest.fixture(autouse=True)
def no_defects(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which an edge of the service caught a defect and went on.

    `expects_defects(*names)` marks a test that causes some.
    """
    found: list[str] = []

    def note(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        if (defect := defect_in(event)) is not None:
            found.append(f"{defect} in {event['event']}")
        return event

    before = structlog.get_config()
    structlog.configure(processors=[note, *before["processors"]])
    yield
    structlog.configure(**before)  # all of it: some tests run what configures the log
    marker = request.node.get_closest_marker("expects_defects")
    expected = () if marker is None else marker.args
    assert [one for one in found if one.split()[0] not in expected] == []


@pytest.fixture
def new_home(tmp_path: Path) -> Iterator[Callable[..., Home]]:
    """Make homes in which services start. At the end of the test, clear each home."""
    homes: list[Home] = []

    def make(**settings: Any) -> Home:
        path = tmp_path / f"home-{len(homes)}"
        path.mkdir()
        homes.append(Home(path, **settings))
        return homes[-1]

    yield make
    for home in homes:
        home.clear()


@pytest.fixture
def new_database(
    request: pytest.FixtureRequest, database_kind: str
) -> Iterator[Callable[[Path], Database]]:
    """Open migrated stores without a row, each for a data directory."""
    with ExitStack() as stack:

        def make(folder: Path) -> Database:
            url = ""
            if database_kind == "sqlite":
                copy_migrated_store(folder)
            else:
                pool: PostgresPool = request.getfixturevalue("_postgres_pool")
                url = stack.enter_context(pool.database())
            db = open_database(url, folder)
            stack.callback(db.close)
            return db

        yield make


@pytest.fixture
def database(new_database: Callable[[Path], Database], tmp_path: Path) -> Database:
    """An open, empty store."""
    return new_database(tmp_path)


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What the service does on its loop is tried on the loop that it has in production."""
    if item.path.parent.name in {"execution", "over_http", "webhooks"}:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
