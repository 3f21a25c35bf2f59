"""Real CLIs for the tests of this folder: `make test-agents`, with `ROUNDS=20` for a table."""

from __future__ import annotations

import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from cli_agents.cli_setup import RealCliSetup
from cli_agents.clis import CLIS, Cli
from cli_agents.model_endpoint import ModelEndpoint
from support.engines import REPOSITORY

KEPT: Final = REPOSITORY / ".agent-clis" / "failed"
ROUNDS: Final = int(os.environ.get("ROUNDS") or 1)
FAILED: Final = pytest.StashKey[bool]()

NewSetup = Callable[..., RealCliSetup]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test once per CLI and round. A module can name its CLIs in `TRIED`."""
    if "cli" in metafunc.fixturenames:
        tried = getattr(metafunc.module, "TRIED", CLIS)
        metafunc.parametrize("cli", tried, ids=lambda cli: cli.name)
    if "round_number" in metafunc.fixturenames:
        metafunc.parametrize("round_number", range(1, ROUNDS + 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow ten minutes per test: a CLI takes seconds to start, and longer beside others."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record for fixtures whether the test failed, and for the table which scenario it was."""
    report = yield
    spec = getattr(item, "callspec", None)
    if spec is not None and "cli" in spec.params:
        scenario = getattr(item, "originalname", item.name)
        report.user_properties.append(("round_of", f"{spec.params['cli'].name} {scenario}"))
    if call.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture
def installed(cli: Cli) -> Cli:
    """An installed CLI. Without it the test is skipped, with the reason."""
    if not cli.program.exists():
        why = "npm is missing, which installs it"
        if shutil.which("npm"):
            why = "`make test-agents` installs it"
        pytest.skip(f"the real {cli.name} is not installed: {why}")
    return cli


@pytest.fixture
def endpoint() -> Iterator[ModelEndpoint]:
    """A model endpoint for this test alone."""
    with ModelEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def new_setup(
    request: pytest.FixtureRequest, installed: Cli, tmp_path: Path, endpoint: ModelEndpoint
) -> Iterator[NewSetup]:
    """Makes setups. At the end of the test, clears them and checks that no process is left."""
    setups: list[RealCliSetup] = []

    def make(**keys: Any) -> RealCliSetup:
        setups.append(RealCliSetup(installed, tmp_path, endpoint, **keys))
        return setups[-1]

    yield make
    for setup in setups:
        setup.home.clear()
    left = [pid for setup in setups for pid in setup.processes()]
    unexpected = [*left, *endpoint.outside, *endpoint.unknown]
    if unexpected or request.node.stash.get(FAILED, True):
        for setup in setups:
            setup.copy_to(KEPT / request.node.name.replace("/", "-"))
    shutil.rmtree(tmp_path, ignore_errors=True)  # a CLI's home is large
    assert unexpected == []


# -- the table of rounds ---------------------------------------------------------------------------


@dataclass(slots=True)
class Scenario:
    """How the rounds of one scenario went with one CLI."""

    seconds: list[float] = field(default_factory=list)
    bad: int = 0

    def row(self, cli: str, name: str) -> str:
        """Return a row of the table."""
        words = name.removeprefix("test_").replace("_", " ")
        passed, median = len(self.seconds) - self.bad, statistics.median(self.seconds)
        return f"| {cli} | {words} | {len(self.seconds)} | {passed} | {median:.1f} |"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how the rounds went, as it can be pasted into docs/agents.md."""
    scenarios: dict[str, Scenario] = defaultdict(Scenario)
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if name := dict(report.user_properties).get("round_of"):
                scenarios[name].seconds += [report.duration] * (report.when == "call")
                scenarios[name].bad += outcome != "passed"
    played = {name: scenario for name, scenario in scenarios.items() if scenario.seconds}
    if played:
        terminalreporter.write_sep("-", "rounds")
        terminalreporter.write_line("| CLI | scenario | rounds | passed | seconds, median |")
        terminalreporter.write_line("|---|---|---|---|---|")
    for name, scenario in sorted(played.items()):
        cli, _, words = name.partition(" ")
        terminalreporter.write_line(scenario.row(cli, words))
