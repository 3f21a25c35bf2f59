"""Runs blocking work in a thread pool, so that the event loop does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

R = TypeVar("R")


async def run_blocking(threads: Executor, do: Callable[..., R], *args: object) -> R:
    """Run `do(*args)` in one of the threads, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(threads, do, *args)
