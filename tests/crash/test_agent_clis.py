"""Engines with a preset, over a kill of the service.

The CLIs are pretended: tests/agents/pretend_cli.py prints what the real ones print, and keeps
sessions as they do. `make test-agents` tries the real ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.agent_cli import AgentCliSetup
from support.api import Api, refused, status_word
from support.engines import AGENTS
from support.processes import environment_of, processes_below
from support.service import Home
from support.sessions import HOME_VARIABLE
from support.stores import query
from support.waiting import until

NewHome = Callable[..., Home]

TASK: Final = {"prompt": "Plan the journey. /help"}


USER_SETTINGS: Final[Mapping[str, str]] = {
    "codex": '# mine\nmodel = "m"  # best\n\n[projects."/elsewhere"]\ntrust_level = "trusted"\n',
    "gemini": '{\r\n\t"/elsewhere": "DO_NOT_TRUST"\r\n}',
    "claude": (
        '{"theme": "dark", "projects": {"/elsewhere": {"hasTrustDialogAccepted": false}}}\n'
    ),
}
"""What the user of each CLI has in the file that trust entries go into."""

every_cli = pytest.mark.parametrize("cli", USER_SETTINGS)


class PretendCliSetup(AgentCliSetup):
    """A service whose engine is tests/agents/pretend_cli.py, and the home of that CLI."""

    def __init__(
        self,
        new_home: NewHome,
        tmp_path: Path,
        cli: str,
        *,
        wrapper: Sequence[str] = (),
        **keys: object,
    ) -> None:
        self.cli = cli
        command = (*wrapper, sys.executable, "-I", "-S", str(AGENTS / "pretend_cli.py"), cli)
        super().__init__(cli, command, tmp_path / "agent-home", new_home, **keys)
        self.trust_file.parent.mkdir(parents=True)
        self.trust_file.write_bytes(USER_SETTINGS[cli].encode())

    @property
    def session(self) -> Path:
        """The one session file."""
        (found,) = self.sessions
        return found

    def run_until_question(self, api: Api, task: Mapping[str, str] = TASK) -> run_pb2.Run:
        """Create the run "r", and wait for its question."""
        api.create(self.cli, dict(task), run_id="r")
        return api.until_status("r", "WAITING_USER")

    def user_settings_are_unchanged(self) -> bool:
        """Return whether the user's file is as before; Claude Code itself counts starts there."""
        text = self.trust_file.read_bytes().decode()
        if self.cli != "claude":
            return text == USER_SETTINGS[self.cli]
        kept = json.loads(text)
        kept.pop("numStartups")
        return bool(kept == json.loads(USER_SETTINGS[self.cli]))


@every_cli
def test_a_conversation_continues_after_a_kill(new_home: NewHome, tmp_path: Path, cli: str) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    service, api = setup.home.start()

    waiting = setup.run_until_question(api)
    assert waiting.pending_interaction.prompt == "Where to?"
    assert [option.label for option in waiting.pending_interaction.options] == ["Köln", "Ulm"]
    assert waiting.session.type == cli
    assert setup.trusts()
    service.kill()
    service, api = setup.home.start()

    assert api.get("r").recovery.recovery_reason == "resumable_waiting_preserved"
    assert setup.trusts()
    api.reply("r", 1, "/Köln")
    ended = api.until_ended("r")

    assert status_word(ended) == "SUCCEEDED", ended
    output = MessageToDict(ended.output)
    assert output["answer"] == "The user answers:\n\n/Köln\n"
    assert output["first"].endswith("Your task:\n\nPlan the journey. /help\n")
    assert setup.user_settings_are_unchanged()
    assert query(setup.home, "SELECT 1 FROM trust_entry WHERE removed_at IS NULL") == []


