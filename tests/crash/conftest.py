"""Homes for tests that kill their service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.service import Home


@pytest.fixture
def new_home(tmp_path: Path) -> Iterator[Callable[..., Home]]:
    """Makes homes of the test's own, and clears them away."""
    homes: list[Home] = []

    def make(**settings: Any) -> Home:
        path = tmp_path / f"home-{len(homes)}"
        path.mkdir()
        homes.append(Home(path, **settings))
        return homes[-1]

    yield make
    for home in homes:
        home.clear()
