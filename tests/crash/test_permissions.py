"""Permission questions over kills of the service: asked, answered, and never allowed twice.

The CLI is pretended: tests/agents/pretend_cli.py runs the hook as the real one does, by a shell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from support.agent_cli import AgentCliSetup
from support.api import Api, refused, status_word
from support.engines import AGENTS
from support.processes import processes_below
from support.service import Home
from support.stores import query
from support.waiting import until

NewHome = Callable[..., Home]

ONE_AT_A_TIME: Final = "This call was not run. It needs the user's permission, and the user"
REFUSED: Final = "The user refused this call: Not today."
RUN: Final = "echo ran >> effects"


class Asking(AgentCliSetup):
    """A service whose engine asks before it calls Bash, and the workspace of its run "r"."""

    def __init__(
        self, new_home: NewHome, tmp_path: Path, *options: str, calls: str = RUN, **keys: object
    ) -> None:
        program = str(AGENTS / "pretend_cli.py")
        command = (sys.executable, "-I", "-S", program, "claude", *options)
        asks = {"permissions": "ask", "ask_for": ["Bash(echo *)"], **keys}
        super().__init__("claude", command, tmp_path / "agent-home", new_home, **asks)
        self.trust_file.parent.mkdir(parents=True)
        self.trust_file.write_text("{}")
        self.task = {"prompt": f"CALLS: {calls}"}

    def ask(self, api: Api) -> run_pb2.Run:
        """Create the run, and wait for its question."""
        api.create("claude", self.task, run_id="r")
        return api.until_status("r", "WAITING_USER")

    @property
    def attempt(self) -> Path:
        """The folder of the run's attempt."""
        (found,) = self.home.data.glob("runs/*/1")
        return found

    @property
    def effects(self) -> list[str]:
        """What the calls that ran have appended to a file."""
        file = self.attempt / "workspace" / "effects"
        return file.read_text().split() if file.exists() else []


def results(run: run_pb2.Run) -> list[str]:
    """Return the results of calls that the model has seen."""
    assert status_word(run) == "SUCCEEDED", run
    found: list[str] = MessageToDict(run.output)["results"]
    return found


def test_a_permission_question_survives_restarts_and_its_call_runs_once(
    new_home: NewHome, tmp_path: Path
) -> None:
    setup = Asking(new_home, tmp_path)
    service, api = setup.home.start()
    waiting = setup.ask(api)
    asked = waiting.pending_interaction
    assert asked.kind == run_pb2.INTERACTION_KIND_RISK_ACK
    assert MessageToDict(asked.tool_call, preserving_proto_field_name=True) == {
        "call_id": asked.tool_call.call_id,
        "tool": "Bash",
        "input": {"command": RUN},
        "workspace": str(setup.attempt / "workspace"),
        "pattern": "Bash(echo *)",
    }
    assert [(each.label, each.value.string_value) for each in asked.options] == [
        ("Allow", "allow"), ("Deny", "deny")
    ]  # fmt: skip
    for _ in range(2):
        service.kill()
        service, api = setup.home.start()
        assert api.get("r").recovery.recovery_reason == "resumable_waiting_preserved"
    assert api.get("r").pending_interaction == asked
    assert (processes_below(setup.attempt), setup.effects) == ([], [])

    assert all(not each.events("execution.session_not_seen") for each in setup.home.services)

    refusal = refused(lambda: api.reply("r", 1, "yes"))
    assert (refusal.code.name, refusal.fields) == ("INVALID_ARGUMENT", ("response",))
    api.reply("r", 1, "allow")
    ended = api.until_ended("r")

    assert results(ended) == [""]
    assert setup.effects == ["ran"]
    assert api.interactions("r")[0].tool_call == asked.tool_call


@pytest.mark.parametrize(
    ("answer", "effects", "result"),
    [
        ({"decision": "allow", "input": {"command": "echo changed >> effects"}}, ["changed"], ""),
        ({"decision": "deny", "reason": "Not today."}, [], REFUSED),
    ],
)
def test_an_answer_changes_the_call_or_tells_the_model_why_not(
    new_home: NewHome, tmp_path: Path, answer: Any, effects: list[str], result: str
) -> None:
    setup = Asking(new_home, tmp_path)
    _, api = setup.home.start()
    setup.ask(api)

    api.reply("r", 1, answer)
    ended = api.until_ended("r")

    assert (results(ended), setup.effects) == ([result], effects)


