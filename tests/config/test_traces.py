"""The table `[traces]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

Problems: TypeAlias = Callable[..., tuple[str, ...]]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('endpoint = "127.0.0.1:4318"', "endpoint: must begin with https:// or http://"),
        (
            'endpoint = "http://a:hidden@c"',
            "endpoint: must not hold a user or a password; headers come from the environment",
        ),
        ('endpoint = "http://c?x=hidden"', "endpoint: must not have a query (?…)"),
        (
            'endpoint = "http://c"\nsample_ratio = 1.5',
            "sample_ratio: must be a number from 0 to 1, not 1.5",
        ),
        (
            'endpoint = "http://c"\nsample_ratio = nan',
            "sample_ratio: must be a number from 0 to 1, not nan",
        ),
        (
            'endpoint = "http://c"\nsample_ratio = true',
            "sample_ratio: must be a number from 0 to 1, not true",
        ),
        ("sample_ratio = 1", "endpoint: is missing"),
    ],
)
def test_a_bad_table_is_refused_with_its_place_and_without_secrets(
    problems: Problems, lines: str, told: str
) -> None:
    (problem,) = problems(f"[traces]\n{lines}\n")

    assert problem.endswith(f"traces.{told}")
