"""Prepares the launch of an agent CLI: writes its files, and checks its version."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from runrecovery_service.process.agent_command import find_program
from runrecovery_service.process.launch_errors import LaunchFailed

VERSION_TIMEOUT_S: Final = 60.0
_VERSION: Final = re.compile(r"^(\d{1,9})\.(\d{1,9})\.(\d{1,9})\S* \(Claude Code\)$", re.MULTILINE)
"""The version line of Claude Code. A wrapper can print other versions before this line."""


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write the files that a launch needs, in folders of mode 0700.

    A repeated launch writes the files again, which is safe because no process has read them.
    """
    for path, content in files.items():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def demand_version(
    command: Sequence[str], least: tuple[int, ...], *, cwd: Path, env: Mapping[str, str]
) -> None:
    """Raise LaunchFailed unless `command --version` reports at least this version. Blocking.

    The environment of the process has the launch's cookie, a marker. If the service is killed
    meanwhile, the next start can therefore find and kill the process.
    """
    needed = ".".join(map(str, least))
    found = _version_of(command, cwd=cwd, env=env)
    if found is None:
        raise LaunchFailed(
            f'permissions = "ask" needs version {needed} of {command[0]}, and `{command[0]}'
            " --version` reported none"
        )
    if found < least:
        raise LaunchFailed(
            f'permissions = "ask" needs version {needed} of {command[0]}; this one is'
            f" {'.'.join(map(str, found))}"
        )


def _version_of(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str]
) -> tuple[int, ...] | None:
    program = find_program(command, cwd=cwd, path=env.get("PATH", os.defpath))
    try:
        ended = subprocess.run(  # noqa: S603 - the engine's own command
            [program, *command[1:], "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=cwd,
            env=env,
            timeout=VERSION_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    found = _VERSION.search(ended.stdout.decode("utf-8", "replace"))
    if ended.returncode or found is None:
        return None
    return tuple(map(int, found.groups()))
