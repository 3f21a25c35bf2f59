"""One history: a seeded sequence of calls, faults and crashes, and the checks after each step."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, Final

import structlog
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import NewRun, Profile, RestartPolicy
from runrecovery_service.domain.start_errors import RecoveryGaveUp
from simulation.agents import SESSION, Agents
from simulation.clients import Clients
from simulation.incarnation import Incarnation, settings_of
from simulation.judge import TERMINAL, Judge
from simulation.world import Violation, World
from support.migrated_store import copy_migrated_store

STEPS: Final = (6, 14)
MOST_RUNS: Final = 5
END_ROUNDS: Final = 60
HANGS_FROM_ROUND: Final = 6
STOP_S: Final = 200.0


@dataclass
class History:
    """A history of one seed. `play` raises Violation if the service breaks a promise."""

    seed: int
    folder: Path
    world: World = field(init=False)
    service: Incarnation | None = field(default=None, init=False)
    _runs: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)  # noqa: S311 - no secret
        self.world = World(Random(self.rng.random()))  # noqa: S311 - no secret
        self.agents = Agents(self.world)
        self.agents.capacity = self.rng.choice((1, 2))
        self.clients = Clients(self.world)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        with reporting_defects(self.world):
            copy_migrated_store(self.folder / "data")
        self.settings = settings_of(
            self.folder / "data",
            capacity=self.agents.capacity,
            finish_s=self.rng.choice((0.0, 0.0, 2.0)),
        )
        path = self.folder / "data" / "runrecovery.db"
        self.judge = Judge(path, self.world, self.agents, self.clients)

    def play(self) -> None:
        """Play the history, and then let the world calm down until nothing happens any more."""
        with reporting_defects(self.world):
            try:
                for _ in range(self.rng.randint(*STEPS)):
                    self._step()
                    self._settle()
                self._end()
            finally:
                if self.service is not None:
                    self._bury()
                self.judge.close()
                self.agents.reboot()
                self.world.loop.close()

    @property
    def reached(self) -> Counter[str]:
        """How often each situation has occurred. Complete once the history has ended."""
        return self.world.reached

    # -- steps ---------------------------------------------------------------------------------

    def _step(self) -> None:
        rng = self.rng
        if self.service is None:
            if rng.random() < 0.15:
                self._reboot()
            self._start(cut_in=rng.randint(0, 12) if rng.random() < 0.25 else None)
            return
        steps: tuple[tuple[int, Callable[[], None]], ...] = (
            (9, self._create), (12, self._reply), (2, self._cancel), (3, self._reopen),
            (4, self._send_again), (10, self._pass_time), (2, self._stand_still),
            (1, self._step_wall_clock), (1, self._lose_session), (2, self._crash),
            (4, self._crash_soon), (2, self._fail_soon), (1, self._slow_down), (2, self._stop),
        )  # fmt: skip
        chosen = rng.choices([do for _, do in steps], [weight for weight, _ in steps])[0]
        if self._open_questions and rng.random() < 0.3:
            chosen = self._reply
        self.world.note(f"step {chosen.__name__.strip('_')}")
        chosen()

    def _create(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            if self._runs < MOST_RUNS:
                self._create_one()
        self._pass_time()

    def _create_one(self) -> None:
        rng = self.rng
        self._runs += 1
        profile = rng.choice((Profile.RESUMABLE, Profile.RESUMABLE, Profile.STICKY_PROCESS))
        new = NewRun(
            run_id=f"run-{self._runs}",
            engine="resumable" if profile is Profile.RESUMABLE else "sticky",
            labels={},
            profile=profile,
            restart_policy=rng.choice(list(RestartPolicy)),
            max_attempts=rng.randint(1, 3),
            max_resumes=rng.randint(0, 2),
            session_timeout_s=rng.choice((None, 3.0, 40.0)),
            require_user_reply=rng.random() < 0.6,
            max_run_s=rng.choice((None, None, 2.0, 30.0)),
            input={},
        )
        self._send(self.clients.create(new))

    def _reply(self) -> None:
        questions = self._open_questions
        if not questions:
            self._pass_time()
            return
        run_id, number = self.rng.choice(questions)
        stale = self.rng.random() < 0.05
        answer = f"answer {len(self.clients.calls)}"
        self._send(self.clients.reply(run_id, number + stale, answer))
        self._pass_time()

    @property
    def _open_questions(self) -> list[tuple[str, int]]:
        """The run and the number of each question that no unanswered call replies to."""
        waiting = self.judge.rows(
            "SELECT run_id, interaction_count FROM run WHERE status = 'WAITING_USER' ORDER BY id"
        )
        unknown = {(c.run_id, c.number) for c in self._unknown if c.method == "SubmitReply"}
        return [(run_id, number) for run_id, number in waiting if (run_id, number) not in unknown]

    def _cancel(self) -> None:
        self._for_some_run(self.clients.cancel)

    def _reopen(self) -> None:
        lost = [
            run["run_id"]
            for run in self.judge.read_runs().values()
            if run["error_code"] == "SESSION_RESUME_FAILED"
        ]
        self._for_some_run(self.clients.reopen, lost)

    def _lose_session(self) -> None:
        """Delete the sessions of the agents, as a user may do."""
        for session in sorted((self.folder / "data").glob(f"runs/*/*/workspace/{SESSION}")):
            session.unlink()

    def _for_some_run(self, prepare: Callable[[str], Any], first: Sequence[str] = ()) -> None:
        found = first or [run["run_id"] for run in self.judge.read_runs().values()]
        if found:
            self._send(prepare(self.rng.choice(found)))
        self._pass_time()

    def _send_again(self) -> None:
        calls = [call for call in self.clients.calls if not call.is_sent and call.refused is None]
        if calls:
            self._send(self.rng.choice(calls))
        self._pass_time()

    def _send(self, call: Any) -> None:
        if self.service is not None and not self.service.has_ended:
            self.clients.send(call, self.service)

    @property
    def _unknown(self) -> list[Any]:
        return [call for call in self.clients.calls if call.is_open]

    def _pass_time(self) -> None:
        self.world.loop.run_for(self.rng.choice((0.002, 0.05, 0.3, 1.0, 1.0, 3.0)))

    def _stand_still(self) -> None:
        self.world.loop.stand_still(self.rng.choice((1.0, 8.0, 20.0, 60.0)))
        self._pass_time()

    def _step_wall_clock(self) -> None:
        self.world.set_wall_clock(timedelta(seconds=self.rng.choice((-7200, -30, 30, 7200))))

    def _crash(self) -> None:
        self.world.crash("step")

    def _crash_soon(self) -> None:
        self.world.cut_in = self.rng.randint(0, 15)
        self._create()

    def _fail_soon(self) -> None:
        self.world.faults_in, self.world.faults = self.rng.randint(0, 6), self.rng.randint(1, 8)
        self._pass_time()

    def _slow_down(self) -> None:
        self.world.is_slow = not self.world.is_slow
        self._pass_time()

    def _reboot(self) -> None:
        self.world.note("reboot")
        self.world.reached["reboot"] += 1
        self.agents.reboot()
        self.world.reboot(self.rng.choice((3.0, 300.0)))

    def _stop(self) -> None:
        if self.service is None:
            return
        if self.rng.random() < 0.3:
            self.world.cut_in = self.rng.randint(0, 20)
        self.world.reached["planned stop"] += 1
        self._stop_in_order()

    def _stop_in_order(self) -> None:
        assert self.service is not None
        self.service.parts.stop.request()
        begun_s = self.world.loop.time()
        while self.world.is_alive and not self.service.has_ended:
            if self.world.loop.time() - begun_s > STOP_S:
                raise Violation("a planned stop does not end")
            self.world.loop.run_for(0.5)

    # -- the life of the service ---------------------------------------------------------------

    def _start(self, cut_in: int | None = None) -> None:
        world = self.world
        live_before, world.is_recovering = self.judge.live_keys(), True
        if self.rng.random() < 0.35 and not world.is_calm:
            world.faults_in, world.faults = self.rng.randint(0, 10), self.rng.randint(1, 2)
        service = self.service = Incarnation(world, self.agents, self.settings)
        world.note(f"START epoch {service.parts.owner.epoch}")
        world.cut_in = cut_in
        watch = world.loop.create_task(self._watch_gate(service, live_before))
        watch.add_done_callback(self._note_violation)
        world.loop.run_for(0.01 if world.is_calm else self.rng.choice((0.01, 1.0, 3.0)))

    async def _watch_gate(self, service: Incarnation, live_before: set[int]) -> None:
        gate = service.parts.gate
        while not gate.recovered:
            await gate.change.wait()
        self.world.note("SERVING")
        self.world.is_recovering = False
        self.world.reached["served"] += 1
        self.judge.check_serving(service.parts.owner.epoch, live_before)

    def _note_violation(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.defects.append(str(error))

    def _settle(self) -> None:
        """Remove a service that has ended or crashed, and check all promises."""
        service = self.service
        if service is not None and (not self.world.is_alive or service.has_ended):
            if self.world.is_alive:
                self._judge_end_of(service)
            self._bury()
        if service is not None and self.world.is_alive:
            used = service.service.work.dispatcher.slots_in_use
            if not 0 <= used <= self.agents.capacity:
                raise Violation(f"I9: {used} slots in use")
        self.judge.is_recovering = self.service is None or not self.service.is_serving
        self.judge.check()

    def _judge_end_of(self, service: Incarnation) -> None:
        if service.task.cancelled():
            raise Violation("the service was cancelled")
        error = service.task.exception()
        self.world.note(f"END {type(error).__name__ if error else 'as planned'}")
        if error is not None and not isinstance(error, RecoveryGaveUp | StorageUnavailable):
            raise Violation(f"the service ended by {error!r}") from error

    def _bury(self) -> None:
        assert self.service is not None
        self.service.bury()
        self.service = None
        self.world.faults, self.world.cut_in, self.world.is_slow = 0, None, False

    # -- the end -------------------------------------------------------------------------------

    def _end(self) -> None:
        world = self.world
        world.note("calm")
        world.is_calm, world.is_slow, world.faults, world.cut_in = True, False, 0, None
        for number in range(END_ROUNDS):
            if self.service is None:
                self._start()
            self._round(number)
            self._settle()
            if self._is_quiet():
                break
        if self.service is None:
            raise Violation("no start leads to a service")
        self.judge.check_end(self.service.service.work.dispatcher.slots_in_use)
        self._stop_in_order()
        self._settle()
        self._start_after_the_stop()
        self._count()

    def _start_after_the_stop(self) -> None:
        """Check that a start finds nothing to change after a planned stop, but deadlines."""
        now_us = self.world.now_ns() // 1000
        before = {
            key: run["status"]
            for key, run in self.judge.read_runs().items()
            if min(run["wait_due_us"] or now_us + 1, run["run_due_us"] or now_us + 1) > now_us
        }
        self._start()
        after = {key: run["status"] for key, run in self.judge.read_runs().items()}
        if (
            self.service is None
            or not self.service.is_serving
            or not before.items() <= after.items()
        ):
            raise Violation(f"I11: a start changed {before} to {after}")
        self.world.crash("step")
        self._settle()

    def _count(self) -> None:
        reached, calls = self.world.reached, self.clients.calls
        reached.update(call.method for call in calls if call.answer is not None)
        reached.update("refused" for call in calls if call.refused is not None)
        reached.update("sent again" for call in calls if call.tries > 1)
        reached.update(run["status"] for run in self.judge.read_runs().values())
        auto = "SELECT 1 FROM interaction WHERE auto_decided = 1"
        reached.update("auto-decided" for _ in self.judge.rows(auto))
        rules = self.judge.rows("SELECT rule FROM recovery_event")
        reached.update(f"rule {rule}" for (rule,) in rules)

    def _round(self, number: int) -> None:
        for call in self._unknown:
            if not call.is_sent:
                self._send(call)
        if number >= HANGS_FROM_ROUND:
            self._cancel_what_blocks()
        self.world.loop.run_for(0.6)
        if number > 1:
            self.world.loop.stand_still(7.0)
            self.world.loop.run_for(0.3)

    def _cancel_what_blocks(self) -> None:
        """Cancel runs whose agent hangs, and runs that wait in a slot for which others wait."""
        runs = self.judge.read_runs().values()
        is_full = any(run["status"] == "QUEUED" for run in runs)
        for run in runs:
            holds_slot = run["status"] == "WAITING_USER" and run["profile"] == "STICKY_PROCESS"
            if run["status"] == "RUNNING" or (is_full and holds_slot):
                self._send(self.clients.cancel(run["run_id"]))

    def _is_quiet(self) -> bool:
        runs = self.judge.read_runs().values()
        is_over = all(run["status"] in (*TERMINAL, "WAITING_USER") for run in runs)
        return (
            is_over
            and not self._unknown
            and self.service is not None
            and not any(call.is_sent for call in self.clients.calls)
            and not self._has_work()
        )

    def _has_work(self) -> bool:
        """Whether a deadline has passed, or a launch is not closed yet."""
        now_us = self.world.now_ns() // 1000
        return bool(
            self.judge.rows(
                "SELECT 1 FROM run WHERE status = 'WAITING_USER' AND min("
                "COALESCE(wait_due_us, ?), COALESCE(run_due_us, ?)) < ?",
                now_us, now_us, now_us,
            )
            or self.judge.rows(
                "SELECT 1 FROM process_lease l JOIN run r ON r.id = l.run"
                " WHERE l.state <> 'CLOSED' AND r.status <> 'WAITING_USER'"
            )
        )  # fmt: skip


@contextmanager
def reporting_defects(world: World) -> Iterator[None]:
    """Count an exception that the service only logs as a defect, and print nothing."""

    def judge(_: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        if (method == "exception" or event.get("exc_info")) and world.is_alive:
            world.defects.append(f"defect: {event}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[judge],
        wrapper_class=structlog.make_filtering_bound_logger(30),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
