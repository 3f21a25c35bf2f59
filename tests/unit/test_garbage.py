"""A start makes no garbage; a service that runs does."""

from __future__ import annotations

import asyncio
import gc
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from runrecovery_service import app


class Built:
    """Stands for the service that a start builds."""

    collects: bool | None = None

    async def run(self) -> None:
        self.collects = gc.isenabled()


def test_garbage_is_collected_from_the_moment_in_which_the_service_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = Built()
    monkeypatch.setattr(app, "SharedParts", lambda *_: SimpleNamespace(tracer=None))
    monkeypatch.setattr(app, "_service", lambda *_: built)
    arguments: list[Any] = [None] * len(inspect.signature(app._run).parameters)
    gc.disable()  # as `runrecovery serve` does
    try:
        asyncio.run(app._run(*arguments))

        assert built.collects
    finally:
        gc.enable()
        gc.unfreeze()
