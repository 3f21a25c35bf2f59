"""Records a service at work: its changes of files, and its answers to clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Final

from power_cut.trace import STRACE, Call, read_calls
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, struct, value
from support.engines import RESUMABLE
from support.service import Home
from support.waiting import until

CLIENTS: Final = 4
STARTS: Final = 2
TRUST_FILE: Final = "codex/config.toml"
"""The user's file into which the service writes trust entries, below the root."""
USERS_TRUST: Final = b'model = "m"\n[projects."/mine"]\ntrust_level = "untrusted"\n'
ANSWER: Final = "yes"


@dataclass(frozen=True, slots=True)
class Answered:
    """A call that was answered, and so must never be lost.

    Attributes:
        at_s: the wall time at which the client had the answer.
        call: `create`, `reply` or `cancel`.
    """

    at_s: float
    call: str
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A service at work.

    Attributes:
        root: the directory whose files matter: data directory, configuration, an agent's home.
        files: what was there before the service, by path below the root.
    """

    root: Path
    files: Mapping[str, bytes]
    calls: list[Call]
    answered: list[Answered]


@dataclass(slots=True)
class _Client:
    """Sends calls to one start of the service, and notes each answer."""

    api: Api
    prefix: str
    rng: Random
    answered: list[Answered] = field(default_factory=list)

    def work(self, runs: int) -> None:
        """Create runs; answer the question of some, cancel others."""
        for number in range(runs):
            run_id = f"{self.prefix}-{number}"
            asks = {"questions": [{"prompt": "Go on?"}], "result": {"text": "x" * 2000}}
            self.api.runs.CreateRun(
                pb.CreateRunRequest(engine="resumable", input=struct(asks), run_id=run_id)
            )
            self._note("create", run_id)
            match self.rng.randrange(3):
                case 0:
                    self._reply(run_id)
                case 1:
                    self.api.runs.CancelRun(pb.CancelRunRequest(run_id=run_id))
                    self._note("cancel", run_id)

    def _reply(self, run_id: str) -> None:
        waiting = run_pb2.RUN_STATUS_WAITING_USER
        until(
            lambda: self.api.runs.GetRun(pb.GetRunRequest(run_id=run_id)).run.status == waiting,
            f"{run_id} waits",
        )
        self.api.runs.SubmitReply(
            pb.SubmitReplyRequest(run_id=run_id, interaction_id=1, response=value(ANSWER))
        )
        self._note("reply", run_id)

    def _note(self, call: str, run_id: str) -> None:
        self.answered.append(Answered(time.time(), call, run_id))


def record(
    folder: Path,
    *,
    seed: int,
    runs: int,
    command: Callable[[Path], list[str]] = lambda trace: [*STRACE, str(trace)],
) -> Recording:
    """Let a service work in a new folder, killed and started again in between.

    Args:
        runs: how many runs each client creates at each start.
        command: returns what stands before the command of a service that is traced into a file.
    """
    traces, root = [folder / f"trace-{start}" for start in range(STARTS)], folder / "home"
    (root / TRUST_FILE).parent.mkdir(parents=True)
    (root / TRUST_FILE).write_bytes(USERS_TRUST)
    env = {"CODEX_HOME": str((root / TRUST_FILE).parent)}
    engine = replace(
        RESUMABLE, more={**RESUMABLE.more, "trust": "codex", "env_allow": ["PATH", *env]}
    )
    answered: list[Answered] = []
    # Starts by fork would not be traced.
    with Home(root, engines={"resumable": engine}, env=env, may_fork=False) as home:
        files = {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }
        for start, trace in enumerate(traces):
            home.prefix = tuple(command(trace))
            service, _ = home.start()
            clients = [
                _Client(
                    service.api(),
                    f"{start}-{number}",
                    Random(f"{seed} {start} {number}"),  # noqa: S311 - a plan
                )
                for number in range(CLIENTS)
            ]
            with ThreadPoolExecutor(CLIENTS) as pool:
                for done in [pool.submit(client.work, runs) for client in clients]:
                    done.result()
            answered += (each for client in clients for each in client.answered)
            if start + 1 < STARTS:
                service.kill()
            else:
                assert service.stop() == 0
    return Recording(
        root=root, files=files, calls=read_calls(traces, below=root), answered=answered
    )
