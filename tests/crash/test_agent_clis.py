"""Engines with a preset, over a kill of the service. The CLIs are stand-ins that call, print and
remember as the real ones do; `make test-agents` tries those."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word
from support.engines import AGENTS, EngineSpec
from support.processes import environment_of, processes_below
from support.service import Home
from support.stores import query
from support.waiting import until

NewHome = Callable[..., Home]

TASK: Final = {"prompt": "Plan the journey. /help"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cli:
    """One of the CLIs: its name, its configuration with settings of the user's, its sessions."""

    name: str
    config: str
    settings: str
    sessions: str

    @property
    def config_is_rewritten(self) -> bool:
        """The CLI itself writes into the file."""
        return self.name == "claude"


CODEX: Final = Cli(
    name="codex",
    config="config.toml",
    settings='# mine\nmodel = "m"  # best\n\n[projects."/elsewhere"]\ntrust_level = "trusted"\n',
    sessions="sessions/*/*/*/rollout-*.jsonl",
)
GEMINI: Final = Cli(
    name="gemini",
    config=".gemini/trustedFolders.json",
    settings='{\r\n\t"/elsewhere": "DO_NOT_TRUST"\r\n}',
    sessions=".gemini/tmp/*/chats/session-*.jsonl",
)
CLAUDE: Final = Cli(
    name="claude",
    config=".claude.json",
    settings='{"theme": "dark", "projects": {"/elsewhere": {"hasTrustDialogAccepted": false}}}\n',
    sessions="projects/*/*.jsonl",
)

every_cli = pytest.mark.parametrize("cli", [CODEX, GEMINI, CLAUDE], ids=lambda cli: cli.name)


class Desk:
    """A home of the service, and one of the CLI."""

    def __init__(
        self,
        new_home: NewHome,
        tmp_path: Path,
        cli: Cli,
        *,
        wrapper: Sequence[str] = (),
        **more: object,
    ) -> None:
        self.cli = cli
        self.agent_home = tmp_path / "agent-home"
        self.config = self.agent_home / cli.config
        self.config.parent.mkdir(parents=True)
        self.config.write_bytes(cli.settings.encode())
        command = (*wrapper, sys.executable, "-I", "-S", str(AGENTS / "pretend_cli.py"), cli.name)
        given = {"preset": cli.name, "agent_home": str(self.agent_home), **more}
        self.home = new_home(engines={cli.name: EngineSpec(command=command, more=given)})

    @property
    def session(self) -> Path:
        """The one session file."""
        (found,) = self.agent_home.glob(self.cli.sessions)
        return found

    def waiting(self, api: Api) -> run_pb2.Run:
        api.create(self.cli.name, TASK, run_id="r")
        return api.until_status("r", "WAITING_USER")

    def trusts(self) -> bool:
        """Whether the CLI's file has an entry for a workspace of ours."""
        return "/workspace" in self.config.read_text("utf-8")

    def settings_are_the_users(self) -> bool:
        text = self.config.read_bytes().decode()
        if not self.cli.config_is_rewritten:
            return text == self.cli.settings
        kept = json.loads(text)
        kept.pop("numStartups")
        return bool(kept == json.loads(self.cli.settings))


@every_cli
def test_a_conversation_goes_on_after_a_kill(new_home: NewHome, tmp_path: Path, cli: Cli) -> None:
    desk = Desk(new_home, tmp_path, cli)
    service, api = desk.home.start()

    waiting = desk.waiting(api)
    assert waiting.pending_interaction.prompt == "Where to?"
    assert [option.label for option in waiting.pending_interaction.options] == ["Köln", "Ulm"]
    assert waiting.session.type == cli.name
    assert desk.trusts()
    service.kill()
    service, api = desk.home.start()

    assert api.get("r").recovery.recovery_reason == "resumable_waiting_preserved"
    assert desk.trusts()
    api.reply("r", 1, "/Köln")
    ended = api.until_ended("r")

    assert status_word(ended) == "SUCCEEDED", ended
    output = MessageToDict(ended.output)
    assert output["answer"] == "The user answers:\n\n/Köln\n"
    assert output["first"].endswith("Your task:\n\nPlan the journey. /help\n")
    assert desk.settings_are_the_users()
    assert query(desk.home, "SELECT 1 FROM trust_entry WHERE removed_at IS NULL") == []


