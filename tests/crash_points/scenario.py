"""What one service does in a trial: runs of every kind, a kill, a planned stop, and their ends.

Each step can be repeated, because a crash point may kill the service in the middle of it. Runs that
a restart has failed are left as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from crash_points.kills import Kill
from crash_points.snapshot import Snapshot, Violation
from crash_points.world import Crashed, World
from google.protobuf.duration_pb2 import Duration
from runrecovery.v1 import run_pb2
from runrecovery_service.domain.run import TERMINAL
from support.agent_cli import TRUST_FILE
from support.api import status_word
from support.engines import AGENTS, EngineSpec, demo_command, script
from support.service import Home
from support.stores import dump, lose_session
from support.webhook_receiver import SECRET, Receiver

ASKS: Final = {"questions": [{"prompt": "Which?"}]}
USER_SETTINGS: Final = {
    "codex": '# mine\nmodel = "m"  # best\n\n[projects."/elsewhere"]\ntrust_level = "trusted"\n',
    "claude": '{"theme": "dark", "projects": {"/elsewhere": {"hasTrustDialogAccepted": false}}}\n',
}
NOTED: Final = """
import fcntl, os
mine = os.environ["RUNRECOVERY_RUN_ID"]
starts = os.open(os.path.join({folder!r}, "starts"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(starts, (os.environ["RUNRECOVERY_LEASE"] + "\\n").encode())
held = open(os.path.join({folder!r}, "held-" + mine), "w")
try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    os.write(os.open(os.path.join({folder!r}, "overlaps"), os.O_WRONLY | os.O_CREAT), mine.encode())
"""
"""The beginning of agents: notes the launch, and whether another agent of the run lives."""
WORKS: Final = """
import json, sys, time
sys.stdin.readline()
while not os.path.exists(os.path.join({folder!r}, "go")):
    time.sleep(0.02)
print(json.dumps({{"type": "usage", "input_tokens": 7, "output_tokens": 2}}), flush=True)
print(json.dumps({{"type": "result", "output": {{"done": True}}}}), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much a scenario does.

    Attributes:
        kinds: the kinds of runs, which are the methods of `Scenario` with these names.
        stops: whether there is a planned stop with runs of each kind, beside the kill.
    """

    kinds: tuple[str, ...]
    stops: bool


FULL: Final = Size(
    kinds=(
        "waits",
        "sticky",
        "holds",
        "works",
        "steps",
        "permits",
        "decides",
        "overdue",
        "late",
        "cancels",
    ),
    stops=True,
)
BRIEF: Final = Size(kinds=("waits", "works", "steps", "cancels"), stops=False)


@dataclass(slots=True, kw_only=True, eq=False)
class Scenario:
    """The steps of one service, and what must be true at the end."""

    world: World
    folder: Path
    size: Size
    receiver: Receiver
    runs: list[str] = field(default_factory=list)
    _lost: dict[str, bytes] = field(default_factory=dict)

    @property
    def worlds(self) -> tuple[World, ...]:
        """The services."""
        return (self.world,)

    def plan(self) -> list[Callable[[], None]]:
        """Return the steps."""
        steps = [self.start, self.create_first, self.settle, self.cancel, self.kill, self.start]
        if self.size.stops:
            steps += [self.create_second, self.settle, self.stop_and_lose, self.reopen]
        return [*steps, self.let_go, self.finish, self.stop, self.rest]

    def play(self) -> None:
        """Play every step. A step in which a service was killed is repeated."""
        for step in self.plan():
            while True:
                try:
                    step()
                except Crashed as crash:
                    self.recover(crash.world)
                else:
                    break

    def recover(self, crashed: World) -> None:
        """Start the service again that was killed, until it serves."""
        crashed.recover()

    # -- runs of every kind --------------------------------------------------------------------

    def _create(self, engine: str, name: str, given: dict[str, Any], **fields: Any) -> None:
        if name not in self.runs:
            self.runs.append(name)
        self.world.create(engine, name, given, **fields)

    def waits(self, name: str) -> None:
        """Create a run that asks, and whose next process gets the answer."""
        self._create("resumable", name, ASKS)

    def sticky(self, name: str) -> None:
        """Create a run whose process waits for the answer."""
        self._create("sticky", name, ASKS)

    def holds(self, name: str) -> None:
        """Create a run that works until a restart fails it."""
        self._create("resumable", name, {"hold": True, "children": 1})

    def works(self, name: str) -> None:
        """Create a run that a restart begins again."""
        policy = run_pb2.RESTART_POLICY_REQUEUE
        self._create("works", name, {}, restart_policy=policy)

    def steps(self, name: str) -> None:
        """Create a turn of a CLI that a restart resumes."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        if not (self.folder / "go").exists():
            (folder / "stop-result").touch()
        self._create("codex", name, {"prompt": f"STEPS {folder}"})

    def permits(self, name: str) -> None:
        """Create a turn of a CLI that asks for a permission."""
        self._create("claude", name, {"prompt": "CALLS: echo ran >> effects"})

    def decides(self, name: str) -> None:
        """Create a run whose question is decided without its user."""
        profile = run_pb2.InteractiveProfile(
            session_timeout=Duration(nanos=200_000_000), require_user_reply=False
        )
        self._create("resumable", name, ASKS, interactive_profile=profile)

    def overdue(self, name: str) -> None:
        """Create a run that exceeds its time."""
        self._create("short", name, {"hold": True})

    def late(self, name: str) -> None:
        """Create a run that exceeds its time while it waits."""
        self._create("short", name, ASKS)

    def cancels(self, name: str) -> None:
        """Create a run that will be canceled, and whose process ignores SIGTERM."""
        self._create("resumable", name, {"hold": True, "ignore_sigterm": True, "children": 1})

    # -- steps ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start each service that does not run."""
        for world in self.worlds:
            if world.service is None:
                world.start()

    def stop(self) -> None:
        """Stop each service as planned."""
        for world in self.worlds:
            if world.service is not None:
                world.stop()

    def create_first(self) -> None:
        """Create a run of each kind."""
        for kind in self.size.kinds:
            getattr(self, kind)(f"{kind}-1")

    def create_second(self) -> None:
        """Create runs that a planned stop meets."""
        for kind in ("waits", "sticky", "works", "steps", "permits"):
            getattr(self, kind)(f"{kind}-2")

    def settle(self) -> None:
        """Wait until each run waits, works or has ended."""
        for name in self.runs:
            self.world.until(partial(self._is_settled, name), f"{name} is settled")

    def _is_settled(self, name: str) -> bool:
        run = self.world.get(name)
        status = status_word(run)
        if name.startswith("queued"):
            return True
        if name.startswith(("decides", "overdue", "late")):
            return status in TERMINAL
        if status == "RUNNING" and name.startswith("steps"):
            return (self.folder / name / "stopped").exists() and run.session.has_handle
        if status == "RUNNING" and name.startswith("works"):
            return bool(self._agents_of(name))
        if status == "RUNNING" and name.startswith(("holds", "cancels")):
            return len(self._agents_of(name)) >= 2  # with its child
        return status in TERMINAL | {"WAITING_USER"}

    def _agents_of(self, name: str) -> list[int]:
        return [pid for world in self.worlds for pid in world.home.agents_of(name)]

    def cancel(self) -> None:
        """Cancel a run, and wait for its end."""
        if "cancels-1" in self.runs:
            self.world.cancel("cancels-1")
            self._until_ended("cancels-1")

    def kill(self) -> None:
        """Kill the service and its shims, so that the next start finds orphans."""
        self.world.kill()

    def stop_and_lose(self) -> None:
        """Stop the service, remove a session, and start the service."""
        if self.world.service is not None:
            self.world.stop()
        if not self._lost and self._waits_in_store("waits-2"):
            self._lost = lose_session(self.world.home, "waits-2")
        self.world.start()

    def _waits_in_store(self, name: str) -> bool:
        found = [run for run in Snapshot.read(self.world.home).live() if run["run_id"] == name]
        return bool(found) and found[0]["status"] == "WAITING_USER"

    def reopen(self) -> None:
        """Put the session back, and reopen the run."""
        for name, text in self._lost.items():
            Path(name).write_bytes(text)
        if self._lost:
            self.world.reopen("waits-2")

    def let_go(self) -> None:
        """Let the processes that wait for it end."""
        (self.folder / "go").touch()
        for name in self.runs:
            (self.folder / name / "stop-result").unlink(missing_ok=True)

    def finish(self) -> None:
        """Answer what is asked until every run has ended."""
        for name in self.runs:
            self._until_ended(name)
        self.world.until(
            lambda: not Snapshot.read(self.world.home).tables["webhook_delivery"],
            "everything is delivered",
        )

    def _until_ended(self, name: str) -> None:
        def has_ended() -> bool:
            run = self.world.get(name)
            if status_word(run) == "WAITING_USER":
                self.world.reply(run, "allow" if name.startswith("permits") else "yes")
            return status_word(run) in TERMINAL

        if name.startswith("holds") and status_word(self.world.get(name)) not in TERMINAL:
            self.world.cancel(name)
        self.world.until(has_ended, f"{name} has ended")

    def rest(self) -> None:
        """Start and stop once more, which must not change a run."""
        before = _runs_of(self.world.home)
        self.start()
        self.stop()
        after = _runs_of(self.world.home)
        changed = [table for table, rows in before.items() if after[table] != rows]
        if changed:
            self.world.problems.append(
                Violation("not idempotent", f"a restart of ended runs changed {changed}")
            )

    # -- judging -------------------------------------------------------------------------------

    def judge(self) -> Iterator[Violation]:
        """Yield what is wrong at the end."""
        store = Snapshot.read(self.world.home)
        yield from (Violation("not ended", run["run_id"]) for run in store.live())
        for launch in store.tables["process_lease"]:
            if launch["state"] != "CLOSED":
                yield Violation("slot", f"launch {launch['id']} is {launch['state']}")
        for pid in [pid for world in self.worlds for pid in world.home.agents()]:
            yield Violation("orphan", f"process {pid} after the end")
        yield from self._wrong_ends(store)
        yield from self._agents()
        yield from self._files()
        yield from self._deliveries(store)

    def _wrong_ends(self, store: Snapshot) -> Iterator[Violation]:
        answered = {run for word, run, _ in self.world.acknowledged if word == "reply"}
        for run in store.tables["run"]:
            name, kind = run["run_id"], run["run_id"].partition("-")[0]
            ends = {run["error_code"]} if run["status"] == "FAILED" else {run["status"]}
            if not ends <= ENDS[kind]:
                yield Violation("wrong end", f"{name}: {ends}, {run['error_message']}")
            tells = run["status"] == "SUCCEEDED" and kind in ("waits", "sticky")
            if tells and name in answered and json.loads(run["output"]) != {"answers": ["yes"]}:
                yield Violation("wrong end", f"{name}: {run['output']}")

    def _agents(self) -> Iterator[Violation]:
        starts = self.folder / "starts"
        launches = starts.read_text().split() if starts.exists() else []
        for launch in {each for each in launches if launches.count(each) > 1}:
            yield Violation("two processes", f"of the launch {launch}")
        if (self.folder / "overlaps").exists():
            yield Violation("two processes", (self.folder / "overlaps").read_text())

    def _files(self) -> Iterator[Violation]:
        for cli in USER_SETTINGS:
            text = (self.folder / f"home-of-{cli}" / TRUST_FILE[cli]).read_text()
            if str(self.folder) in text:
                yield Violation("trust", f"{cli} trusts a folder of an ended run: {text}")
            elif cli == "codex" and text != USER_SETTINGS[cli]:
                yield Violation("trust", f"the file of {cli} has changed: {text}")

    def _deliveries(self, store: Snapshot) -> Iterator[Violation]:
        runs = {run["id"]: run["run_id"] for run in store.tables["run"]}
        kinds = {"ASKED", "SUCCEEDED", "FAILED", "CANCELED"}
        due = {
            (runs[row["run"]], row["no"])
            for row in store.tables["run_event"] if row["kind"] in kinds
        }  # fmt: skip
        due |= {(runs[row["run"]], row["sequence"]) for row in store.tables["recovery_event"]}
        got = {(each.facts["run_id"], each.facts["sequence"]) for each in self.receiver.received}
        if due - got:
            yield Violation("webhook", f"not delivered: {sorted(due - got)}")
        if got - due:
            yield Violation("webhook", f"delivered, but not in the store: {sorted(got - due)}")


_RESTART: Final = {"ORCHESTRATOR_RESTART_INTERRUPTED"}
ENDS: Final = {
    "waits": {"SUCCEEDED"} | _RESTART,
    "sticky": {"SUCCEEDED", "INTERACTION_PROCESS_LOST"} | _RESTART,
    "holds": {"CANCELED"} | _RESTART,
    "works": {"SUCCEEDED"} | _RESTART,
    "steps": {"SUCCEEDED"},
    "permits": {"SUCCEEDED"} | _RESTART,
    "decides": {"SUCCEEDED"} | _RESTART,
    "overdue": {"RUN_TIMEOUT"} | _RESTART,
    "late": {"RUN_TIMEOUT"} | _RESTART,
    "cancels": {"CANCELED"} | _RESTART,
    "queued": {"SUCCEEDED"} | _RESTART,
}
"""How the runs of each kind may end: the status, or the code of the error."""


def _runs_of(home: Home) -> dict[str, Any]:
    """Return the rows of runs. Rows of removed trust entries are left out: they go with time."""
    found = dump(home)
    tables = ("run", "interaction", "run_event", "recovery_event", "process_lease")
    return {table: found[table] for table in tables}


def engines_of(folder: Path) -> dict[str, EngineSpec]:
    noted = NOTED.format(folder=str(folder))
    *python, text, _, _ = demo_command("resumable")
    resumable = (*python, noted + text, "--profile", "resumable")
    session = {"session_file": "{workspace}/session-{value}.json"}
    engines = {
        "resumable": EngineSpec(command=resumable, more=session),
        "short": EngineSpec(command=resumable, more={**session, "max_run_time_s": 0.4}),
        "sticky": EngineSpec(
            command=(*python, noted + text, "--profile", "sticky"), profile="sticky_process"
        ),
        "works": script(noted + WORKS.format(folder=str(folder))),
    }
    more: dict[str, dict[str, object]] = {
        "codex": {"restart_policy": "resume", "max_resumes": 9},
        "claude": {"permissions": "ask", "ask_for": ["Bash(echo *)"]},
    }
    for cli, keys in more.items():
        place = folder / f"home-of-{cli}"
        file = place / TRUST_FILE[cli]
        file.parent.mkdir(parents=True)
        file.write_text(USER_SETTINGS[cli])
        engines[cli] = EngineSpec(
            command=(sys.executable, "-I", "-S", str(AGENTS / "pretend_cli.py"), cli),
            more={"preset": cli, "agent_home": str(place), **keys},
        )
    return engines


SETTINGS: Final[dict[str, Any]] = {
    "max_attempts": 9,
    "cancel_grace_s": 0.2,
    "orphan_grace_s": 0.1,
    "stop_grace_s": 0.5,
    "drain_delay_s": 0.0,
    "log_level": "info",
}


def webhook_of(folder: Path, receiver: Receiver) -> dict[str, object]:
    """Return the webhook of a service."""
    secret = folder / "secret"
    secret.write_text(SECRET)
    return {
        "name": "chat", "url": receiver.url, "secret_file": str(secret),
        "allow_private": ["127.0.0.1"], "timeout_s": 2.0,
    }  # fmt: skip


@contextmanager
def single(folder: Path, kills: Sequence[Kill], *, size: Size, end_s: float) -> Iterator[Scenario]:
    """Make the scenario of one service, whose store does not exist yet."""
    with Receiver() as receiver:
        webhooks = [webhook_of(folder, receiver)]
        home = Home(
            folder, engines=engines_of(folder), webhooks=webhooks, max_concurrent=12, **SETTINGS
        )
        home.data.mkdir(mode=0o700)  # without a copy of a store: the service makes it
        with home:
            world = World(home, folder, list(kills), end_s)
            yield Scenario(world=world, folder=folder, size=size, receiver=receiver)
