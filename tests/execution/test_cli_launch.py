"""The launch of an agent CLI gets private files, and demands a new enough version."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from runrecovery_service.execution.cli_launch import demand_version, write_files
from runrecovery_service.process.launch_errors import LaunchFailed

LEAST = (2, 1, 89)


def demand(script: str, cwd: Path) -> None:
    """Demand the version of a program that is a Python script."""
    command = (sys.executable, "-I", "-S", "-c", script)
    demand_version(command, LEAST, cwd=cwd, env=dict(os.environ))


@pytest.mark.parametrize("text", ["2.1.89", "2.1.197", "10.0.0", "2.2.0-rc.1"])
def test_a_version_that_is_new_enough_is_accepted(tmp_path: Path, text: str) -> None:
    demand(
        f"import sys; assert sys.argv[-1] == '--version'; print({f'{text} (Claude Code)'!r})",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('2.1.88 (Claude Code)')", "needs version 2.1.89 of .*; this one is 2.1.88"),
        ("print('1.9.200 (Claude Code)')", "needs version 2.1.89 of .*; this one is 1.9.200"),
        ("print('unknown option')", "--version` reported none"),
        ("print('9.9.9')", "--version` reported none"),
        ("print('docker 24.0.7\\n2.1.88 (Claude Code)')", "this one is 2.1.88"),
        ("print('9.9.9 (Claude Code)'); exit(1)", "--version` reported none"),
        ("import sys; print('9.9.9 (Claude Code)', file=sys.stderr)", "--version` reported none"),
    ],
)
def test_a_program_that_is_too_old_or_reports_no_version_is_not_launched(
    tmp_path: Path, script: str, message: str
) -> None:
    with pytest.raises(LaunchFailed, match=message):
        demand(script, tmp_path)


def test_files_of_a_launch_are_private_and_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "permissions" / "1.json"

    for content in (b"a longer text", b"short"):
        write_files({path: content})

    assert path.read_bytes() == b"short"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path)] == [0o700, 0o600]