def test_a_session_that_a_caller_names_must_be_found(new_home: NewHome, tmp_path: Path) -> None:
    desk = Desk(new_home, tmp_path, CODEX)
    service, api = desk.home.start()
    desk.waiting(api)
    service.kill()
    session, whole = desk.session, desk.session.read_bytes()
    session.unlink()
    service, api = desk.home.start()
    assert api.get("r").recovery.recovery_reason == "session_handle_lost"

    def reopen(**how: Any) -> run_pb2.Run:
        return api.runs.ReopenRun(pb.ReopenRunRequest(run_id="r", **how), timeout=20).run

    own = session.stem[-36:]
    for handle in (own, own[:-1] + ("0" if own[-1] != "0" else "1"), "latest"):
        refusal = refused(lambda handle=handle: reopen(session_handle=handle))  # type: ignore[misc]
        assert refusal.reason == "SESSION_NOT_RESUMABLE"
    session.write_bytes(whole)

    assert status_word(reopen(session_handle=own)) == "WAITING_USER"


def test_no_session_id_keeps_the_service_down(new_home: NewHome, tmp_path: Path) -> None:
    desk = Desk(new_home, tmp_path, CODEX)
    service, api = desk.home.start()
    api.create("codex", {"prompt": "FAR_FUTURE"}, run_id="r")
    api.until_status("r", "WAITING_USER")
    assert "ffffffff-ffff-7fff-8fff-ffffffffffff" in desk.session.name
    for _ in range(2):
        service.kill()
        service, api = desk.home.start()

        assert api.get("r").recovery.recovery_reason == "resumable_waiting_preserved"

    api.reply("r", 1, "Ulm")
    assert status_word(api.until_ended("r")) == "SUCCEEDED"


