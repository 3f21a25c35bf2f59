"""What one test has before it: a CLI with a home of its own, its endpoint, and a service."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from cli_agents.clis import Cli
from cli_agents.endpoints import ASK, HANG, SHELL, ModelEndpoint
from runrecovery.v1 import run_pb2
from support.api import Api, status_word
from support.engines import EngineSpec
from support.processes import environment_of
from support.service import Home
from support.waiting import until

PATIENCE_S: Final = 90.0
"""How long a CLI may take to start and to speak, several of them at a time."""


def named(word: str) -> list[int]:
    """Return every process of this machine that is a `sleep` with this word."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        with suppress(OSError):
            if Path(f"/proc/{name}/cmdline").read_bytes() == f"sleep\0{word}\0".encode():
                found.append(int(name))
    return found


class Desk:
    """One CLI below one service. Every path of it lies in the test's own folder."""

    def __init__(
        self,
        cli: Cli,
        place: Path,
        endpoint: ModelEndpoint,
        *,
        unattended: bool = False,
        **more: Any,
    ) -> None:
        self.cli = cli
        self.endpoint = endpoint
        self.run_id = f"{cli.name}-{uuid.uuid4().hex}"
        self.agent_home = place / "agent-home"
        self.settings = cli.prepare(self.agent_home, endpoint.url)
        (place / "service").mkdir()
        given = {"preset": cli.name, "agent_home": str(self.agent_home), **more}
        command = (cli.name, *cli.options, *(cli.unattended if unattended else ()))
        self.home = Home(
            place / "service",
            engines={cli.name: EngineSpec(command=command, more=given)},
            env={**cli.environment(endpoint.url), "HOME": str(place)},
        )

    def begin(self, api: Api, word: str = ASK) -> None:
        """Create the run. Its task names it, so that the endpoint can tell what it saw."""
        api.create(self.cli.name, {"prompt": f"{word} {self.task}"}, run_id=self.run_id)

    def another(self) -> Desk:
        """Return the desk of another run of the same service and the same home of the CLI."""
        other = copy.copy(self)
        other.run_id = f"{self.cli.name}-{uuid.uuid4().hex}"
        return other

    @property
    def task(self) -> str:
        """Words of the first turn that nothing else holds."""
        return f"task of {self.run_id}"

    def until(self, api: Api, *statuses: str) -> run_pb2.Run:
        """Wait until the run is in one of these statuses; CLIs start slowly."""

        def look() -> run_pb2.Run | None:
            run = api.get(self.run_id)
            if status_word(run) in statuses:
                return run
            assert status_word(run) in {"QUEUED", "RUNNING", "WAITING_USER"}, f"it ended: {run}"
            return None

        what = f"the run is {' or '.join(statuses)}"
        run = until(look, what, timeout_s=PATIENCE_S)
        assert run is not None
        return run

    def waiting(self, api: Api) -> run_pb2.Run:
        """Create the run, and wait for its question."""
        self.begin(api)
        return self.until(api, "WAITING_USER")

    def hanging(self, api: Api) -> None:
        """Create a run whose turn does not end, and wait until its model speaks."""
        self.begin(api, HANG)
        until(lambda: self.endpoint.saw(self.task), "its model was asked", timeout_s=PATIENCE_S)
        until(lambda: any(HANG in each.read_text() for each in self.sessions), "it keeps the turn")

    @property
    def sessions(self) -> list[Path]:
        """The session files of the CLI, the oldest first."""
        return sorted(self.agent_home.glob(self.cli.sessions))

    @property
    def session(self) -> Path:
        """The one session file of the run, without what a later turn has made beside it."""
        return self.sessions[0]

    def handles_shown(self, api: Api) -> set[str]:
        """Return what stands in the output that is kept where the CLI has named its session."""
        told = b"".join(piece.data for piece in api.output(self.run_id)).decode()
        events = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        marks = [event.get("thread_id") or event.get("session_id") for event in events]
        return {str(mark) for mark in marks if mark is not None}

    def spawn(self, api: Api) -> str:
        """Create a run whose agent starts two commands, one of which leaves its session and its
        environment; wait until both run, and return the word that both have in their command."""
        word = f"300.{time.time_ns()}"
        self.begin(api, f"{SHELL} env -i setsid sleep {word} & sleep {word}\n")
        until(lambda: len(named(word)) == 2, "both commands run", timeout_s=PATIENCE_S)
        return word

    def processes(self) -> list[int]:
        """Return every process of this machine that bears the run's mark."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
        mark = ("RUNRECOVERY_RUN_ID", self.run_id)
        return [pid for pid in pids if mark in environment_of(pid).items()]

    def trusts(self) -> bool:
        """True when the CLI's file lets it trust a workspace of this service."""
        return self.settings.trusts(self.home.data)

    def keep(self, place: Path) -> None:
        """Copy what a failed round left: logs, store, the CLI's home, and what its model saw."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.home.path.parent, place, symlinks=True, ignore_dangling_symlinks=True)
        asked = [{"path": each.path, "texts": each.texts} for each in self.endpoint.asked]
        seen = {"asked": asked, "outside": self.endpoint.outside, "unknown": self.endpoint.unknown}
        (place / "endpoint.json").write_text(json.dumps(seen, indent=1), "utf-8")
