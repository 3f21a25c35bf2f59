"""Help, version and the list of commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence

import click
import pytest
from runrecovery_service.cli import COMMANDS, root
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import Run


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


@pytest.mark.parametrize("path", [(), *commands(root)], ids=" ".join)
def test_every_command_explains_itself(run: Run, path: Sequence[str]) -> None:
    ended = run(*path, "--help")

    assert ended.code == ExitCode.OK
    assert ended.out.startswith(f"Usage: {' '.join(('runrecovery', *path))} ")


def test_the_overview_names_every_command_without_importing_grpc() -> None:
    code = "import sys; from runrecovery_service.cli import main\ntry: main(['--help'])\n"
    code += "finally: print('grpc' in sys.modules or 'structlog' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert all(f"  {name} " in said.stdout for name in COMMANDS)
    assert said.stdout.splitlines()[-1] == "False"


def test_the_version_is_that_of_the_package(run: Run) -> None:
    from runrecovery_service import __version__

    assert __version__ in run("--version").out


def test_python_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "runrecovery_service", "no-such-command"]

    ended = subprocess.run(command, check=False, capture_output=True, text=True)

    assert ended.returncode == ExitCode.USAGE
    assert "No such command" in ended.stderr


def test_exit_codes_are_distinct() -> None:
    assert len({code.value for code in ExitCode}) == len(ExitCode.__members__)
