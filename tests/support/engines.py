"""Engines that a test configures: the demo agent, one of tests/agents, or lines of Python."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
AGENTS: Final = REPOSITORY / "tests" / "agents"

_DEMO_AGENT: Final = f"""
import sys
sys.path.append({str(REPOSITORY / "service")!r})
from runrecovery_service.engines.demo_agent import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One `[engines.NAME]` table, as a test writes it."""

    command: Sequence[str]
    profile: str = "resumable"
    more: Mapping[str, object] = field(default_factory=dict)


def demo_command(profile: str) -> tuple[str, ...]:
    """Return the command of the demo agent.

    Without site packages, which take longer to find than the agent needs for a turn.
    """
    return (sys.executable, "-I", "-S", "-c", _DEMO_AGENT, "--profile", profile)


RESUMABLE: Final = EngineSpec(
    command=demo_command("resumable"), more={"session_file": "{workspace}/session-{value}.json"}
)
STICKY: Final = EngineSpec(command=demo_command("sticky"), profile="sticky_process")
GOOD_ENGINES: Final[Mapping[str, EngineSpec]] = {"resumable": RESUMABLE, "sticky": STICKY}


def agent(name: str, *, profile: str = "resumable", **more: object) -> EngineSpec:
    """Return the engine of one of tests/agents."""
    command = (sys.executable, "-I", "-S", str(AGENTS / f"{name}.py"))
    return EngineSpec(command=command, profile=profile, more=more)


def script(text: str, *, profile: str = "resumable", **more: object) -> EngineSpec:
    """Return an engine that is a few lines of Python."""
    return EngineSpec(command=(sys.executable, "-I", "-S", "-c", text), profile=profile, more=more)
