"""The three CLIs as the tests use them: a home each, with settings of its user, and an endpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.engines import REPOSITORY

INSTALLED: Final = REPOSITORY / ".agent-clis" / "node_modules" / ".bin"
"""Where `make test-agents` installs them, from npm/package-lock.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cli:
    """One CLI.

    Attributes:
        name: of its preset and its program.
        options: words of the operator's behind the program.
        unattended: options that let it use its shell without anybody who allows that.
        files: its user's own files, below its home, for an endpoint's URL. The first is the one
            that trust entries go into.
        rewrites: those of them that it writes itself while it runs.
        env: variables of the service that the preset hands on to it, for an endpoint's URL.
        sessions: where its conversations are, below its home.
        needs_trust: what it says when it refuses a folder; None: it runs in any.
    """

    name: str
    options: Sequence[str] = ()
    unattended: Sequence[str]
    files: Callable[[str], Mapping[str, str]]
    rewrites: frozenset[str] = frozenset()
    env: Callable[[str], Mapping[str, str]]
    sessions: str
    needs_trust: str | None = None

    @property
    def program(self) -> Path:
        """Where it is installed."""
        return INSTALLED / self.name

    def prepare(self, agent_home: Path, url: str) -> Settings:
        """Make a home for it, and return what its user has in there."""
        written = {}
        for name, text in self.files(url).items():
            path = agent_home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
            written[path] = text.encode()
        rewritten = frozenset(agent_home / name for name in self.rewrites)
        return Settings(files=written, rewritten=rewritten)

    def environment(self, url: str) -> dict[str, str]:
        """Return the variables of the service: nothing of the CLI leaves the machine."""
        path = f"{INSTALLED}{os.pathsep}{os.environ['PATH']}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), url)
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return {"PATH": path, **proxies, **direct, **self.env(url)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user had in the files of a CLI before it ran."""

    files: Mapping[Path, bytes]
    rewritten: frozenset[Path] = field(default_factory=frozenset)

    @property
    def trust_file(self) -> Path:
        """The file that trust entries go into."""
        return next(iter(self.files))

    def trusts(self, folder: Path) -> bool:
        """True when the file names a folder below this one."""
        return str(folder) in self.trust_file.read_text("utf-8")

    def changed(self) -> list[str]:
        """Return what is not as the user had it: a byte, or a value where the CLI itself writes."""
        return [
            path.name
            for path, before in self.files.items()
            if not (
                _holds(json.loads(path.read_bytes()), json.loads(before))
                if path in self.rewritten
                else path.read_bytes() == before
            )
        ]


def _holds(now: object, before: object) -> bool:
    """True when all that was there is there still; more may have come."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(name in now and _holds(now[name], each) for name, each in before.items())
    return now == before


def _codex_files(url: str) -> Mapping[str, str]:
    return {
        "config.toml": f"""\
# What the user has set, and how.
model = "model"   # a comment behind a value
model_provider = "loopback"

[projects."/home/user/mine"]
trust_level = "trusted"   # since long

[model_providers.loopback]
name = "loopback"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "OPENAI_API_KEY"

[analytics]
enabled = false

[features]
plugins = false
"""
    }


def _gemini_files(url: str) -> Mapping[str, str]:
    return {
        ".gemini/trustedFolders.json": """\
{
	"/home/user/mine": "TRUST_FOLDER",

	"/home/user/theirs":"DO_NOT_TRUST"  }""",
        ".gemini/settings.json": """\
{
  // the user's own
  "security": {"auth": {"selectedType": "gemini-api-key"}},
  "privacy": {"usageStatisticsEnabled": false},
  "general": {"enableAutoUpdate": false}
}
""",
    }


def _claude_files(url: str) -> Mapping[str, str]:
    return {
        ".claude.json": """\
{
    "numStartups": 41,
    "projects": {
        "/home/user/mine": {"hasTrustDialogAccepted": true, "allowedTools": ["Read"]}
    }
}
""",
        "settings.json": """\
{"env": {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}, "theme": "light"  }
""",
    }


CODEX: Final = Cli(
    name="codex",
    unattended=("--sandbox", "danger-full-access"),
    files=_codex_files,
    env=lambda _: {"OPENAI_API_KEY": "no-key"},
    sessions="sessions/*/*/*/rollout-*.jsonl",
    needs_trust="Not inside a trusted directory",
)
GEMINI: Final = Cli(
    name="gemini",
    unattended=("--approval-mode", "yolo"),
    options=("--model", "gemini-2.5-flash"),
    files=_gemini_files,
    env=lambda url: {"GOOGLE_GEMINI_BASE_URL": url, "GEMINI_API_KEY": "no-key"},
    sessions=".gemini/tmp/*/chats/session-*.jsonl",
    needs_trust="not running in a trusted directory",
)
CLAUDE: Final = Cli(
    name="claude",
    unattended=("--allowedTools=Bash",),
    files=_claude_files,
    rewrites=frozenset({".claude.json"}),
    env=lambda url: {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "no-key"},
    sessions="projects/*/*.jsonl",
)
CLIS: Final = (CODEX, GEMINI, CLAUDE)
