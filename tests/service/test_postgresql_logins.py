"""A PostgreSQL server that does not let the service in: a start and `check` say why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from support.service import Home
from support.service_forker import run_command

from bench.postgres import ScratchPostgres, memory_place, scratch_postgres

HBA = """
local all postgres trust
local runs scram scram-sha-256
local runs md5 md5
local runs rejected reject
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ScratchPostgres]:
    """A server with roles whose password is `right`."""
    with scratch_postgres("fsync=off", place=memory_place()) as server:
        server.create("runs")
        with psycopg.connect(server.url("runs"), autocommit=True) as connection:
            for role in ("scram", "rejected", "unlisted"):
                connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'right'".encode())
            connection.execute("SET password_encryption = 'md5'")
            connection.execute("CREATE ROLE md5 LOGIN PASSWORD 'right'")
            connection.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
            (server.folder / "data" / "pg_hba.conf").write_text(HBA)
            connection.execute("SELECT pg_reload_conf()")
        yield server


def check(home: Home) -> tuple[int, str, str]:
    """Run `check`; return its exit code and both outputs."""
    done = run_command("check", "--config", home.config, cwd=home.path)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("role", ["scram", "md5"])
def test_a_role_with_its_password_is_let_in(
    new_home: Callable[..., Home], server: ScratchPostgres, role: str
) -> None:
    home = new_home(database=f"postgresql://{role}:right@/runs?host={server.folder}")

    assert check(home) == (0, "no problem found\n", "")


@pytest.mark.parametrize(
    ("login", "words"),
    [
        ("scram:wrong", 'password authentication failed for user "scram"'),
        ("md5:wrong", 'password authentication failed for user "md5"'),
        ("scram", "fe_sendauth: no password supplied"),
        (
            "rejected:right",
            (
                'pg_hba.conf rejects connection for host "[local]", user "rejected",'
                ' database "runs", no encryption'
            ),
        ),
        (
            "unlisted:right",
            (
                'no pg_hba.conf entry for host "[local]", user "unlisted",'
                ' database "runs", no encryption'
            ),
        ),
    ],
    ids=["scram", "md5", "no password", "rejected", "unlisted"],
)
def test_a_login_that_is_refused_is_exit_6_and_said_in_one_sentence(
    new_home: Callable[..., Home], server: ScratchPostgres, login: str, words: str
) -> None:
    home = new_home(database=f"postgresql://{login}@/runs?host={server.folder}")
    fatal = "" if words.startswith("fe_") else "FATAL: "
    sentence = (
        "the PostgreSQL database: connection failed: connection to server on socket"
        f' "{server.folder}/.s.PGSQL.5432" failed: {fatal}{words};'
        " correct the cause named here, or start again\n"
    )

    service = home.spawn()

    assert service.exit_code() == 6, service.text
    assert service.text == f"error: {sentence}"
    assert check(home) == (1, sentence, "")
