"""The service's role in PostgreSQL lacks privileges, from the start or later."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import grpc
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from support.api import refused
from support.service import Home, ServiceProcess
from support.service_forker import run_command
from support.waiting import until


@pytest.fixture
def role(postgresql_url: str) -> Iterator[str]:
    """A role with the documented privileges."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgresql_url, autocommit=True) as server:
        server.execute(f"CREATE ROLE {name} LOGIN".encode())
        privileges = "SELECT, INSERT, UPDATE, DELETE"
        server.execute(f"GRANT {privileges} ON ALL TABLES IN SCHEMA public TO {name}".encode())
    yield name
    with psycopg.connect(postgresql_url, autocommit=True) as server:
        server.execute(f"DROP OWNED BY {name}".encode())
        server.execute(f"DROP ROLE {name}".encode())


@pytest.fixture
def home(postgresql_url: str, role: str, new_home: Callable[..., Home]) -> Home:
    """A home of services that connect as the role."""
    named = conninfo_to_dict(postgresql_url)
    url = f"postgresql://{role}@/{named['dbname']}?host={named['host']}"
    return new_home(database=url, lease_ttl_s=3.0)


def reasons(service: ServiceProcess) -> set[str]:
    """Return what the database has refused so far."""
    return {str(event["error"]) for event in service.events("storage.failed")}


@pytest.mark.parametrize(
    "revoked", ["INSERT ON run", "UPDATE ON run", "SELECT ON run", "INSERT ON trust_entry"]
)
def test_health_follows_the_privileges_of_the_role(
    home: Home, postgresql_url: str, role: str, revoked: str
) -> None:
    privilege, _, table = revoked.split()
    service, api = home.start()
    api.until_ended(api.create("resumable", {"steps": 1}, run_id="before").run_id)
    with psycopg.connect(postgresql_url, autocommit=True) as server:
        server.execute(f"REVOKE {revoked} FROM {role}".encode())
        until(lambda: api.health_of() == "NOT_SERVING", "health says that the work fails")
        until(lambda: any(table in one for one in reasons(service)), "the log names the table")
        if revoked in {"INSERT ON run", "SELECT ON run"}:  # a create updates nothing
            refusal = refused(lambda: api.create("resumable", {}))
            assert refusal.code is grpc.StatusCode.UNAVAILABLE
            assert refusal.reason == "STORAGE_UNAVAILABLE"
        server.execute(f"GRANT {revoked} TO {role}".encode())

    until(lambda: api.health_of() == "SERVING", "health says that the work can be done again")
    assert reasons(service) <= {
        f"the role '{role}' lacks {privilege} on the table `{table}`",
        f"permission denied for table {table}",
    }
    api.create("resumable", {"steps": 1}, run_id="after")
    api.until_ended("after")
    assert [event for event in service.events() if "exception" in event] == []
    assert service.stop() == 0


def test_a_start_and_a_check_name_the_missing_privilege(
    home: Home, postgresql_url: str, role: str
) -> None:
    with psycopg.connect(postgresql_url, autocommit=True) as server:
        server.execute(f"REVOKE UPDATE ON instance FROM {role}".encode())
    sentence = f"the PostgreSQL database: the role '{role}' lacks UPDATE on the table `instance`\n"

    service = home.spawn()
    checked = run_command("check", "--config", home.config, cwd=home.path)

    assert service.exit_code() == 4
    assert service.text == f"error: {sentence}"
    assert (checked.returncode, checked.stdout, checked.stderr) == (1, sentence, "")
