"""The agent CLIs that `make test-agents` installs have the versions of docs/agents.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PINS: Final = ROOT / "tests" / "cli_agents" / "npm"
PRODUCTS: Final = {
    "@openai/codex": "codex-cli",
    "@google/gemini-cli": "gemini-cli",
    "@anthropic-ai/claude-code": "claude-code",
}


def test_the_page_names_the_versions_that_are_tried() -> None:
    pinned: dict[str, str] = json.loads((PINS / "package.json").read_text("utf-8"))["dependencies"]
    page = (ROOT / "docs" / "agents.md").read_text("utf-8")
    named = set(re.findall(r"(codex-cli|gemini-cli|claude-code) (\d+\.\d+\.\d+)", page))
    tried = {
        # A second version of a package has an alias: "npm:PACKAGE@VERSION".
        tuple(version.removeprefix("npm:").rsplit("@", 1)) if "@" in version else (alias, version)
        for alias, version in pinned.items()
    }

    assert named == {(PRODUCTS[package], version) for package, version in tried}


def test_the_lock_file_names_no_registry() -> None:
    lock = (PINS / "package-lock.json").read_text("utf-8")

    assert "resolved" not in lock
    assert "://" not in lock
    assert all("integrity" in each for name, each in json.loads(lock)["packages"].items() if name)
