"""An agent's command and environment: which program it names, and which variables it gets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from runrecovery_service.process.launch_errors import LaunchFailed
from runrecovery_service.process.markers import COOKIE_VARIABLE


def find_program(command: Sequence[str], *, cwd: Path, path: str) -> str:
    """Return the absolute path of a command's program.

    Args:
        cwd: the base folder if the program's name contains a slash.
        path: the PATH to search otherwise. Relative entries are ignored.

    Raises:
        LaunchFailed: there is no such program, or it is not executable.
    """
    if not command or not command[0]:
        raise LaunchFailed("the engine's command is empty")
    name = command[0]
    if "/" in name:
        candidates = [(cwd / name).absolute()]
    else:
        # A relative entry of PATH would let the run's workspace choose the program.
        entries = [entry for entry in path.split(os.pathsep) if entry.startswith("/")]
        candidates = [Path(entry) / name for entry in entries]
    files = [candidate for candidate in candidates if _is_file(candidate)]
    for file in files:
        if os.access(file, os.X_OK):
            return str(file)
    where = "" if "/" in name else " on the engine's PATH"
    raise LaunchFailed(f"{name} is not {'executable' if files else 'found'}{where}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def launch_problem(command: Sequence[str], *, env_allow: Iterable[str]) -> str | None:
    """Return why a command could not be launched from this process; None if it could."""
    env = agent_environment(env_allow, os.environ, {})
    try:
        find_program(command, cwd=Path.cwd(), path=env.get("PATH", os.defpath))
    except LaunchFailed as error:
        return error.reason
    return None


def agent_environment(
    allow: Iterable[str], source: Mapping[str, str], extra: Mapping[str, str]
) -> dict[str, str]:
    """Return the allowed variables of `source`, overridden by `extra`.

    The cookie of the launch is taken from `extra` only: a cookie that the service inherited belongs
    to a launch of another service.
    """
    passed = {name: source[name] for name in allow if name in source and name != COOKIE_VARIABLE}
    return passed | dict(extra)
