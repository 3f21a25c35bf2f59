"""One service that all tests of a module share, and that none of them stops.

A test that starts its own service takes `new_home` of tests/conftest.py. Tests of what a service
finds after it was killed, stopped or replaced are in tests/crash.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.api import Api
from support.engines import AGENTS, GOOD_ENGINES, agent
from support.service import Home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home with the good engines and every engine of tests/agents."""
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
