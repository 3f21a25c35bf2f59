"""The reloader: all parts or none, requests that come together, and files that do not answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from runrecovery_service import reload
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.reloading import RELOADABLE
from runrecovery_service.config.settings import (
    EngineSettings,
    LogLevel,
    RetentionSettings,
    Settings,
)
from runrecovery_service.domain.retention import RetentionPolicy
from runrecovery_service.domain.run import Profile
from runrecovery_service.reload import ReloadablePart, Reloader
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.setup.reload import reloadable_parts
from runrecovery_service.systemd import SystemdNotifier
from structlog.testing import capture_logs

DEBUG = Settings(log_level=LogLevel.DEBUG)


class Parts:
    """Parts that record what is applied, and fail where they are told to."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.problems: dict[str, Exception] = {}

    def part(self, key: str) -> ReloadablePart:
        def prepare(_: Settings) -> Callable[[], None]:
            if key in self.problems:
                raise self.problems[key]
            return lambda: self.applied.append(key)

        return ReloadablePart(key=key, prepare=prepare, has_files=True)

    def reloader(self, load: Callable[[], Settings], **more: Any) -> Reloader:
        return Reloader(
            settings=Settings(),
            load=load,
            parts=more.pop("parts", [self.part(key) for key in sorted(RELOADABLE)]),
            systemd=SystemdNotifier(gate=Gate(), address="", watchdog_s=None),
        )


async def test_all_parts_are_replaced_and_the_log_names_them() -> None:
    parts = Parts()
    reloader = parts.reloader(lambda: DEBUG)

    with capture_logs() as logged:
        assert await reloader.reload()

    assert parts.applied == ["callers", "engines", "log_level", "retention", "tls", "webhooks"]
    assert reloader.settings == DEBUG
    assert logged == [
        {
            "event": "service.reloaded",
            "log_level": "info",
            "changed": parts.applied,
            "needs_restart": [],
        }
    ]


async def test_a_part_that_is_refused_keeps_every_other_part_from_being_replaced() -> None:
    parts = Parts()
    parts.problems = {"tls": ConfigError(("tls: bad",)), "engines": ConfigError(("e: bad",))}
    reloader = parts.reloader(lambda: DEBUG)

    with capture_logs() as logged:
        assert not await reloader.reload()

    assert parts.applied == []
    assert reloader.settings == Settings()
    assert [(one["event"], one["problems"]) for one in logged] == [
        ("service.reload_refused", ["e: bad", "tls: bad"])
    ]


async def test_a_part_that_is_unchanged_and_without_files_is_not_built() -> None:
    def fail(_: Settings) -> None:
        raise AssertionError

    parts = [ReloadablePart(key=key, prepare=fail) for key in RELOADABLE]

    assert await Parts().reloader(Settings, parts=parts).reload()


async def test_files_that_do_not_answer_end_neither_the_service_nor_later_reloads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reload, "READ_S", 0.05)
    release = threading.Event()

    def hang() -> Settings:
        release.wait()
        return DEBUG

    parts = Parts()
    reloader = parts.reloader(hang)
    with capture_logs() as logged:
        assert not await reloader.reload()
    release.set()

    assert logged[0]["problems"] == ["the files of the configuration did not answer within 0.05 s"]
    assert (parts.applied, reloader.settings) == ([], Settings())
    monkeypatch.setattr(reload, "READ_S", 20)
    assert await reloader.reload()
    assert reloader.settings == DEBUG


async def outcomes_of(
    reloader: Reloader, monkeypatch: pytest.MonkeyPatch, times: int
) -> list[bool]:
    """Request so many reloads one after another; return what systemd is told: refused or not."""
    told: list[bool] = []
    monkeypatch.setattr(SystemdNotifier, "end_reload", lambda _, *, refused: told.append(refused))
    reloader.start()
    try:
        for number in range(times):
            reloader.request()
            async with asyncio.timeout(20):
                while len(told) == number:  # noqa: ASYNC110 - a reload announces nothing
                    await asyncio.sleep(0.01)
    finally:
        await reloader.stop()
    return told


