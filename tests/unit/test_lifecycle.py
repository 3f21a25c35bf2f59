"""The order of a start and of a stop, and that a step that fails or hangs prevents no other.

The parts of the service only note what they are asked to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeAlias

import pytest
from runrecovery_service import lifecycle
from runrecovery_service.background_work import BackgroundWork, Sweep
from runrecovery_service.config.settings import ContainmentPolicy
from runrecovery_service.domain.errors import Fenced, StorageUnavailable
from runrecovery_service.domain.start_errors import LeaseLost, RecoveryGaveUp, StoreLost
from runrecovery_service.lifecycle import Service
from runrecovery_service.lost_commits import note_loss, noted_loss
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.stop_signal import StopSignal
from structlog.testing import capture_logs
from support.waiting import until_async

DRAINED = ["dispatcher.pause", "gate.drain", "deadlines.stop"]
CALLS_STOPPED = ["gate.close", "listeners.stop_calls", "control.stop_reloads"]
SWEEPS_STOPPED = ["stragglers.stop", "removal.stop"]
RUNS_DECIDED = ["dispatcher.detach", "recovery.decide_at_stop", "dispatcher.release"]
WORK_STOPPED = [
    "dispatcher.stop",
    "webhooks.stop",
    "ownership.stop_tasks",
    "threads.shutdown",
]
RESIGNED = ["ownership.resign"]
CLOSED = ["listeners.stop_probes", "listeners.stop_metrics", "storage.close", "control.stop"]

WHOLE_STOP = [
    *DRAINED,
    *CALLS_STOPPED,
    *SWEEPS_STOPPED,
    *RUNS_DECIDED,
    *WORK_STOPPED,
    *RESIGNED,
    *CLOSED,
]
STEPS = {
    "deadlines.stop": "deadlines",
    "listeners.stop_calls": "server",
    "control.stop_reloads": "reload",
    "stragglers.stop": "stragglers",
    "removal.stop": "retention",
    "dispatcher.stop": "processes",
    "webhooks.stop": "webhooks",
    "ownership.stop_tasks": "renewals",
    "ownership.resign": "lease",
    "listeners.stop_probes": "probe",
    "listeners.stop_metrics": "metrics",
}
"""What the loop itself waits for in a stop, and the name of its step in the log."""


async def succeed() -> None:
    pass


async def fail() -> NoReturn:
    raise StorageUnavailable


async def hang() -> None:
    await asyncio.Event().wait()


Answer: TypeAlias = Callable[[], Awaitable[object]]


@dataclass
class Call:
    """A call that is on record: it may be awaited, and need not be."""

    answer: Answer

    def __await__(self) -> Generator[Any, None, object]:
        return self.answer().__await__()


class Part(SimpleNamespace):
    """A part of the service. Each method that is not given appends its name to `journal.done`."""

    def __init__(self, journal: Journal, name: str, **given: object) -> None:
        super().__init__(**given)
        self._journal, self._name = journal, name

    def __getattr__(self, method: str) -> Callable[..., Call]:
        return lambda *_, **__: self._journal.note(f"{self._name}.{method}")


class Dispatcher(Part):
    """The dispatcher: one turn less is under way each time that its turns are counted."""

    turns = 0

    @property
    def at_work(self) -> int:
        self.turns -= 1
        return max(self.turns + 1, 0)


class NotedGate(Gate):
    """A gate that notes how the service stops."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def finish(self) -> None:
        self._journal.note("gate.finish")
        super().finish()

    def drain(self) -> None:
        self._journal.note("gate.drain")
        super().drain()

    def close(self) -> None:
        self._journal.note("gate.close")
        super().close()


