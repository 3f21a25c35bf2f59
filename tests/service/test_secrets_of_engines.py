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
ENGINES: Final = ("resumable", "sticky_process", *PRESETS)
TURNS: Final = 3
"""The fewest turns of an engine's runs."""
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


@dataclass(frozen=True, slots=True)
class Conversations:
    """The runs of one engine with the service, and the words in them."""

    name: str
    told: Secrets

    def live(self, api: Api) -> str:
        """Play one run that succeeds, one that fails, and return one that waits."""
        assert converse(api, self.name, self.told, fails=False) == "SUCCEEDED"
        assert converse(api, self.name, self.told, fails=True) == "FAILED"
        given = {word: self.told.words[word] for word in GIVEN} | {"fails": False}
        waits = api.create(self.name, given)
        api.until_status(waits.run_id, "WAITING_USER")
        return waits.run_id

    def end(self, api: Api, run_id: str) -> str:
        """Answer after a restart; return the status of the run at its end."""
        if self.name != "sticky_process":  # its question is lost with its process
            api.reply(run_id, 1, self.told.words["reply"])
        return status_word(api.until_ended(run_id))


# The forms differ in how they show an event, the engines in which events there are.
@pytest.mark.parametrize(
    ("form", "engines"), [("json", ENGINES), ("console", ("resumable", "sticky_process"))]
)
def test_no_message_to_or_from_an_engine_is_in_the_log(
    new_home: NewHome, tmp_path: Path, form: str, engines: tuple[str, ...]
) -> None:
    token = Secrets.make().words["token"]
    every = [
        Conversations(name, Secrets({**Secrets.make().words, "token": token})) for name in engines
    ]
    home = new_home(
        engines={name: engine(name, tmp_path / f"agent-{name}") for name in engines},
        env={"CANARY_TOKEN": token},
        log_level="debug",
    )
    address = f"unix:{home.path / 'socket'}"

    def start() -> tuple[Api, Callable[[], None]]:
        service = home.spawn("--listen", address, "--log-format", form)
        service.address = address
        return service.until_serving(), service.kill

    api, kill = start()
    waiting = {one.name: one.live(api) for one in every}
    kill()
    api, kill = start()
    ends = {one.name: one.end(api, waiting[one.name]) for one in every}
    kill()

    lost = {"sticky_process": "FAILED"} if "sticky_process" in engines else {}
    assert ends == {**dict.fromkeys(engines, "SUCCEEDED"), **lost}
    assert home.logs().count("execution.turn_ended") >= TURNS * len(engines)
    assert [one.name for one in every if one.told.in_text(home.logs())] == []
    kept = "".join(path.read_text("utf-8", "replace") for path in files_below(home.data / "runs"))
    for one in every:
        if one.name not in PRESETS:  # the engine did use the words: they could have been logged
            assert {"stderr", "progress", "token", "prompt", "result"} <= one.told.in_text(kept)
