"""The commands of README.md, docs/tutorial.md and docs/engines.md, typed against a real service."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner
from runrecovery_service.cli import root
from support.engines import REPOSITORY
from support.pages import code_blocks

ADDRESS: Final = "unix:s"
"""A socket in the working directory: no test has to find a free port."""
COMMAND_TIMEOUT_S: Final = 60.0


class Terminals:
    """Two terminals in one directory: one for the service, one for every other command."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.printed: dict[str, str] = {}
        self._service: subprocess.Popen[bytes] | None = None
        self._env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "RUNRECOVERY_LISTEN": ADDRESS,
            "RUNRECOVERY_SERVER": ADDRESS,
        }

    def type(self, block: str) -> None:
        """Carry out the lines of a block and keep what each command printed."""
        for line in block.splitlines():
            if line.startswith("runrecovery serve"):
                self.stop()
                self._start(line)
            elif not line.startswith(". .venv/"):
                self.printed[line] = self._run_line(line)

    def run_python(self, code: str) -> str:
        """Run a Python example of a page and return what it printed."""
        return self._run([sys.executable, "-c", code.replace("127.0.0.1:50051", ADDRESS)])

    def stop(self) -> None:
        """Press Ctrl-C in the first terminal, if a service still runs there."""
        if self._service is not None:
            if self._service.poll() is None:
                self._service.send_signal(signal.SIGINT)
            self._service.wait(COMMAND_TIMEOUT_S)
            self._service = None

    def _start(self, line: str) -> None:
        with (self.home / "service.log").open("ab") as log:
            self._service = subprocess.Popen(
                line.split(), cwd=self.home, env=self._env, stdout=log, stderr=log
            )

    def _run_line(self, line: str) -> str:
        # In this process, where no shell is needed: a new one takes longer than the command.
        if not line.startswith("runrecovery ") or re.search(r"[|;$]", line):
            return self._run(["bash", "-c", line])
        ended = CliRunner().invoke(root, shlex.split(line)[1:], env=self._env)
        assert ended.exit_code == 0, f"{line}: {ended.output}{ended.exception!r}"
        return ended.stdout

    def _run(self, words: list[str]) -> str:
        ended = subprocess.run(
            words,
            cwd=self.home,
            env=self._env,
            timeout=COMMAND_TIMEOUT_S,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout}\n{ended.stderr}"
        return ended.stdout


@pytest.fixture
def terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminals]:
    """Terminals in a directory with the example configuration."""
    monkeypatch.chdir(tmp_path)
    example = (REPOSITORY / "runrecovery.example.toml").read_text("utf-8")
    (tmp_path / "runrecovery.example.toml").write_text(example, "utf-8")
    opened = Terminals(tmp_path)
    try:
        yield opened
    finally:
        opened.stop()


def test_commands_of_the_tutorial_show_the_decisions_that_it_promises(terminals: Terminals) -> None:
    for block in code_blocks("docs/tutorial.md"):
        terminals.type(block)

    decided = terminals.printed["runrecovery recovery list"]
    rules = {
        "second": "resumable_waiting_preserved",
        "third": "running_interrupted",
        "fourth": "requeued",
    }
    assert [
        run
        for run, rule in rules.items()
        if not re.search(f"^{run}\t.*\t{rule}\t", decided, re.MULTILINE)
    ] == []
    planned = terminals.printed["runrecovery recovery plan"]
    assert [rule for rule in rules.values() if rule not in planned] == []
    (children,) = (shown for line, shown in terminals.printed.items() if "grep child" in line)
    assert len(re.findall(r'"message": "(?:detached )?child \d+"', children)) == 3
    explained = terminals.printed["runrecovery recovery explain third"]
    assert "because:  The service restarted while the run was running.\n" in explained
    watched = terminals.printed["runrecovery runs watch second --from-start"]
    assert ["RECOVERED" in watched, "SUCCEEDED" in watched] == [True, True]
    assert "RECOVERED_QUEUED" in terminals.printed["runrecovery runs get fourth"]
    assert lines_not_printed("docs/tutorial.md", terminals.printed) == []


def lines_not_printed(page: str, printed: dict[str, str]) -> list[str]:
    """Return the lines that a page shows as output and that no command has printed.

    Spaces do not matter. Lines with times, and the line of a process, are not compared. `fourth`,
    which is queued again, may not have started yet.
    """
    real = {" ".join(line.split()) for shown in printed.values() for line in shown.splitlines()}
    real |= {line.replace("fourth demo QUEUED ", "fourth demo RUNNING ") for line in real}
    samples = [
        " ".join(line.split())
        for block in code_blocks(page, language="text")
        for line in block.splitlines()
    ]
    return [line for line in samples if line not in real and not re.search(r":\d\d|^\d{5} ", line)]


def test_quick_start_of_the_readme_works(terminals: Terminals) -> None:
    for block in code_blocks("README.md"):
        if re.match(r"make |buf curl|curl |runrecovery runs create codex", block) is None:
            terminals.type(block)
    (example,) = code_blocks("README.md", language="python")

    assert '{"answers": ["yes"]}' in terminals.printed["runrecovery runs get first"]
    assert terminals.run_python(example) == "RUN_STATUS_SUCCEEDED {'answers': ['go on']}\n"


def test_engine_of_the_page_greets_over_a_service(terminals: Terminals) -> None:
    (code,) = code_blocks("docs/engines.md", language="python")
    (table,) = code_blocks("docs/engines.md", language="toml")
    engine = terminals.home / "greeter.py"
    engine.write_text(code, "utf-8")
    configuration = table.replace("/absolute/path/to/greeter.py", str(engine))
    (terminals.home / "runrecovery.toml").write_text(configuration, "utf-8")

    terminals.type("runrecovery serve\nrunrecovery health --wait 30")
    (commands,) = code_blocks("docs/engines.md")
    terminals.type(commands)

    assert 'output:         {"text": "Hi, Ada!"}' in terminals.printed["runrecovery runs get hello"]


def test_service_without_an_engine_names_the_configuration_file_that_it_looked_for(
    terminals: Terminals,
) -> None:
    terminals.type("runrecovery check\nrunrecovery serve\nrunrecovery health --wait 30")
    terminals.stop()
    note = "note: no engine is configured in runrecovery.toml, so no run can be created\n"
    assert terminals.printed["runrecovery check"] == f"{note}no problem found\n"
    log = (terminals.home / "service.log").read_text("utf-8")
    events = [json.loads(line) for line in log.splitlines()]

    assert [event["file"] for event in events if event["event"] == "service.no_engines"] == [
        "runrecovery.toml"
    ]