async def test_a_part_that_cannot_be_put_in_place_keeps_no_other_part_back_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    parts, others = Parts(), sorted(RELOADABLE - {"log_level"})
    broken = ReloadablePart(key="log_level", prepare=lambda _: fail)
    reloader = parts.reloader(lambda: DEBUG, parts=[broken, *map(parts.part, others)])
    with capture_logs() as logged:
        told = await outcomes_of(reloader, monkeypatch, times=2)

    assert told == [True, True]
    failed = [("service.reload_failed", "log_level")]
    assert [(one["event"], one["part"]) for one in logged] == failed * 2
    assert parts.applied == others * 2
    assert reloader.settings == Settings()


async def test_a_defect_while_parts_are_built_leaves_the_present_ones_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts()
    parts.problems = {"tls": ZeroDivisionError()}
    with capture_logs() as logged:
        told = await outcomes_of(parts.reloader(lambda: DEBUG), monkeypatch, times=2)

    assert [one["event"] for one in logged] == ["service.reload_failed"] * 2
    assert (parts.applied, told) == ([], [True, True])


async def test_requests_during_a_reload_lead_to_exactly_one_more() -> None:
    begun, release, loads = asyncio.Event(), threading.Event(), 0
    loop = asyncio.get_running_loop()

    def load() -> Settings:
        nonlocal loads
        loads += 1
        loop.call_soon_threadsafe(begun.set)
        release.wait()
        return DEBUG if loads == 2 else Settings()

    reloader = Parts().reloader(load)
    reloader.start()
    try:
        reloader.request()
        await asyncio.wait_for(begun.wait(), 20)
        assert [reloader.request() for _ in range(5)] == [True] * 5
        release.set()
        async with asyncio.timeout(20):
            while reloader.settings != DEBUG:  # noqa: ASYNC110 - a reload announces nothing
                await asyncio.sleep(0.01)
    finally:
        await reloader.stop()

    assert loads == 2
    assert not reloader.request()


def test_every_reloadable_key_needs_a_part() -> None:
    with pytest.raises(LookupError, match="RELOADABLE"):
        Parts().reloader(Settings, parts=[])


def test_the_sweep_of_old_rows_gets_the_new_ages() -> None:
    sweep: Any = SimpleNamespace(policy=RetentionPolicy(outputs=1.0))
    other: Any = SimpleNamespace(prepare_callers=None, prepare_tls=None)
    parts = reloadable_parts(
        entrance=other,
        catalog=other,
        sessions=other,
        dispatcher=other,
        retention=sweep,
        webhooks=other,
    )
    (part,) = (part for part in parts if part.key == "retention")

    apply = part.prepare(Settings(retention=RetentionSettings(outputs=60.0, max_ended_runs=7)))
    assert sweep.policy == RetentionPolicy(outputs=1.0)
    assert apply is not None
    apply()

    assert sweep.policy == RetentionPolicy(outputs=60.0, max_ended_runs=7)


def test_new_engines_replace_the_session_checks_and_cause_a_check_of_the_queue() -> None:
    """A run may have waited for a slot of its engine, whose limit is now higher."""
    done: list[object] = []
    catalog: Any = SimpleNamespace(replace=lambda new: done.append(new.names))
    sessions: Any = SimpleNamespace(replace_checks=lambda checks: done.append(sorted(checks)))
    dispatcher: Any = SimpleNamespace(check_queue=lambda: done.append("queue"))
    other: Any = SimpleNamespace(prepare_callers=None, prepare_tls=None)
    parts = reloadable_parts(
        entrance=other,
        catalog=catalog,
        sessions=sessions,
        dispatcher=dispatcher,
        retention=None,
        webhooks=other,
    )
    (part,) = (part for part in parts if part.key == "engines")

    engine = EngineSettings(
        command=("x",), profile=Profile.RESUMABLE, session_file="{workspace}/{value}"
    )
    apply = part.prepare(Settings(engines={"new": engine}))
    assert apply is not None
    assert done == []
    apply()

    assert done == [("new",), ["new"], "queue"]
