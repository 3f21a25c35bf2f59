"""Fixtures of the configuration tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import pytest
from runrecovery_service.config import reading
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import Settings

Load: TypeAlias = Callable[..., Settings]
Problems: TypeAlias = Callable[..., tuple[str, ...]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the settings of a file `runrecovery.toml`, with flags and an environment."""

    def load(
        toml: str = "",
        *,
        flags: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        path = tmp_path / "runrecovery.toml"
        path.write_text(toml, encoding="utf-8")
        return reading.load(path=path, flags=flags or {}, environ=environ or {})

    return load


@pytest.fixture
def problems(load: Load) -> Problems:
    """Loads settings that are refused, and returns the problems."""

    def problems(
        toml: str = "",
        *,
        flags: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as refused:
            load(toml, flags=flags, environ=environ)
        return refused.value.problems

    return problems
