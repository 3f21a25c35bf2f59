"""PgBouncer in front of the tests' PostgreSQL server, where PgBouncer is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from support.waiting import until

PROGRAM: Final = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")

# Those of docs/postgresql.md that are not the server's defaults anyway.
NEEDED: Final = {
    "TimeZone": "UTC",
    "statement_timeout": "60s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "5s",
}


def set_what_is_needed(url: str, *, but: str = "") -> None:
    """Set the settings that the service needs on the test's database, except `but`."""
    name = str(conninfo_to_dict(url)["dbname"])
    with psycopg.connect(url, autocommit=True) as connection:
        for setting, value in NEEDED.items():
            statement = sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                sql.Identifier(name),
                sql.Identifier(setting),
                sql.Literal("0" if setting == but else value),
            )
            connection.execute(statement)


@contextmanager
def pooled(url: str, folder: Path, **settings: object) -> Iterator[str]:
    """Run PgBouncer for a `with` block; return the database's URL through it."""
    assert PROGRAM is not None
    named = conninfo_to_dict(url)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fixed = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
    }
    lines = [f"{name} = {value}" for name, value in {**fixed, **settings}.items()]
    config = folder / "pgbouncer.ini"
    target = " ".join(
        f"{name}={named[name]}" for name in ("host", "port", "user", "dbname") if name in named
    )
    config.write_text("\n".join(["[databases]", f"pooled = {target}", "[pgbouncer]", *lines, ""]))
    # It refuses to run as root. As `nobody` it reads its configuration from standard input.
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    with config.open("rb") as given, (folder / "pgbouncer.log").open("wb") as output:
        process = subprocess.Popen(
            [PROGRAM, "/dev/stdin"],
            stdin=given,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            user=None if account is None else account.pw_uid,
            group=None if account is None else account.pw_gid,
            extra_groups=None if account is None else (),
        )
    try:
        pooled_url = f"postgresql://postgres@127.0.0.1:{port}/pooled"

        def answers() -> bool:
            assert process.poll() is None, (folder / "pgbouncer.log").read_text()
            try:
                psycopg.connect(pooled_url).close()
            except psycopg.OperationalError:
                return False
            return True

        until(answers, "PgBouncer answers")
        yield pooled_url
    finally:
        process.kill()
        process.wait()
