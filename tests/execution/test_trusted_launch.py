"""A launch waits for the busy trust file of its CLI while its run is wanted, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from runrecovery_service.agents.trust_keeper import TrustKeeper
from runrecovery_service.clock import Clock
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.storage import runs
from runrecovery_service.trust.errors import TrustFileBusy

from .conftest import FAR_S, QUICK, Execution, running_execution, until

BOUND_S = 10.0
TRUSTING = Engine(
    name="trusting",
    command=("/bin/sh", "-c", QUICK),
    profile=Profile.RESUMABLE,
    env_allow=("PATH",),
    max_concurrent=None,
    session_file=None,
    session_timeout_s=FAR_S,
    trust="codex",
)


@pytest.fixture
async def trusting(tmp_path: Path) -> AsyncIterator[Execution]:
    """An execution with an engine whose CLI gets trust entries."""
    async with running_execution(tmp_path, more=[TRUSTING]) as execution:
        yield execution


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """The logged events."""
    with structlog.testing.capture_logs() as logged:
        yield logged


def count(events: list[Any], event: str) -> int:
    return sum(line["event"] == event for line in events)


def adding(
    monkeypatch: pytest.MonkeyPatch, do: Callable[[Callable[[float], object]], None]
) -> None:
    """Let trust keepers call `do` with their pause instead of adding an entry."""
    monkeypatch.setattr(TrustKeeper, "add", lambda *_, pause: do(pause))


def wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make launches wait for a lock that is never free; return the list of waiting launches."""
    begun: list[str] = []

    def do(pause: Callable[[float], object]) -> None:
        begun.append("waits")
        while True:
            pause(0.01)

    adding(monkeypatch, do)
    return begun


async def waits(begun: list[str]) -> None:
    async def so() -> bool:
        return bool(begun)

    await until(so)


def busy() -> TrustFileBusy:
    return TrustFileBusy(Path("/f"), "others hold the lock")


async def test_a_defect_fails_the_run_at_once(
    trusting: Execution, monkeypatch: pytest.MonkeyPatch, events: list[Any]
) -> None:
    def fail(_: object) -> None:
        raise LookupError

    adding(monkeypatch, fail)
    run = await trusting.until_ended(await trusting.create("trusting"))

    assert run.error is not None
    assert (run.error.code, run.error.message) == (
        "LAUNCH_FAILED", "codex cannot be made to trust the workspace: LookupError"
    )  # fmt: skip
    assert count(events, "trust.not_added") == 1


async def test_a_busy_trust_file_is_waited_for_and_logged_once(
    trusting: Execution, monkeypatch: pytest.MonkeyPatch, events: list[Any]
) -> None:
    left = [busy() for _ in range(5)]

    def do(_: object) -> None:
        if left:
            raise left.pop()

    adding(monkeypatch, do)
    run = await trusting.until_ended(await trusting.create("trusting"))

    assert run.status is RunStatus.SUCCEEDED
    assert count(events, "trust.lock_waited") == 1


async def test_an_unannounced_cancel_ends_the_wait_for_a_trust_file(
    trusting: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def do(pause: Callable[[float], object]) -> None:
        tries.append("")
        pause(0.01)
        raise busy()

    adding(monkeypatch, do)
    run_id = await trusting.create("trusting")
    await waits(tries)
    await trusting.storage.write_own(  # not announced
        runs.cancel, run_id, owner=trusting.owner, etag=None, receipt=None, now=Clock().now()
    )

    assert (await trusting.until_ended(run_id)).status is RunStatus.CANCELED


async def test_a_cancel_ends_the_wait_for_a_trust_file(
    trusting: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = wait_for_ever(monkeypatch)
    run_id = await trusting.create("trusting")
    await waits(begun)

    await trusting.cancel(run_id)

    assert (await trusting.until_ended(run_id)).status is RunStatus.CANCELED
    await trusting.until_free(8)


async def test_a_run_timeout_ends_the_wait_for_a_trust_file(
    trusting: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = wait_for_ever(monkeypatch)
    run_id = await trusting.create("trusting")
    await waits(begun)

    trusting.turns.time_out(run_id, DueKind.RUN)

    run = await trusting.until_ended(run_id)
    assert run.error is not None
    assert run.error.code == "RUN_TIMEOUT"


async def test_a_stop_ends_the_wait_for_a_trust_file(
    trusting: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = wait_for_ever(monkeypatch)
    run_id = await trusting.create("trusting")
    await waits(begun)

    async with asyncio.timeout(BOUND_S):
        await trusting.dispatcher.detach()

    assert (await trusting.get(run_id)).status is RunStatus.RUNNING  # unchanged
