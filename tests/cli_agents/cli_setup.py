"""A real CLI with a home of its own and its model endpoint, as the engine of a service."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from cli_agents.clis import Cli
from cli_agents.model_endpoint import ASK, HANG, SHELL, ModelEndpoint
from runrecovery.v1 import run_pb2
from support.agent_cli import AgentCliSetup
from support.api import Api, status_word
from support.processes import environment_of
from support.service import Home
from support.waiting import until

PATIENCE_S: Final = 90.0
"""How long a CLI may take to start and to answer while other CLIs run."""

TEMPORARY: Final = "temporary"
"""The folder for temporary files of the CLI."""


def pids_of_sleep(duration: str) -> list[int]:
    """Return the pid of every `sleep DURATION` of this machine."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        with suppress(OSError):
            if Path(f"/proc/{name}/cmdline").read_bytes() == f"sleep\0{duration}\0".encode():
                found.append(int(name))
    return found


class RealCliSetup(AgentCliSetup):
    """A service whose engine is a real CLI. All of its paths are in the folder of the test."""

    def __init__(
        self,
        cli: Cli,
        folder: Path,
        endpoint: ModelEndpoint,
        *,
        unattended: bool = False,
        **keys: Any,
    ) -> None:
        self.cli = cli
        self.endpoint = endpoint
        self.run_id = f"{cli.name}-{uuid.uuid4().hex}"
        agent_home, service = folder / "agent-home", folder / "service"
        self.settings = cli.prepare(agent_home, endpoint.url)
        service.mkdir()
        temporary = folder / TEMPORARY  # Gemini CLI leaves a report of each error there
        temporary.mkdir()
        env = {
            **cli.environment(endpoint.url),
            "HOME": str(folder),
            "TMPDIR": str(temporary),
        }
        command = (str(cli.program), *cli.options, *(cli.unattended if unattended else ()))
        super().__init__(cli.preset, command, agent_home, partial(Home, service, env=env), **keys)

    def create_run(self, api: Api, word: str = ASK) -> None:
        """Create the run. Its prompt contains `task`, by which the endpoint recognises it."""
        api.create(self.cli.preset, {"prompt": f"{word} {self.task}"}, run_id=self.run_id)

    def for_another_run(self) -> RealCliSetup:
        """Return the setup for another run with the same service and the same agent home."""
        other = copy.copy(self)
        other.run_id = f"{self.cli.name}-{uuid.uuid4().hex}"
        return other

    @property
    def task(self) -> str:
        """Words that only the first prompt of this run contains."""
        return f"task of {self.run_id}"

    def until(self, api: Api, *statuses: str) -> run_pb2.Run:
        """Wait until the run has one of these statuses, and return it. CLIs start slowly."""

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

    def run_until_question(self, api: Api) -> run_pb2.Run:
        """Create the run, and wait for its question."""
        self.create_run(api)
        return self.until(api, "WAITING_USER")

    def run_until_model_hangs(self, api: Api) -> None:
        """Create a run whose model never ends its answer, and wait until that answer began."""
        self.create_run(api, HANG)
        until(lambda: self.endpoint.got(self.task), "the model was asked", timeout_s=PATIENCE_S)
        until(
            lambda: any(HANG in each.read_text() for each in self.sessions),
            "the CLI has stored the turn",
        )

    @property
    def session(self) -> Path:
        """The session file of the run; some CLIs create more files in a resumed turn."""
        return self.sessions[0]

    def session_ids_in_output(self, api: Api) -> set[str]:
        """Return the values that the stored output has in place of the session's id."""
        output = b"".join(piece.data for piece in api.output(self.run_id)).decode()
        events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        ids = [event.get("thread_id") or event.get("session_id") for event in events]
        return {str(session_id) for session_id in ids if session_id is not None}

    def run_two_sleeps(self, api: Api) -> str:
        """Create a run whose agent runs `sleep DURATION` twice, and return that unique duration.

        One of the two has left the agent's process session and its environment. Both run.
        """
        duration = f"300.{time.time_ns()}"
        self.create_run(api, f"{SHELL} env -i setsid sleep {duration} & sleep {duration}\n")
        until(lambda: len(pids_of_sleep(duration)) == 2, "both run", timeout_s=PATIENCE_S)
        return duration

    def processes(self) -> list[int]:
        """Return every process of this machine whose environment has the id of the run."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
        return [pid for pid in pids if environment_of(pid).get("RUNRECOVERY_RUN_ID") == self.run_id]

    def copy_to(self, folder: Path) -> None:
        """Copy logs, store, agent home and the model's requests, for the analysis of a failure."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            self.home.path.parent,
            folder,
            symlinks=True,
            ignore=shutil.ignore_patterns(TEMPORARY),  # sockets in it cannot be copied
            ignore_dangling_symlinks=True,
        )
        requests = [{"path": each.path, "texts": each.texts} for each in self.endpoint.requests]
        record = {
            "requests": requests,
            "outside": self.endpoint.outside,
            "unknown": self.endpoint.unknown,
        }
        (folder / "endpoint.json").write_text(json.dumps(record, indent=1), "utf-8")
