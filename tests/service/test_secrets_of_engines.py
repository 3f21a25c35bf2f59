"""The messages between the service and each kind of engine are in no log."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from google.protobuf.json_format import MessageToDict
from support.api import Api, status_word
from support.engines import AGENTS, EngineSpec, script
from support.service import Home

NewHome = Callable[..., Home]

JSON_LINES: Final = """
import json, os, sys
def say(**message):
    print(json.dumps(message), flush=True)
sticky = "{profile}" == "sticky_process"
message = json.loads(sys.stdin.readline())
given = message["input"]
print(given["stderr"], os.environ["CANARY_TOKEN"], file=sys.stderr, flush=True)
say(type="progress", message=given["progress"])
say(type="canary", message=given["unknown"])
if message["type"] == "start":
    say(type="session", value=given["handle"]) if not sticky else None
    say(type="ask", kind="choose_one", prompt=given["prompt"],
        options=[{{"label": given["label"], "value": given["option"]}}])
    if not sticky:
        sys.exit(0)
    message = json.loads(sys.stdin.readline())
if given["fails"]:
    sys.exit(3)
say(type="result", output={{"result": given["result"]}})
"""
PRESETS: Final = ("codex", "gemini", "claude")
GIVEN: Final = (
    "input", "stderr", "progress", "unknown", "handle", "prompt", "label", "option", "result",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Secrets:
    """One random word for each confidential value, and which words the engine has used."""

    words: Mapping[str, str]

    @classmethod
    def make(cls) -> Secrets:
        names = (*GIVEN, "reply", "token", "caller's label")
        return cls({name: f"canary-{secrets.token_hex(8)}" for name in names})

    def in_text(self, text: str) -> set[str]:
        return {name for name, word in self.words.items() if word in text}


def engine(name: str, agent_home: Path) -> EngineSpec:
    if name in PRESETS:
        command = (sys.executable, "-I", "-S", str(AGENTS / "pretend_cli.py"), name)
        more: dict[str, object] = {"preset": name, "agent_home": str(agent_home)}
        return EngineSpec(command=command, more=more)
    allowed = ["PATH", "CANARY_TOKEN"]
    return script(JSON_LINES.format(profile=name), profile=name, env_allow=allowed)


def files_below(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file())


def converse(api: Api, name: str, told: Secrets, *, fails: bool) -> str:
    """Run one run with a question and an answer; return its final status."""
    words = told.words
    given = {word: words[word] for word in GIVEN} | {"fails": fails}
    if name in PRESETS:
        given = {"prompt": f"{words['prompt']} {'FAIL' if fails else ''}", "input": words["input"]}
    run = api.create(name, given, labels={"l": words["caller's label"]})
    if name in PRESETS and fails:
        return status_word(api.until_ended(run.run_id))
    waiting = api.until_status(run.run_id, "WAITING_USER")
    assert waiting.pending_interaction.prompt
    if name not in PRESETS:
        assert waiting.pending_interaction.prompt == words["prompt"]
    api.reply(run.run_id, 1, words["reply"])
    ended = api.until_ended(run.run_id)
    if name in PRESETS:
        assert words["reply"] in str(MessageToDict(ended.output))
    return status_word(ended)


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("name", ["resumable", "sticky_process", *PRESETS])
def test_no_message_to_or_from_an_engine_is_in_the_log(
    new_home: NewHome, tmp_path: Path, name: str, form: str
) -> None:
    told = Secrets.make()
    home = new_home(
        engines={name: engine(name, tmp_path / "agent")},
        env={"CANARY_TOKEN": told.words["token"]},
        log_level="debug",
    )
    address = f"unix:{home.path / 'socket'}"

    def start() -> tuple[Api, Callable[[], None]]:
        service = home.spawn("--listen", address, "--log-format", form)
        service.address = address
        return service.until_serving(), service.kill

    api, kill = start()
    assert converse(api, name, told, fails=False) == "SUCCEEDED"
    assert converse(api, name, told, fails=True) == "FAILED"
    given = {word: told.words[word] for word in GIVEN} | {"fails": False}
    waits = api.create(name, given)
    api.until_status(waits.run_id, "WAITING_USER")
    kill()
    api, kill = start()
    if name == "sticky_process":  # its question is lost with its process
        assert status_word(api.get(waits.run_id)) == "FAILED"
    else:
        api.reply(waits.run_id, 1, told.words["reply"])
        assert status_word(api.until_ended(waits.run_id)) == "SUCCEEDED"
    kill()

    assert "execution.turn_ended" in home.logs()
    assert told.in_text(home.logs()) == set()
    kept = "".join(path.read_text("utf-8", "replace") for path in files_below(home.data / "runs"))
    if name not in PRESETS:  # the engine did use the words, so that they could have been logged
        assert {"stderr", "progress", "token", "prompt", "result"} <= told.in_text(kept)
