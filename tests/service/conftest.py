"""One started service for all tests of a module that only look at it or make runs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.service import AGENTS, GOOD_ENGINES, Api, Home, agent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home whose engines are the good ones and every one of tests/agents."""
    bad = {path.stem: agent(path.stem) for path in sorted(AGENTS.glob("*.py"))}
    engines = {**GOOD_ENGINES, **bad}
    path = tmp_path_factory.mktemp("served")
    with Home(path, engines=engines, exit_grace_s=0.5, max_concurrent=6) as home:
        yield home


@pytest.fixture(scope="module")
def api(home: Home) -> Api:
    """A channel to the module's service."""
    _, api = home.start()
    return api


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
