"""Permission questions with the real Claude Code: over kills, and no call runs twice by itself."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from cli_agents.cli_setup import PATIENCE_S, RealCliSetup
from cli_agents.clis import CLAUDE, CLAUDE_NEWEST, Cli
from cli_agents.model_endpoint import ModelEndpoint, Script
from cli_agents.tool_calls import CallingModel, DelegatingModel
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from support.api import Api, status_word
from support.waiting import until

NewSetup = Callable[..., RealCliSetup]

TRIED: Final = (CLAUDE, CLAUDE_NEWEST)
RESTARTS: Final = 20
NOTICE: Final = "The service that runs you was restarted."
TURN_S: Final = 5.0
"""An idle machine needs about this time from the reply to the end of the run."""


def appends(name: str) -> str:
    """Return a command that leaves a mark."""
    return f"echo {name} >> effects"


@pytest.fixture
def steps(request: pytest.FixtureRequest) -> list[list[str]]:
    """The commands of the model, by message."""
    return getattr(request, "param", [[appends("a")]])


@pytest.fixture
def model(request: pytest.FixtureRequest, steps: list[list[str]]) -> Script:
    """The model of the endpoint."""
    return getattr(request, "param", CallingModel(steps))


@pytest.fixture
def endpoint(model: Script) -> Iterator[ModelEndpoint]:
    """An endpoint with that model."""
    with ModelEndpoint(model) as endpoint:
        yield endpoint


class Asking:
    """A run whose engine asks for Bash, though the options of its command allow it."""

    def __init__(self, new_setup: NewSetup, **keys: Any) -> None:
        asks = {"permissions": "ask", "ask_for": ["Bash"], **keys}
        self.setup = new_setup(unattended=True, **asks)

    def ask(self, api: Api) -> run_pb2.PendingInteraction:
        """Create the run, and return its question."""
        self.setup.create_run(api)
        return self.asked(api)

    def asked(self, api: Api) -> run_pb2.PendingInteraction:
        """Return the question that the run waits with, once it does."""
        return self.setup.until(api, "WAITING_USER").pending_interaction

    @property
    def effects(self) -> list[str]:
        """The marks of the commands that ran."""
        file = next(self.setup.home.data.glob("runs/*/1/workspace/effects"), Path("/gone"))
        return file.read_text().split() if file.exists() else []

    def results(self, api: Api) -> list[str]:
        """Wait for the end of the run, and return the results that the model was shown."""
        run = self.setup.until(api, "SUCCEEDED", "FAILED")
        assert status_word(run) == "SUCCEEDED", run
        assert self.setup.endpoint.violations == []
        assert self.setup.settings.changed() == []
        not_seen = [each.events("execution.session_not_seen") for each in self.setup.home.services]
        assert not any(not_seen)
        assert self.setup.session_ids_in_output(api) <= {"[secret]"}
        found: list[str] = MessageToDict(run.output)["results"]
        return found

    @property
    def model_calls(self) -> int:
        """How often the model was asked to go on."""
        return sum(request.offers_tools for request in self.setup.endpoint.requests)


def test_a_permission_question_survives_twenty_kills_and_its_call_runs_once(
    cli: Cli, new_setup: NewSetup, round_number: int
) -> None:
    run = Asking(new_setup)
    service, api = run.setup.home.start()
    asked = run.ask(api)
    for _ in range(RESTARTS):
        service.kill()
        service, api = run.setup.home.start()
        kept = api.get(run.setup.run_id)
        assert kept.recovery.recovery_reason == "resumable_waiting_preserved"
        assert kept.pending_interaction == asked
    assert (run.setup.processes(), run.effects, run.model_calls) == ([], [], 1)

    api.reply(run.setup.run_id, 1, "allow")

    assert len(run.results(api)) == 1
    assert (run.effects, run.model_calls) == (["a"], 2)
    assert MessageToDict(asked.tool_call)["tool"] == "Bash"
    assert MessageToDict(asked.tool_call)["input"]["command"] == appends("a")


@pytest.mark.parametrize(
    ("answer", "effects", "told"),
    [
        ({"decision": "allow", "input": {"command": appends("b")}}, ["b"], ""),
        ({"decision": "deny", "reason": "Ask Ann."}, [], "The user refused this call: Ask Ann."),
    ],
    ids=["changed", "denied"],
)
def test_an_answer_changes_the_call_or_tells_the_model_why_not(
    cli: Cli, new_setup: NewSetup, answer: Any, effects: list[str], told: str, round_number: int
) -> None:
    run = Asking(new_setup)
    service, api = run.setup.home.start()
    run.ask(api)
    service.kill()
    _, api = run.setup.home.start()

    api.reply(run.setup.run_id, 1, answer)
    (result,) = run.results(api)

    assert told in result
    assert run.effects == effects


@pytest.mark.parametrize("steps", [[[appends(name) for name in "abc"]]], indirect=True)
def test_of_three_calls_in_one_message_each_runs_once_and_no_result_is_lost(
    cli: Cli, new_setup: NewSetup, round_number: int
) -> None:
    run = Asking(new_setup)
    service, api = run.setup.home.start()
    first = run.ask(api)
    service.kill()
    _, api = run.setup.home.start()
    commands = [MessageToDict(first.tool_call)["input"]["command"]]
    api.reply(run.setup.run_id, 1, "allow")
    for number in (2, 3):
        asked = run.asked(api)
        commands.append(MessageToDict(asked.tool_call)["input"]["command"])
        api.reply(run.setup.run_id, number, "allow")

    shown = run.results(api)

    assert sorted(commands) == [appends(name) for name in "abc"]
    assert sorted(run.effects) == ["a", "b", "c"]
    assert sum("completed with no output" in text for text in shown) == 3


@pytest.mark.parametrize("steps", [[[f"{appends('a')}; sleep 300"]]], indirect=True)
def test_a_call_that_was_allowed_and_killed_is_not_run_again(
    cli: Cli, new_setup: NewSetup, round_number: int
) -> None:
    run = Asking(new_setup, restart_policy="resume")
    service, api = run.setup.home.start()
    run.ask(api)
    api.reply(run.setup.run_id, 1, "allow")
    until(lambda: run.effects, "the call has begun", timeout_s=PATIENCE_S)
    recorded = "SELECT 1 FROM interaction WHERE state = 'DELIVERED'"
    until(lambda: run.setup.home.rows(recorded), "the service has it on record")
    service.kill()
    _, api = run.setup.home.start()

    assert len(run.results(api)) <= 1
    assert run.effects == ["a"]
    assert run.setup.endpoint.got(NOTICE)
    assert api.get(run.setup.run_id).recovery.recovery_reason == "interrupted_turn_resumed"


def test_a_kill_at_a_random_moment_after_the_reply_runs_no_call_twice(
    cli: Cli, new_setup: NewSetup, round_number: int
) -> None:
    run = Asking(new_setup, restart_policy="resume")
    service, api = run.setup.home.start()
    run.ask(api)
    api.reply(run.setup.run_id, 1, "allow")
    time.sleep(random.Random(round_number).uniform(0, TURN_S))  # noqa: S311 - the moment is the test
    service.kill()
    _, api = run.setup.home.start()

    ended = run.setup.until(api, "SUCCEEDED", "FAILED", "WAITING_USER")

    assert status_word(ended) == "SUCCEEDED", ended
    assert run.effects in ([], ["a"])  # none: it was allowed, and killed before it began
    assert run.setup.endpoint.violations == []


@pytest.mark.parametrize("model", [DelegatingModel(appends("a"))], indirect=True)
def test_a_call_of_a_subagent_is_denied_and_the_main_agent_learns_why(
    cli: Cli, new_setup: NewSetup, round_number: int
) -> None:
    run = Asking(new_setup)
    _, api = run.setup.home.start()
    run.setup.create_run(api)

    (result,) = run.results(api)

    assert "which only the main agent can ask for" in result
    assert run.effects == []
    assert api.interactions(run.setup.run_id) == []


def test_a_hook_that_fails_blocks_a_call_that_the_options_allow(
    cli: Cli, new_setup: NewSetup, round_number: int
) -> None:
    run = Asking(new_setup)
    setup = run.setup
    hides = 'rm -f ../permissions/*.json; exec "$0" "$@"'
    engine = setup.home.engines["claude"]
    command = ("/bin/sh", "-c", hides, *engine.command)
    setup.home.engines["claude"] = replace(engine, command=command)
    setup.home.write_config()
    _, api = setup.home.start()
    setup.create_run(api)

    (result,) = run.results(api)

    assert "runrecovery cannot decide about this call" in result
    assert run.effects == []


def test_a_user_who_disables_hooks_does_not_disable_ours(
    cli: Cli, new_setup: NewSetup, round_number: int
) -> None:
    run = Asking(new_setup)
    settings = run.setup.agent_home / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"disableAllHooks": True}))
    _, api = run.setup.home.start()

    run.ask(api)

    assert run.effects == []
