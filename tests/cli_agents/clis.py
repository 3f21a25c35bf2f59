"""The real CLIs: how the tests call them, and what their users have in their homes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from support.engines import REPOSITORY

MODULES: Final = REPOSITORY / ".agent-clis" / "node_modules"
"""Where `make test-agents` installs them, from npm/package-lock.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cli:
    """One CLI.

    Attributes:
        name: what the tests call it.
        preset: the name of its preset.
        program: where `make test-agents` installs the program.
        options: the options of its command.
        unattended: the options that let it run shell commands without asking.
        files: returns the files of its user, by their paths below its home, for the URL of a model
            endpoint.
        rewrites: the files that the CLI itself writes while it runs.
        env: returns the variables of the service that the preset passes on to the CLI, for the URL
            of a model endpoint.
        needs_trust: its error message in a folder that it does not trust; None: it runs in any.
    """

    name: str
    preset: str
    program: Path
    options: Sequence[str] = ()
    unattended: Sequence[str]
    files: Callable[[str], Mapping[str, str]]
    rewrites: frozenset[str] = frozenset()
    env: Callable[[str], Mapping[str, str]]
    needs_trust: str | None = None

    def prepare(self, agent_home: Path, url: str) -> Settings:
        """Write the files of its user into a home, and return them."""
        written = {}
        for name, text in self.files(url).items():
            path = agent_home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
            written[path] = text.encode()
        rewritten = frozenset(agent_home / name for name in self.rewrites)
        return Settings(files=written, rewritten=rewritten)

    def environment(self, url: str) -> dict[str, str]:
        """Return the variables of the service. They lead the CLI to the endpoint for everything."""
        path = f"{MODULES / '.bin'}{os.pathsep}{os.environ['PATH']}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), url)
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return {"PATH": path, **proxies, **direct, **self.env(url)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The files of a CLI's user, as they were before the CLI ran."""

    files: Mapping[Path, bytes]
    rewritten: frozenset[Path] = field(default_factory=frozenset)

    def changed(self) -> list[str]:
        """Return the files that differ. Where the CLI writes too, only the user's values count."""
        return [
            path.name
            for path, before in self.files.items()
            if not (
                _contains(json.loads(path.read_bytes()), json.loads(before))
                if path in self.rewritten
                else path.read_bytes() == before
            )
        ]


def _contains(now: object, before: object) -> bool:
    """Return whether everything of `before` is in `now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(name in now and _contains(now[name], each) for name, each in before.items())
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
    preset="codex",
    program=MODULES / ".bin" / "codex",
    unattended=("--sandbox", "danger-full-access"),
    files=_codex_files,
    env=lambda _: {"OPENAI_API_KEY": "no-key"},
    needs_trust="Not inside a trusted directory",
)
GEMINI: Final = Cli(
    name="gemini",
    preset="gemini",
    program=MODULES / ".bin" / "gemini",
    unattended=("--approval-mode", "yolo"),
    options=("--model", "gemini-2.5-flash"),
    files=_gemini_files,
    env=lambda url: {"GOOGLE_GEMINI_BASE_URL": url, "GEMINI_API_KEY": "no-key"},
    needs_trust="not running in a trusted directory",
)
CLAUDE: Final = Cli(
    name="claude",
    preset="claude",
    program=MODULES / ".bin" / "claude",
    unattended=("--allowedTools=Bash",),
    files=_claude_files,
    rewrites=frozenset({".claude.json"}),
    env=lambda url: {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "no-key"},
)
CLAUDE_NEWEST: Final = replace(
    CLAUDE,
    name="claude-newest",
    program=MODULES / "claude-code-newest" / "bin" / "claude.exe",  # also on Linux
)
CLIS: Final = (CODEX, GEMINI, CLAUDE, CLAUDE_NEWEST)
