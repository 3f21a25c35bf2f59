"""A start and `check` report the same missing rights of the service's PostgreSQL role."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage.opening import open_database, postgresql_problems
from runrecovery_service.storage.tables import EVERY

from bench.postgres import ScratchPostgres


def administer(url: str, *statements: str) -> None:
    """Run statements in a database, each by itself."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture
def role(postgresql_url: str) -> Iterator[str]:
    """A role that owns nothing."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    administer(postgresql_url, f"CREATE ROLE {name} LOGIN")
    yield name
    administer(postgresql_url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@pytest.fixture
def empty_url(_postgres: ScratchPostgres, role: str) -> Iterator[str]:
    """A URL of a database without tables, with the role that owns the server."""
    name = f"of_{role}"
    url = _postgres.create(name)
    yield url
    administer(url, f"DROP OWNED BY {role}")
    _postgres.drop(name)


def url_of(role: str, url: str, more: str = "") -> str:
    """Return the URL of the same database for another role."""
    named = conninfo_to_dict(url)
    return f"postgresql://{role}@/{named['dbname']}?host={named['host']}{more}"


def refused_alike(url: str, directory: Path) -> str:
    """Return why a start on this database is refused, and demand that `check` reports the same."""
    found = postgresql_problems(url)
    with pytest.raises(DatabaseRefused) as refused:
        open_database(url, directory).close()

    assert found == [str(refused.value)]
    assert not list(directory.iterdir())
    return refused.value.reason


# -- a database without tables -------------------------------------------------------------------


def test_a_role_that_may_not_create_tables_is_refused(
    empty_url: str, role: str, tmp_path: Path
) -> None:
    reason = refused_alike(url_of(role, empty_url), tmp_path)

    assert reason == (
        f"the role '{role}' may not create tables in the schema `public`"
        " (GRANT CREATE ON SCHEMA public TO …)"
    )
    administer(empty_url, f"GRANT CREATE ON SCHEMA public TO {role}")
    assert postgresql_problems(url_of(role, empty_url)) == []
    open_database(url_of(role, empty_url), tmp_path).close()


def test_a_role_without_usage_of_its_schema_is_refused(
    empty_url: str, role: str, tmp_path: Path
) -> None:
    administer(empty_url, "REVOKE ALL ON SCHEMA public FROM public")

    assert refused_alike(url_of(role, empty_url), tmp_path) == (
        f"the search_path (\"$user\", public) has no schema that the role '{role}' may use"
        " (GRANT USAGE ON SCHEMA …)"
    )


def test_a_search_path_without_a_schema_is_refused(postgresql_url: str, tmp_path: Path) -> None:
    url = f"{postgresql_url}&options=-csearch_path%3Dnowhere"

    assert refused_alike(url, tmp_path) == (
        "the search_path (nowhere) has no schema that the role 'postgres' may use"
        " (GRANT USAGE ON SCHEMA …)"
    )


@pytest.mark.parametrize("name", ["run", "trust_entry"])
def test_a_table_of_another_owner_is_refused(empty_url: str, tmp_path: Path, name: str) -> None:
    administer(empty_url, f"CREATE TABLE {name} (x int)")

    assert refused_alike(empty_url, tmp_path) == f"has a table `{name}` that is not of runrecovery"


# -- a database with the service's tables ----------------------------------------------------------


def test_a_role_that_owns_nothing_is_refused(
    postgresql_url: str, role: str, tmp_path: Path
) -> None:
    assert refused_alike(url_of(role, postgresql_url), tmp_path) == (
        f"the role '{role}' lacks SELECT on the table `migration_checksum`"
    )


def test_a_role_with_the_documented_privileges_is_accepted(
    postgresql_url: str, role: str, tmp_path: Path
) -> None:
    names = ", ".join(table._meta.table_name for table in EVERY)
    administer(
        postgresql_url,
        f"GRANT SELECT ON schema_migration, migration_checksum TO {role}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON {names} TO {role}",
    )

    assert postgresql_problems(url_of(role, postgresql_url)) == []
    open_database(url_of(role, postgresql_url), tmp_path).close()


@pytest.mark.parametrize(
    ("revoked", "reason"),
    [
        ("SELECT ON quarantine", "SELECT on the table `quarantine`"),
        ("INSERT, UPDATE ON run", "INSERT, UPDATE on the table `run`"),
        ("DELETE ON webhook_delivery", "DELETE on the table `webhook_delivery`"),
    ],
)
def test_a_start_reports_each_missing_privilege(
    postgresql_url: str, role: str, tmp_path: Path, revoked: str, reason: str
) -> None:
    administer(
        postgresql_url,
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        f"REVOKE {revoked} FROM {role}",
    )

    found = refused_alike(url_of(role, postgresql_url), tmp_path)

    assert found == f"the role '{role}' lacks {reason}"


def test_a_start_reports_a_migration_that_only_the_tables_owner_can_do(
    postgresql_url: str, role: str, tmp_path: Path
) -> None:
    administer(
        postgresql_url,
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT ALL ON SCHEMA public TO {role}",
        "DELETE FROM schema_migration WHERE name = (SELECT max(name) FROM schema_migration)",
    )

    assert refused_alike(url_of(role, postgresql_url), tmp_path) == (
        f"the table `migration_checksum` belongs to another role than '{role}', and only its owner"
        " can migrate it"
    )


def test_a_start_reports_a_missing_table(postgresql_url: str, tmp_path: Path) -> None:
    administer(postgresql_url, "DROP TABLE run_label")

    assert (
        refused_alike(postgresql_url, tmp_path) == "the table `run_label` is gone; restore a backup"
    )


def test_a_member_of_the_owners_role_is_accepted(
    postgresql_url: str, role: str, tmp_path: Path
) -> None:
    administer(postgresql_url, f"GRANT postgres TO {role}")

    assert postgresql_problems(url_of(role, postgresql_url)) == []
    open_database(url_of(role, postgresql_url), tmp_path).close()
