"""Turns of agent CLIs that a kill or a deploy interrupts: the next process completes them.

The CLIs are pretended, with what a kill leaves of a session of the real ones:
tests/agents/pretend_cli.py. `make test-agents` tries the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from support.api import Api, status_word
from support.engines import AGENTS, EngineSpec
from support.processes import environment_of, processes_below
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]

CLIS: Final = ("codex", "gemini", "claude")
MOMENTS: Final = ("id", "tool", "result")
"""Where a turn stops until it is killed: as its session's id is printed, in a tool, after one."""
WITH_SESSION: Final = ("tool", "result")


class Turn:
    """A run that has a CLI run three commands, and the folder in which each leaves its mark."""

    def __init__(self, folder: Path, cli: str, moment: str) -> None:
        self.cli, self.moment = cli, moment
        self.run_id = folder.name
        self.folder = folder
        folder.mkdir()
        (folder / f"stop-{moment}").touch()

    def create(self, api: Api) -> None:
        """Create the run."""
        api.create(self.cli, {"prompt": f"STEPS {self.folder}"}, run_id=self.run_id)

    @property
    def has_stopped(self) -> bool:
        """Whether the turn is at its moment."""
        return (self.folder / "stopped").exists()

    def go_on(self) -> None:
        """Let the next process pass the moment."""
        (self.folder / f"stop-{self.moment}").unlink()

    def marks(self, name: str) -> list[str]:
        """Return the ids of the calls that have begun, or have ended."""
        return (self.folder / name).read_text().split()

    def assert_completed(self, run: run_pb2.Run) -> None:
        """Check how the run ended, and that no command ran twice by itself."""
        assert status_word(run) == "SUCCEEDED", run
        notified = self.moment in WITH_SESSION
        assert MessageToDict(run.output) == {"steps": 3, "notified": notified}, self.run_id
        assert (run.attempt, run.resume_count) == ((1, 1) if notified else (2, run.resume_count))
        begun, ended = self.marks("begun"), self.marks("ended")
        assert len(begun) == len(set(begun))
        assert [call[0] for call in ended] == ["1", "2", "3"]
        in_tool = self.moment == "tool"  # the model wants the interrupted step again
        assert [call[0] for call in begun] == (["1", "2", "2", "3"] if in_tool else ["1", "2", "3"])
        used = run.usage
        tokens = (used.input_tokens, used.cached_input_tokens, used.output_tokens)
        if (self.cli, self.moment) == ("claude", "tool"):
            # Claude Code had printed the interrupted call, with one token of its output.
            assert tokens == (500, 300, 41)
        else:  # of the three calls that ended, and of the answer
            assert tokens == (400, 240, 40)
        assert used.reasoning_output_tokens == (0 if self.cli == "claude" else 16)


def home_of(new_home: NewHome, tmp_path: Path, *, runs: int) -> Home:
    """Return a service with each CLI as an engine, whose interrupted turns are resumed."""
    engines = {}
    for cli in CLIS:
        command = (sys.executable, "-I", "-S", str(AGENTS / "pretend_cli.py"), cli)
        place = tmp_path / f"home-of-{cli}"
        place.mkdir()
        more = {"preset": cli, "agent_home": str(place), "restart_policy": "resume"}
        engines[cli] = EngineSpec(command=command, more=more)
    return new_home(engines=engines, max_concurrent=runs)


def until_stopped(api: Api, turns: list[Turn]) -> None:
    """Create the runs, and wait until each is at its moment, with its session on record."""
    for turn in turns:
        turn.create(api)
    until(lambda: all(turn.has_stopped for turn in turns), "each turn is at its moment")
    until(
        lambda: all(api.get(turn.run_id).session.has_handle for turn in turns),
        "each session is on record",
    )


def test_turns_that_are_killed_at_any_moment_are_completed_and_no_command_runs_twice(
    new_home: NewHome, tmp_path: Path
) -> None:
    turns = [
        Turn(tmp_path / f"{cli}-{moment}", cli, moment) for cli, moment in product(CLIS, MOMENTS)
    ]
    home = home_of(new_home, tmp_path, runs=len(turns))
    service, api = home.start()
    until_stopped(api, turns)
    service.kill()
    for turn in turns:
        turn.go_on()
    _, api = home.start()

    ended = {turn.run_id: api.until_ended(turn.run_id) for turn in turns}

    for turn in turns:
        turn.assert_completed(ended[turn.run_id])


def test_a_deploy_in_the_middle_of_eight_turns_fails_none(
    new_home: NewHome, tmp_path: Path
) -> None:
    kinds = [*product(CLIS, WITH_SESSION), ("codex", "tool"), ("gemini", "result")]
    turns = [
        Turn(tmp_path / f"{cli}-{moment}-{number}", cli, moment)
        for number, (cli, moment) in enumerate(kinds)
    ]
    home = home_of(new_home, tmp_path, runs=len(turns))
    service, api = home.start()
    until_stopped(api, turns)

    assert service.stop() == 0
    below = processes_below(home.data)
    assert [pid for pid in below if "RUNRECOVERY_RUN_ID" in environment_of(pid)] == []
    for turn in turns:
        turn.go_on()
    _, api = home.start()

    assert len(turns) == 8
    for turn in turns:
        turn.assert_completed(api.until_ended(turn.run_id))


WHEN_ALLOWED: Final = 'until test -e "$0"; do sleep 0.01; done; exec "$@"'


def test_a_call_counts_that_claude_printed_while_the_service_could_not_read(
    new_home: NewHome, tmp_path: Path
) -> None:
    """Its session file does not have the call yet."""
    go = tmp_path / "go"
    home = home_of(new_home, tmp_path, runs=1)
    claude = home.engines["claude"]
    command = ("/bin/sh", "-c", WHEN_ALLOWED, str(go), *claude.command)
    home.engines["claude"] = replace(claude, command=command)
    home.write_config()
    service, api = home.start()
    turn = Turn(tmp_path / "turn", "claude", "tool")
    turn.create(api)
    until(home.agents, "the process runs")
    service.suspend()
    go.touch()
    until(lambda: turn.has_stopped, "the turn is in a tool")
    service.kill()
    turn.go_on()
    _, api = home.start()

    turn.assert_completed(api.until_ended("turn"))
