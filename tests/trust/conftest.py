"""Fixtures of the trust tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file in a folder of its own. It contains "old"."""
    path = tmp_path / "home" / "config.toml"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path