def test_every_call_is_asked_for_anew_and_calls_that_do_not_match_are_not(
    new_home: NewHome, tmp_path: Path
) -> None:
    calls = f"{RUN}\nCALLS: printf 'free\\n' >> effects\nCALLS: {RUN}"
    setup = Asking(new_home, tmp_path, calls=calls)
    _, api = setup.home.start()
    first = setup.ask(api).pending_interaction

    api.reply("r", 1, "allow")
    second = api.until_status("r", "WAITING_USER").pending_interaction
    assert setup.effects == ["ran", "free"]
    api.reply("r", 2, "allow")
    ended = api.until_ended("r")

    assert (second.tool_call.input, second.interaction_id) == (first.tool_call.input, 2)
    assert second.tool_call.call_id != first.tool_call.call_id
    assert (results(ended), setup.effects) == ([""] * 3, ["ran", "free", "ran"])


def test_of_several_calls_in_one_message_one_is_asked_for_and_no_result_is_lost(
    new_home: NewHome, tmp_path: Path
) -> None:
    calls = " | ".join(f"echo {name} >> effects" for name in "abc")
    setup = Asking(new_home, tmp_path, calls=calls)
    service, api = setup.home.start()
    asked = setup.ask(api).pending_interaction.tool_call
    assert not service.events("execution.session_not_seen")
    service.kill()
    service, api = setup.home.start()
    name = MessageToDict(asked)["input"]["command"].split()[1]

    api.reply("r", 1, "allow")
    ended = api.until_ended("r")

    seen = sorted(results(ended))
    assert setup.effects == [name]
    assert [text.startswith(ONE_AT_A_TIME) for text in seen].count(True) == 2
    assert "" in seen  # of the call that ran


def test_nobody_answers_and_the_call_is_denied(new_home: NewHome, tmp_path: Path) -> None:
    setup = Asking(new_home, tmp_path, require_user_reply=False, session_timeout_s=0.3)
    _, api = setup.home.start()
    api.create("claude", setup.task, run_id="r")

    (result,) = results(api.until_ended("r"))

    assert result.startswith("Nobody answered in time whether this call may run")
    assert setup.effects == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pretend-version", "2.1.88"), "needs version 2.1.89 of {}; this one is 2.1.88"),
        (("--pretend-version", "none"), "and `{} --version` reported none"),
    ],
)
def test_a_cli_that_cannot_defer_a_call_is_not_launched(
    new_home: NewHome, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    setup = Asking(new_home, tmp_path, *options)
    _, api = setup.home.start()
    api.create("claude", setup.task, run_id="r")

    failed = api.until_ended("r")

    assert failed.error.code == "LAUNCH_FAILED"
    assert message.format(sys.executable) in failed.error.message
    assert (setup.sessions, setup.effects) == ([], [])


@pytest.mark.parametrize("policy", ["fail", "resume"])
def test_a_call_that_was_allowed_and_interrupted_is_not_run_again(
    new_home: NewHome, tmp_path: Path, policy: str
) -> None:
    setup = Asking(new_home, tmp_path, calls=f"{RUN}; sleep 50", restart_policy=policy)
    service, api = setup.home.start()
    setup.ask(api)
    api.reply("r", 1, "allow")
    until(lambda: setup.effects, "the call has begun")
    until(
        lambda: query(setup.home, "SELECT state FROM interaction") == [("DELIVERED",)],
        "it is on record that the process has the permission",
    )
    service.kill()
    _, api = setup.home.start()

    ended = api.until_ended("r")

    assert setup.effects == ["ran"]
    if policy == "fail":
        assert ended.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
        assert ended.recovery.recovery_reason == "running_interrupted"
    else:
        assert ended.recovery.recovery_reason == "interrupted_turn_resumed"
        assert results(ended) == []  # the model sees no result of the call, and does not repeat it


@pytest.mark.parametrize("policy", ["fail", "resume"])
def test_a_permission_that_was_used_before_it_was_on_record_is_not_given_again(
    new_home: NewHome, tmp_path: Path, policy: str
) -> None:
    # As after a kill of the service right after the hook has allowed the call.
    setup = Asking(new_home, tmp_path, restart_policy=policy)
    _, api = setup.home.start()
    setup.ask(api)
    (setup.attempt / "permissions" / "1.used").write_text("toolu_")

    api.reply("r", 1, "allow")
    ended = api.until_ended("r")

    assert setup.effects == []
    if policy == "fail":
        assert ended.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
        assert "The permission was already used" in ended.error.message
    else:
        assert results(ended) == []
        assert ended.resume_count == 1