@every_cli
def test_the_usage_of_a_conversation_is_counted_once_over_a_kill(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    """Codex and Claude Code report the total of the session; no CLI reports a killed turn."""
    setup = PretendCliSetup(new_home, tmp_path, cli, restart_policy="resume")
    service, api = setup.home.start()
    setup.run_until_question(api)
    api.reply("r", 1, "HANG_ONCE")
    until(lambda: b"HANG_ONCE" in setup.session.read_bytes(), "the model is called")
    service.kill()
    service, api = setup.home.start()
    resumed = api.until_ended("r")
    assert status_word(resumed) == "SUCCEEDED", resumed

    calls = 2
    assert MessageToDict(resumed.usage, preserving_proto_field_name=True) == {
        "input_tokens": str(100 * calls),
        "cached_input_tokens": str(60 * calls),
        "output_tokens": str(10 * calls),
        **({} if cli == "claude" else {"reasoning_output_tokens": str(4 * calls)}),
        **({"cost_usd": 0.25 * calls} if cli == "claude" else {}),
        **({} if cli == "codex" else {"model": "m"}),
    }
    (engine,) = api.status().engine_usage
    assert (engine.engine, engine.turns, engine.usage.output_tokens) == (cli, 2, 10 * calls)


def test_a_run_is_reopened_only_with_a_session_that_exists(
    new_home: NewHome, tmp_path: Path
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, "codex")
    service, api = setup.home.start()
    setup.run_until_question(api)
    service.kill()
    session, whole = setup.session, setup.session.read_bytes()
    session.unlink()
    service, api = setup.home.start()
    assert api.get("r").recovery.recovery_reason == "session_handle_lost"

    def reopen(**how: Any) -> run_pb2.Run:
        return api.runs.ReopenRun(pb.ReopenRunRequest(run_id="r", **how), timeout=20).run

    own = session.stem[-36:]
    for handle in (own, own[:-1] + ("0" if own[-1] != "0" else "1"), "latest"):
        refusal = refused(lambda handle=handle: reopen(session_handle=handle))  # type: ignore[misc]
        assert refusal.reason == "SESSION_NOT_RESUMABLE"
    session.write_bytes(whole)

    assert status_word(reopen(session_handle=own)) == "WAITING_USER"


def test_a_session_id_with_an_impossible_time_does_not_stop_a_start(
    new_home: NewHome, tmp_path: Path
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, "codex")
    service, api = setup.home.start()
    api.create("codex", {"prompt": "FAR_FUTURE"}, run_id="r")
    api.until_status("r", "WAITING_USER")
    assert "ffffffff-ffff-7fff-8fff-ffffffffffff" in setup.session.name
    for _ in range(2):
        service.kill()
        service, api = setup.home.start()

        assert api.get("r").recovery.recovery_reason == "resumable_waiting_preserved"

    api.reply("r", 1, "Ulm")
    assert status_word(api.until_ended("r")) == "SUCCEEDED"


@every_cli
def test_a_run_is_kept_whose_session_file_the_service_has_never_seen(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # The CLI finds its trust there by its own settings; the service's entry is for the workspace.
    kept = tmp_path / "in a container"
    kept.mkdir()
    script = f'cd "$0"; export {HOME_VARIABLE[cli]}="$1"; shift; exec "$@"'
    if cli == "gemini":
        trusted = kept / ".gemini" / "trustedFolders.json"
        trusted.parent.mkdir()
        trusted.write_text(json.dumps({str(elsewhere): "TRUST_FOLDER"}))
    wrapper = ("/bin/sh", "-c", script, str(elsewhere), str(kept))
    setup = PretendCliSetup(new_home, tmp_path, cli, wrapper=wrapper)
    service, api = setup.home.start()
    setup.run_until_question(api)
    (logged,) = service.events("execution.session_not_seen")
    assert logged["reason"] == "missing"
    service.kill()
    service, api = setup.home.start()

    assert api.get("r").recovery.recovery_reason == "resumable_waiting_preserved"
    api.reply("r", 1, "Ulm")
    assert status_word(api.until_ended("r")) == "SUCCEEDED"


@every_cli
def test_the_session_id_is_in_no_output_and_no_log(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    service, api = setup.home.start()
    setup.run_until_question(api)
    api.reply("r", 1, "x")
    ended = api.until_ended("r")
    ((handle,),) = query(setup.home, "SELECT DISTINCT session_value FROM run") or [("",)]
    name = setup.session.stem

    stdout = b"".join(piece.data for piece in api.output("r"))
    stderr = b"".join(piece.data for piece in api.output("r", channel=pb.OUTPUT_CHANNEL_STDERR))

    assert status_word(ended) == "SUCCEEDED"
    assert handle is None
    assert b"[secret]" in stdout
    assert stderr == b"in [secret]\n" * 2
    for secret in (name, name[-36:]):
        assert secret.encode() not in stdout
        assert secret not in service.text


DAMAGES: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "none": lambda whole: whole,
    "cut_in_half": lambda whole: whole[: len(whole) // 2],
    "cut_at_a_line": lambda whole: b"".join(whole.splitlines(keepends=True)[:-1]),
    "last_byte": lambda whole: whole[:-1],
}


@every_cli
def test_a_restart_fails_each_waiting_run_whose_session_is_damaged(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    service, api = setup.home.start()
    files: dict[str, Path] = {}
    for damage in ("removed", *DAMAGES):
        api.create(cli, TASK, run_id=damage)
        api.until_status(damage, "WAITING_USER")
        (files[damage],) = set(setup.sessions) - set(files.values())
    service.kill()
    files.pop("removed").unlink()
    for damage, file in files.items():
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    _, api = setup.home.start()

    lost, kept = ("FAILED", "session_handle_lost"), ("WAITING_USER", "resumable_waiting_preserved")
    runs = {damage: api.get(damage) for damage in ("removed", *DAMAGES)}

    assert {
        damage: (status_word(run), run.recovery.recovery_reason) for damage, run in runs.items()
    } == dict.fromkeys(runs, lost) | {"none": kept}
    codes = {run.error.code for damage, run in runs.items() if damage != "none"}
    assert codes == {"SESSION_RESUME_FAILED"}
    api.cancel("none")
    api.until_ended("none")
    until(setup.user_settings_are_unchanged, "no trust is left")


@every_cli
@pytest.mark.parametrize("damage", ["removed", "cut_at_a_line"])
def test_a_session_that_is_damaged_while_the_service_runs_is_not_resumed(
    new_home: NewHome, tmp_path: Path, cli: str, damage: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    _, api = setup.home.start()
    setup.run_until_question(api)
    handle = setup.session.stem[-36:]
    if damage == "removed":
        setup.session.unlink()
    else:
        lines = setup.session.read_bytes().splitlines(keepends=True)
        setup.session.write_bytes(b"".join(lines[:-1]))

    api.reply("r", 1, "Ulm")
    failed = api.until_ended("r")

    assert failed.error.code == "SESSION_RESUME_FAILED"
    assert failed.error.message.endswith("was gone." if damage == "removed" else "was cut off.")
    assert handle not in failed.error.message
    assert setup.user_settings_are_unchanged()


def test_a_gemini_session_with_a_tool_call_is_repaired_by_lines_at_its_end(
    new_home: NewHome, tmp_path: Path
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, "gemini")
    service, api = setup.home.start()
    setup.run_until_question(api, {"prompt": "Use your TOOL."})
    before = setup.session.read_bytes()
    service.kill()
    service, api = setup.home.start()

    api.reply("r", 1, "Ulm")
    ended = api.until_ended("r")

    assert status_word(ended) == "SUCCEEDED", ended
    (repaired,) = service.events("execution.session_repaired")
    assert (repaired["lines"], repaired["after_bytes"]) == (2, len(before))
    assert setup.session.read_bytes().startswith(before)


def test_a_session_that_cannot_be_repaired_is_resumed_as_it_is(
    new_home: NewHome, tmp_path: Path
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, "gemini")
    service, api = setup.home.start()
    setup.run_until_question(api)
    kept = setup.session.rename(setup.session.with_suffix(".kept"))
    kept.with_suffix(".jsonl").symlink_to(kept)

    api.reply("r", 1, "Ulm")
    ended = api.until_ended("r")

    assert status_word(ended) == "SUCCEEDED", ended
    (logged,) = service.events("execution.session_not_repaired")
    assert logged["reason"] == "OSError"


@every_cli
def test_a_replied_run_waits_until_its_agent_home_is_back(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    service, api = setup.home.start()
    setup.run_until_question(api)
    service.kill()
    away = setup.agent_home.rename(tmp_path / "not-mounted")
    service, api = setup.home.start()

    api.reply("r", 1, "Ulm")
    service.until_event("execution.session_not_seen")
    running = api.get("r")
    created_anew = setup.agent_home.exists()
    away.rename(setup.agent_home)
    ended = api.until_ended("r")

    assert status_word(running) == "RUNNING"
    assert not created_anew
    assert status_word(ended) == "SUCCEEDED", ended
    assert MessageToDict(ended.output)["answer"].endswith("Ulm\n")


def test_a_run_that_waits_for_its_agent_home_can_be_canceled(
    new_home: NewHome, tmp_path: Path
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, "codex")
    service, api = setup.home.start()
    setup.run_until_question(api)
    setup.agent_home.rename(tmp_path / "not-mounted")
    api.reply("r", 1, "Ulm")
    service.until_event("execution.session_not_seen")

    api.cancel("r")

    assert status_word(api.until_ended("r")) == "CANCELED"
    assert service.stop() == 0


@every_cli
def test_a_kill_in_the_middle_of_a_turn_leaves_no_process_and_no_trust(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    service, api = setup.home.start()
    api.create(cli, {"prompt": "HANG"}, run_id="r")
    until(lambda: setup.sessions, "the session has begun")
    assert setup.trusts()
    service.kill()
    service, api = setup.home.start()

    failed = api.get("r")

    assert failed.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    workers = processes_below(setup.home.data)
    assert [pid for pid in workers if "RUNRECOVERY_RUN_ID" in environment_of(pid)] == []
    assert setup.user_settings_are_unchanged()
    report = api.status().reconciliation
    assert report.bindings.trust_entries == 1


@every_cli
def test_credentials_that_the_model_refuses_again_end_the_turn_at_once(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    _, api = setup.home.start()
    api.create(cli, {"prompt": "REFUSED"}, run_id="r")

    failed = api.until_ended("r")

    assert failed.error.code == "ENGINE_UNAUTHENTICATED", failed
    assert failed.error.message.startswith(
        "The model refuses the agent's credentials, but the agent tries again: "
    )
    request = pb.WatchRunRequest(run_id="r", after_sequence=0)
    events = [update.event for update in api.runs.WatchRun(request, timeout=20)]
    retries = [one for one in events if one.kind == run_pb2.RUN_EVENT_KIND_RETRYING]
    assert len(retries) == 2
    assert "401" in retries[-1].message
    assert retries[-1].status == run_pb2.RUN_STATUS_RUNNING
    assert processes_below(setup.home.data) == []


@every_cli
def test_the_clis_error_message_is_the_error_of_the_run(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli)
    _, api = setup.home.start()
    api.create(cli, {"prompt": "FAIL"}, run_id="r")

    failed = api.until_ended("r")

    assert failed.error.code == "ENGINE_FAILED"
    assert "unexpected status 400" in failed.error.message
    assert setup.user_settings_are_unchanged()


@pytest.mark.parametrize(
    ("cli", "message"),
    [("codex", "Not inside a trusted directory"), ("gemini", "exited with 55")],
)
def test_without_trust_the_cli_refuses_to_run(
    new_home: NewHome, tmp_path: Path, cli: str, message: str
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, cli, trust="none")
    _, api = setup.home.start()
    api.create(cli, TASK, run_id="r")

    failed = api.until_ended("r")

    assert failed.error.code == "ENGINE_FAILED"
    assert message in failed.error.message
    assert setup.trust_file.read_bytes().decode() == USER_SETTINGS[cli]


def test_the_session_of_claude_is_recorded_before_claude_reports_it(
    new_home: NewHome, tmp_path: Path
) -> None:
    setup = PretendCliSetup(new_home, tmp_path, "claude")
    _, api = setup.home.start()
    api.create("claude", {"prompt": "HANG_UNNAMED"}, run_id="r")

    until(lambda: processes_below(setup.home.data), "it has been launched")
    run = api.get("r")

    assert status_word(run) == "RUNNING"
    assert run.session.has_handle
    assert api.output("r") == []
