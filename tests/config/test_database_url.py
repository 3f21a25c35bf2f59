"""The URL of the database contains a password, which is never shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from runrecovery_service.config.settings import Settings

Problems: TypeAlias = Callable[..., tuple[str, ...]]

PASSWORD = "hunter2"  # noqa: S105 - must be found nowhere


SECRET_URLS = [
    f"postgresql://user:{PASSWORD}@host:5432/db",
    f"postgresql://user:{PASSWORD}/@:?{PASSWORD}@host/db",
    f"postgresql://user:first@{PASSWORD}@host/db",
    f"postgresql://user@host/db?password={PASSWORD}",
    f"postgresql://user:x@host/db?sslpassword={PASSWORD}&a=b@c",
    f"postgresql://:{PASSWORD}@/db?host=/run",
    f"mysql://user:{PASSWORD}@host/db",
    f"user:{PASSWORD}@host/db",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_the_password_of_a_database_url_is_never_shown(url: str) -> None:
    settings = Settings(database=url, database_direct=url)

    assert PASSWORD not in repr(settings) + str(settings)


@pytest.mark.parametrize("url", SECRET_URLS[-2:])
def test_the_password_of_a_refused_database_url_is_never_shown(
    problems: Problems, url: str
) -> None:
    keys = ("database", "database_direct")
    found = problems(
        "\n".join(f"{key} = '{url}'" for key in keys),
        environ={f"RUNRECOVERY_{key.upper()}": url for key in keys},
    )

    assert len(found) == 4
    assert PASSWORD not in "".join(found)