@dataclass
class Journal:
    """What the parts of one service are asked to do.

    Attributes:
        answers: how a call ends that does not just succeed.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    stop: StopSignal = field(default_factory=StopSignal)
    unrenewed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, call: str) -> Call:
        self.done.append(call)
        return Call(self.answers.get(call, succeed))

    async def decide_at_stop(self) -> None:
        await self.note("recovery.decide_at_stop")

    async def noted(self, call: str) -> None:
        """Wait until a call was noted."""

        async def is_noted() -> bool:
            return call in self.done

        await until_async(is_noted, call)

    def service(self, *, finish_s: float = 0.0, turns: int = 0) -> Service:
        """Return a service whose parts note what they are asked to do."""

        def part(name: str, **given: object) -> Any:
            return Part(self, name, **given)

        dispatcher: Any = Dispatcher(self, "dispatcher", turns=turns)
        return Service(
            settings=part(
                "settings",
                data_dir=Path("/nowhere"),
                containment=ContainmentPolicy.BEST_EFFORT,
                cancel_grace_s=0.0,
                stop_grace_s=0.0,
                drain_delay_s=0.0,
                finish_s=finish_s,
            ),
            stop=self.stop,
            gate=NotedGate(self),
            control=part("control"),
            listeners=part("listeners"),
            ownership=part(
                "ownership",
                owner=SimpleNamespace(epoch=1),
                lease=SimpleNamespace(unrenewed=self.unrenewed),
                storage=part("storage"),
            ),
            recovery_runner=part("recovery", decide_at_stop=self.decide_at_stop),
            work=BackgroundWork(
                dispatcher=dispatcher,
                deadlines=part("deadlines"),
                sweeps=[
                    Sweep(name="stragglers", sweeper=part("stragglers")),
                    Sweep(name="retention", sweeper=part("removal"), in_safe_mode=False),
                ],
                webhooks=part("webhooks"),
                threads=part("threads"),
            ),
        )


def recovered(*, safe_mode: bool = False) -> Answer:
    """A recovery that commits its report."""

    async def recover() -> object:
        return SimpleNamespace(safe_mode=safe_mode)

    return recover


async def stop(service: Service, journal: Journal, error: Exception | None = None) -> list[str]:
    """Serve, stop, and return what the parts were asked to do at the stop."""
    journal.answers["recovery.recover"] = recovered()
    running = asyncio.create_task(service.run())
    await journal.noted("deadlines.start")
    journal.done.clear()
    if error is None:
        journal.stop.request()
        await running
    else:
        journal.stop.fail(error)
        with pytest.raises(type(error)):
            await running
    return journal.done


# -- a start -----------------------------------------------------------------------------------


async def test_a_start_listens_and_recovers_before_it_launches_anything() -> None:
    journal = Journal({"recovery.recover": recovered()})

    running = asyncio.create_task(journal.service().run())
    await journal.noted("deadlines.start")

    assert journal.done == [
        "control.start",
        "ownership.start",
        "listeners.bind",
        "recovery.report_containment",
        "recovery.recover",
        "stragglers.start",
        "removal.start",
        "webhooks.start",
        "dispatcher.start",
        "deadlines.start",
    ]
    journal.stop.request()
    await running


async def test_a_noted_loss_is_forgotten_once_a_report_has_it_and_not_before(
    tmp_path: Path,
) -> None:
    """Otherwise the reports of all later starts would have it too."""
    note_loss(tmp_path, "commits are lost")
    failed, served = Journal(), Journal()
    for journal in (failed, served):
        service = journal.service()
        service.settings.data_dir = tmp_path  # type: ignore[misc] # a part that may be changed
        if journal is failed:
            journal.stop.request()
            await service.run()
            assert noted_loss(tmp_path) == "commits are lost"
        else:
            await stop(service, journal)

    assert noted_loss(tmp_path) is None


async def test_safe_mode_launches_nothing_ends_no_wait_and_removes_nothing() -> None:
    journal = Journal({"recovery.recover": recovered(safe_mode=True)})

    running = asyncio.create_task(journal.service().run())
    await journal.noted("webhooks.start")
    journal.stop.request()
    await running

    started = [name for name in journal.done if name.endswith(".start")]
    assert started == ["control.start", "ownership.start", "stragglers.start", "webhooks.start"]


async def test_a_start_that_cannot_listen_recovers_nothing_and_resigns() -> None:
    journal = Journal({"listeners.bind": fail})

    with pytest.raises(StorageUnavailable):
        await journal.service().run()

    assert "recovery.recover" not in journal.done
    assert "recovery.decide_at_stop" not in journal.done
    assert journal.done[-5:] == [*RESIGNED, *CLOSED]


# -- a stop ------------------------------------------------------------------------------------


async def test_a_stop_drains_decides_on_runs_and_only_then_gives_up_the_lease() -> None:
    journal = Journal()

    assert await stop(journal.service(), journal) == WHOLE_STOP


async def test_a_stop_before_the_recovery_has_committed_decides_on_no_run() -> None:
    journal = Journal({"recovery.recover": succeed})  # no report: the service is to stop
    journal.stop.request()

    await journal.service().run()

    at_stop = journal.done[journal.done.index("dispatcher.pause") :]
    assert at_stop == [name for name in WHOLE_STOP if name not in RUNS_DECIDED]


@pytest.mark.parametrize(
    "error",
    [Fenced("the run"), LeaseLost("pod-0", 10.0), StoreLost("runrecovery.db", "was removed")],
)
async def test_a_service_that_may_be_superseded_first_ends_processes_and_keeps_the_lease(
    error: Exception,
) -> None:
    journal = Journal()

    done = await stop(journal.service(), journal, error)

    at_once = slice(len(DRAINED), len(DRAINED) + 2)
    assert set(done[at_once]) == {"dispatcher.stop", "webhooks.stop"}
    del done[at_once]
    assert done == [
        *DRAINED,
        *CALLS_STOPPED,
        *SWEEPS_STOPPED,
        *WORK_STOPPED,
        *CLOSED,
    ]


async def test_a_stop_after_a_defect_decides_nothing_but_gives_up_the_lease() -> None:
    journal = Journal()

    done = await stop(journal.service(), journal, RecoveryGaveUp(5, "a defect"))

    assert "recovery.decide_at_stop" not in done
    assert "ownership.resign" in done


@pytest.mark.parametrize(("call", "step"), STEPS.items())
async def test_a_step_that_fails_prevents_no_other(call: str, step: str) -> None:
    journal = Journal({call: fail})

    with capture_logs() as logs:
        done = await stop(journal.service(), journal)

    assert done == WHOLE_STOP
    assert failed_steps(logs) == [(step, "StorageUnavailable")]


@pytest.mark.parametrize(("call", "step"), STEPS.items())
async def test_a_step_that_hangs_prevents_no_other(
    monkeypatch: pytest.MonkeyPatch, call: str, step: str
) -> None:
    bounded = lifecycle._step

    async def limited(name: str, work: Awaitable[object], **grace: float) -> None:
        monkeypatch.setattr(lifecycle, "STEP_S", 0.01 if name == step else 3600.0)
        await bounded(name, work, **grace)

    monkeypatch.setattr(lifecycle, "_step", limited)
    journal = Journal({call: hang})

    with capture_logs() as logs:
        done = await stop(journal.service(), journal)

    assert done == WHOLE_STOP
    assert failed_steps(logs) == [(step, "TimeoutError")]
    assert [line.get("cause") for line in logs if "error" in line] == [
        "the step did not end in time"
    ]


async def test_decisions_that_fail_leave_the_processes_to_the_next_step() -> None:
    journal = Journal({"recovery.decide_at_stop": fail})

    with capture_logs() as logs:
        done = await stop(journal.service(), journal)

    assert done == [name for name in WHOLE_STOP if name != "dispatcher.release"]
    assert failed_steps(logs) == [("runs", "StorageUnavailable")]


async def test_decisions_end_when_the_lease_is_not_renewed() -> None:
    journal = Journal({"recovery.decide_at_stop": hang})

    with capture_logs() as logs:
        stopping = asyncio.create_task(stop(journal.service(), journal))
        await journal.noted("recovery.decide_at_stop")
        journal.unrenewed.set()
        done = await stopping

    assert done == [name for name in WHOLE_STOP if name != "dispatcher.release"]
    assert failed_steps(logs) == [("runs", "StorageUnavailable")]


def failed_steps(logs: Any) -> list[tuple[str, str]]:
    return [
        (line["step"], line["error"])
        for line in logs
        if line["event"] == "service.stop_step_failed"
    ]


# -- turns that may end ------------------------------------------------------------------------


async def test_a_stop_with_finish_s_drains_once_the_turns_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifecycle, "FINISH_POLL_S", 0.0)
    journal = Journal()
    service = journal.service(finish_s=3600.0, turns=4)

    assert await stop(service, journal) == ["dispatcher.pause", "gate.finish", *WHOLE_STOP[1:]]


async def test_a_stop_without_turns_does_not_wait_for_any() -> None:
    journal = Journal()

    assert await stop(journal.service(finish_s=3600.0), journal) == WHOLE_STOP


async def test_a_superseded_service_does_not_wait_for_turns() -> None:
    journal = Journal()
    service = journal.service(finish_s=3600.0, turns=4)

    done = await stop(service, journal, Fenced("the run"))

    assert "gate.finish" not in done