@every_cli
def test_a_cli_that_works_elsewhere_is_not_taken_for_one_that_lost_its_session(
    new_home: NewHome, tmp_path: Path, cli: Cli
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # It finds its trust there by its own settings; ours is for the workspace.
    real = {"codex": "CODEX_HOME", "gemini": "GEMINI_CLI_HOME", "claude": "CLAUDE_CONFIG_DIR"}
    kept = tmp_path / "in a container"
    kept.mkdir()
    script = f'cd "$0"; export {real[cli.name]}="$1"; shift; exec "$@"'
    if cli is GEMINI:
        trusted = kept / ".gemini" / "trustedFolders.json"
        trusted.parent.mkdir()
        trusted.write_text(json.dumps({str(elsewhere): "TRUST_FOLDER"}))
    wrapper = ("/bin/sh", "-c", script, str(elsewhere), str(kept))
    desk = Desk(new_home, tmp_path, cli, wrapper=wrapper)
    service, api = desk.home.start()
    desk.waiting(api)
    (told,) = service.events("execution.session_not_seen")
    assert told["reason"] == "missing"
    service.kill()
    service, api = desk.home.start()

    assert api.get("r").recovery.recovery_reason == "resumable_waiting_preserved"
    api.reply("r", 1, "Ulm")
    assert status_word(api.until_ended("r")) == "SUCCEEDED"


@every_cli
def test_the_session_is_named_nowhere(new_home: NewHome, tmp_path: Path, cli: Cli) -> None:
    desk = Desk(new_home, tmp_path, cli)
    service, api = desk.home.start()
    desk.waiting(api)
    api.reply("r", 1, "x")
    ended = api.until_ended("r")
    ((handle,),) = query(desk.home, "SELECT DISTINCT session_value FROM run") or [("",)]
    name = desk.session.stem

    told = b"".join(piece.data for piece in api.output("r"))
    warned = b"".join(piece.data for piece in api.output("r", channel=pb.OUTPUT_CHANNEL_STDERR))

    assert status_word(ended) == "SUCCEEDED"
    assert handle is None
    assert b"[secret]" in told
    assert warned == b"in [secret]\n" * 2
    for secret in (name, name[-36:]):
        assert secret.encode() not in told
        assert secret not in service.text


@every_cli
@pytest.mark.parametrize("damage", ["removed", "cut_in_half", "cut_at_a_line", "last_byte"])
def test_a_damaged_session_is_not_kept_waiting(
    new_home: NewHome, tmp_path: Path, cli: Cli, damage: str
) -> None:
    desk = Desk(new_home, tmp_path, cli)
    service, api = desk.home.start()
    desk.waiting(api)
    service.kill()
    whole = desk.session.read_bytes()
    cut = {
        "removed": None,
        "cut_in_half": whole[: len(whole) // 2],
        "cut_at_a_line": b"".join(whole.splitlines(keepends=True)[:-1]),
        "last_byte": whole[:-1],
    }[damage]
    if cut is None:
        desk.session.unlink()
    else:
        desk.session.write_bytes(cut)
    _, api = desk.home.start()

    failed = api.get("r")

    assert (status_word(failed), failed.error.code) == ("FAILED", "SESSION_RESUME_FAILED")
    assert failed.recovery.recovery_reason == "session_handle_lost"
    assert desk.settings_are_the_users()


@every_cli
@pytest.mark.parametrize("damage", ["removed", "cut_at_a_line"])
def test_a_session_that_is_damaged_while_the_service_runs_is_not_gone_on_with(
    new_home: NewHome, tmp_path: Path, cli: Cli, damage: str
) -> None:
    desk = Desk(new_home, tmp_path, cli)
    _, api = desk.home.start()
    desk.waiting(api)
    handle = desk.session.stem[-36:]
    if damage == "removed":
        desk.session.unlink()
    else:
        lines = desk.session.read_bytes().splitlines(keepends=True)
        desk.session.write_bytes(b"".join(lines[:-1]))

    api.reply("r", 1, "Ulm")
    failed = api.until_ended("r")

    assert failed.error.code == "SESSION_RESUME_FAILED"
    assert failed.error.message.endswith("was gone." if damage == "removed" else "was cut off.")
    assert handle not in failed.error.message
    assert desk.settings_are_the_users()


@every_cli
def test_a_reply_waits_for_a_home_that_is_away(new_home: NewHome, tmp_path: Path, cli: Cli) -> None:
    desk = Desk(new_home, tmp_path, cli)
    service, api = desk.home.start()
    desk.waiting(api)
    service.kill()
    away = desk.agent_home.rename(tmp_path / "not-mounted")
    service, api = desk.home.start()

    api.reply("r", 1, "Ulm")
    service.until_event("execution.session_not_seen")
    running = api.get("r")
    made_anew = desk.agent_home.exists()
    away.rename(desk.agent_home)
    ended = api.until_ended("r")

    assert status_word(running) == "RUNNING"
    assert not made_anew
    assert status_word(ended) == "SUCCEEDED", ended
    assert MessageToDict(ended.output)["answer"].endswith("Ulm\n")


def test_a_run_that_waits_for_its_home_can_be_canceled(new_home: NewHome, tmp_path: Path) -> None:
    desk = Desk(new_home, tmp_path, CODEX)
    service, api = desk.home.start()
    desk.waiting(api)
    desk.agent_home.rename(tmp_path / "not-mounted")
    api.reply("r", 1, "Ulm")
    service.until_event("execution.session_not_seen")

    api.cancel("r")

    assert status_word(api.until_ended("r")) == "CANCELED"
    assert service.stop() == 0


@every_cli
def test_a_kill_in_the_middle_of_a_turn_leaves_neither_process_nor_trust(
    new_home: NewHome, tmp_path: Path, cli: Cli
) -> None:
    desk = Desk(new_home, tmp_path, cli)
    service, api = desk.home.start()
    api.create(cli.name, {"prompt": "HANG"}, run_id="r")
    until(lambda: list(desk.agent_home.glob(cli.sessions)), "the session has begun")
    assert desk.trusts()
    service.kill()
    service, api = desk.home.start()

    failed = api.get("r")

    assert failed.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    workers = processes_below(desk.home.data)
    assert [pid for pid in workers if "RUNRECOVERY_RUN_ID" in environment_of(pid)] == []
    assert desk.settings_are_the_users()
    report = api.status().reconciliation
    assert report.bindings.trust_entries == 1


@every_cli
def test_what_the_cli_says_of_its_failure_is_the_error(
    new_home: NewHome, tmp_path: Path, cli: Cli
) -> None:
    desk = Desk(new_home, tmp_path, cli)
    _, api = desk.home.start()
    api.create(cli.name, {"prompt": "FAIL"}, run_id="r")

    failed = api.until_ended("r")

    assert failed.error.code == "ENGINE_FAILED"
    assert "unexpected status 401" in failed.error.message
    assert desk.settings_are_the_users()


@pytest.mark.parametrize(
    ("cli", "told"),
    [(CODEX, "Not inside a trusted directory"), (GEMINI, "exited with 55")],
    ids=["codex", "gemini"],
)
def test_without_trust_the_cli_refuses(
    new_home: NewHome, tmp_path: Path, cli: Cli, told: str
) -> None:
    desk = Desk(new_home, tmp_path, cli, trust="none")
    _, api = desk.home.start()
    api.create(cli.name, TASK, run_id="r")

    failed = api.until_ended("r")

    assert failed.error.code == "ENGINE_FAILED"
    assert told in failed.error.message
    assert desk.config.read_bytes().decode() == cli.settings


def test_the_session_of_claude_is_on_record_before_it_can_act(
    new_home: NewHome, tmp_path: Path
) -> None:
    desk = Desk(new_home, tmp_path, CLAUDE)
    _, api = desk.home.start()
    api.create("claude", {"prompt": "HANG_UNNAMED"}, run_id="r")

    until(lambda: processes_below(desk.home.data), "it has been launched")
    run = api.get("r")

    assert status_word(run) == "RUNNING"
    assert run.session.has_handle
    assert api.output("r") == []
