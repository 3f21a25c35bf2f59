"""A model that fails: how the run ends, and what it shows of the retries of the real CLIs.

A CLI that retries for longer than a test can wait is ended by the time limit of its engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pytest
from cli_agents.cli_setup import RealCliSetup
from cli_agents.clis import Cli
from cli_agents.model_endpoint import ModelEndpoint
from cli_agents.model_faults import WHY, FailingModel, Fault, NoEndpoint
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, status_word
from support.waiting import until

NewSetup = Callable[..., RealCliSetup]

LIMIT_S: Final = 45.0
"""Time limit of a run that its CLI would not end."""
LONG_S: Final = 240.0
"""How long a CLI may retry before it ends the run by itself, beside others."""

TIMEOUT: Final = "RUN_TIMEOUT"
FAILED: Final = "ENGINE_FAILED"
REFUSED: Final = "ENGINE_UNAUTHENTICATED"
WELL: Final = ""


@dataclass(frozen=True, slots=True)
class End:
    """How a run ends.

    Attributes:
        code: its error code; empty: it succeeds.
        retry: a pattern of its last RETRYING event; None: it has none.
        says: what its error message has.
    """

    code: str
    retry: str | None = None
    says: str = ""


FAULTS: Final[Mapping[str, Fault | None]] = {
    "401": Fault(status=401),
    "403": Fault(status=403),
    "429": Fault(status=429),
    "429, retry-after 2": Fault(status=429, retry_after_s=2),
    "429, retry-after 3600": Fault(status=429, retry_after_s=3600),
    "500": Fault(status=500),
    "500 once": Fault(status=500, times=1),
    "529": Fault(status=529),
    "stream cut once": Fault(times=1),
    "stream cut always": Fault(),
    "connection refused": None,
}

_CODEX_429: Final = r"Reconnecting\.\.\. \d/5 \(exceeded retry limit, last status: 429 Too Many"
_CODEX_BUSY: Final = r"Reconnecting\.\.\. 5/5 \(.*high demand"
_CODEX_CUT: Final = r"Reconnecting\.\.\. \d/5 \(stream disconnected before completion"
CODEX: Final[Mapping[str, End]] = {
    "401": End(REFUSED, r"Reconnecting\.\.\. 2/5 \(unexpected status 401 Unauthorized", WHY),
    "403": End(REFUSED, r"Reconnecting\.\.\. 2/5 \(unexpected status 403 Forbidden", WHY),
    "429": End(FAILED, None, "429 Too Many Requests"),
    "429, retry-after 2": End(FAILED, _CODEX_429, "429 Too Many Requests"),
    "429, retry-after 3600": End(TIMEOUT, _CODEX_429),
    "500": End(FAILED, _CODEX_BUSY, "high demand"),
    "500 once": End(WELL),
    "529": End(FAILED, r"Reconnecting\.\.\. 5/5 \(unexpected status 529", WHY),
    "stream cut once": End(WELL, _CODEX_CUT),
    "stream cut always": End(FAILED, _CODEX_CUT, "stream disconnected"),
    "connection refused": End(TIMEOUT, r"Reconnecting\.\.\. waiting for network"),
}
GEMINI: Final[Mapping[str, End]] = {
    "401": End(REFUSED, None, WHY),
    "403": End(REFUSED, None, WHY),
    **{
        fault: End(TIMEOUT, r"Attempt \d failed with status 429")
        for fault in ("429", "429, retry-after 2", "429, retry-after 3600")
    },
    "500": End(TIMEOUT, r"Attempt \d failed with status 500"),
    "500 once": End(WELL, "Attempt 1 failed with status 500"),
    "529": End(TIMEOUT, r"Attempt \d failed with status 529"),
    "stream cut once": End(FAILED, None, "terminated"),
    "stream cut always": End(FAILED, None, "terminated"),
    "connection refused": End(TIMEOUT, r"Attempt \d failed$"),
}
_CLAUDE_429: Final = r"attempt \d+ to call the model failed with status 429 \(rate_limit\)"
CLAUDE: Final[Mapping[str, End]] = {
    "401": End(REFUSED, r"attempt 2 to call .* failed with status 401 \(authentication_failed\)"),
    "403": End(REFUSED, None, WHY),
    "429": End(TIMEOUT, _CLAUDE_429),
    "429, retry-after 2": End(TIMEOUT, _CLAUDE_429),
    "429, retry-after 3600": End(FAILED, None, WHY),
    "500": End(TIMEOUT, r"attempt \d+ to call the model failed with status 500 \(server_error\)"),
    "500 once": End(WELL, r"attempt 1 to call .* failed with status 500 \(server_error\)"),
    "529": End(FAILED, r"attempt 2 to call .* failed with status 529 \(overloaded\)", "529"),
    "stream cut once": End(WELL),
    "stream cut always": End(WELL),  # it asks again for an answer that is no stream
    "connection refused": End(TIMEOUT, r"attempt \d+ to call the model failed \(unknown\)"),
}
_CLAUDE_CUT: Final = r"attempt \d+ to call the model failed \(unknown\)"
CLAUDE_NEWEST: Final[Mapping[str, End]] = {
    **CLAUDE,
    "stream cut once": End(WELL, _CLAUDE_CUT),
    "stream cut always": End(TIMEOUT, _CLAUDE_CUT),
}
ENDS: Final = {"codex": CODEX, "gemini": GEMINI, "claude": CLAUDE, "claude-newest": CLAUDE_NEWEST}


@pytest.fixture
def endpoint(fault: str) -> Iterator[ModelEndpoint]:
    """An endpoint that fails."""
    how = FAULTS[fault]
    with NoEndpoint() if how is None else ModelEndpoint(FailingModel(how)) as endpoint:
        yield endpoint


def until_ended(setup: RealCliSetup, api: Api) -> run_pb2.Run:
    """Wait until the run has ended, and return it."""

    def look() -> run_pb2.Run | None:
        run = api.get(setup.run_id)
        return run if status_word(run) in {"SUCCEEDED", "FAILED"} else None

    run = until(look, "the run has ended", timeout_s=LONG_S)
    assert run is not None
    return run


def retries_of(setup: RealCliSetup, api: Api) -> list[str]:
    """Return the messages of the RETRYING events of the run."""
    request = pb.WatchRunRequest(run_id=setup.run_id, after_sequence=0)
    events = [update.event for update in api.runs.WatchRun(request, timeout=20)]
    return [one.message for one in events if one.kind == run_pb2.RUN_EVENT_KIND_RETRYING]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_shows_how_its_model_fails(
    cli: Cli, new_setup: NewSetup, fault: str, round_number: int
) -> None:
    end = ENDS[cli.name][fault]
    keys: dict[str, Any] = {"max_run_time_s": LIMIT_S} if end.code == TIMEOUT else {}
    setup = new_setup(**keys)
    _, api = setup.home.start()
    setup.create_run(api, "GO")

    run = until_ended(setup, api)
    retries = retries_of(setup, api)

    assert run.error.code == end.code, run
    assert end.says in run.error.message
    assert bool(retries) is (end.retry is not None), retries
    assert len(retries) <= 20
    if end.retry is not None:
        assert re.match(end.retry, retries[-1]), retries
    if end.code == TIMEOUT:
        assert run.error.message.endswith(f" Its agent was retrying: {retries[-1]}.")
    assert not setup.processes()
    assert setup.settings.changed() == []
