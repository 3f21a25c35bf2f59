"""Fixtures of the engine tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sessions import PRESETS, StoredSession


@pytest.fixture(params=PRESETS)
def session(request: pytest.FixtureRequest, tmp_path: Path) -> StoredSession:
    """A whole session, once in the agent home of each CLI."""
    return StoredSession.write(request.param, tmp_path.resolve())
