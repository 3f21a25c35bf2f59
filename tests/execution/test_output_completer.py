"""The kept output of a killed service is completed by the rests that its shims have saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.run import Profile, Session
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import Dialect
from runrecovery_service.engines.jsonl import JSON_LINES
from runrecovery_service.execution.output_completer import OutputCompleter
from runrecovery_service.process.shim_journal import RecordedEnd, read_end
from runrecovery_service.storage.found_ends import OpenTurn
from runrecovery_service.storage.launch_records import LaunchRecord

HANDLE: Final = "01a2224f-ff16-7cb2-8eb4-59969e2c0c53"
ANOTHER: Final = "01a2224f-ff16-7cb2-8eb4-000000000000"
SHIM: Final = (70, 900)
BY: Final = {"by": 70, "by_start_ticks": 900}
BEFORE: Final = b"an earlier turn\n"


class Attempt:
    """The files of one attempt, as a killed service and its shim leave them.

    The output file has one line of an earlier turn.
    """

    def __init__(self, place: Path) -> None:
        self.workspaces = Workspaces(place / "runs")
        self.workspaces.prepare(1, 1, fresh=True)
        self.output = OutputFiles(self.workspaces, max_bytes=1000)
        self.journal = self.workspaces.shim_journal(1, 1, 1)
        self.rest = self.workspaces.output_rest(1, 1, 1)
        self.keep(BEFORE)

    def keep(self, data: bytes) -> None:
        self.output.append(1, 1, OutputChannel.STDOUT, data)

    def note(self, event: str, **facts: object) -> None:
        with self.journal.open("a") as journal:
            journal.write(json.dumps({"event": event, **facts, **BY}) + "\n")

    def save(self, raw: bytes, *, exit_code: int = -9, **facts: object) -> None:
        """Save a rest, as the shim does."""
        self.rest.write_bytes(raw)
        self.note("agent.exited", code=exit_code)
        begins = {"begin": len(BEFORE), "kept": len(BEFORE)}
        self.note("output.rest", **{**begins, "size": len(raw), "at_end": True, **facts})

    def completer(self, dialect: Dialect = JSON_LINES) -> OutputCompleter:
        engine = Engine(
            name="agent",
            command=("agent",),
            profile=Profile.RESUMABLE,
            dialect=dialect,
            env_allow=(),
            max_concurrent=None,
            session_file=None,
            session_timeout_s=600.0,
        )
        return OutputCompleter(
            catalog=Catalog([engine]),
            workspaces=self.workspaces,
            output=self.output,
            boot_id="boot",
        )

    def complete(self, dialect: Dialect = JSON_LINES, handle: str | None = None) -> bytes:
        """Complete the output; return the text after the line of the earlier turn."""
        self.completer(dialect).complete(turn_of(dialect, handle))
        kept = self.workspaces.output(1, 1).read_bytes()
        assert kept.startswith(BEFORE)
        return kept[len(BEFORE) :]

    def end(self) -> RecordedEnd | None:
        return read_end(self.journal, SHIM)


def turn_of(dialect: Dialect, handle: str | None) -> OpenTurn:
    return OpenTurn(
        run_key=1,
        run_id="run",
        engine="agent",
        profile=Profile.RESUMABLE,
        attempt=1,
        turn=1,
        session=(handle and Session(type=dialect.session_type, handle=handle, turn=1)) or None,
        boot_id="boot",
        shim=SHIM,
        session_timeout_s=None,
        require_user_reply=True,
    )


LAUNCH: Final = LaunchRecord(
    key=1,
    run_key=1,
    run_id="run",
    attempt=1,
    turn=1,
    host_id="host",
    boot_id="boot",
    pid_namespace=1,
    cookie="cookie",
    watermark=None,
    cgroup=None,
    pid=SHIM[0],
    start_ticks=SHIM[1],
    unended=False,
)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


@pytest.mark.parametrize(
    "kept",
    [b"", b"x\n", b"x\nx", b"x\nx\n", b"x\nx\nx\ny\n"],
    ids=["nothing", "a line", "half of a line", "two lines", "everything"],
)
def test_what_the_service_had_appended_is_not_appended_again(attempt: Attempt, kept: bytes) -> None:
    attempt.keep(kept)
    attempt.save(b"x\nx\nx\ny\n")

    with structlog.testing.capture_logs() as logs:
        assert attempt.complete() == b"x\nx\nx\ny\n"

    assert not attempt.rest.exists()
    assert [(event["event"], event["bytes"]) for event in logs] == [
        ("recovery.output_completed", 8 - len(kept)) for _ in range(len(kept) < 8)
    ]


def test_the_rest_follows_the_recorded_position(attempt: Attempt) -> None:
    attempt.keep(b"x\nx\n")
    attempt.save(b"x\ny\n", kept=len(BEFORE) + 4)

    assert attempt.complete() == b"x\nx\nx\ny\n"


def test_output_that_is_complete_to_its_end_is_recorded_as_kept(attempt: Attempt) -> None:
    attempt.keep(b"x\n")
    attempt.save(b"y\nz", exit_code=0, kept=len(BEFORE) + 2)

    assert attempt.complete() == b"x\ny\nz"
    assert attempt.end() == RecordedEnd(exit_code=0, begin=len(BEFORE), end=len(BEFORE) + 5)


def test_a_service_that_had_appended_everything_is_recorded_to_have_kept_it(
    attempt: Attempt,
) -> None:
    attempt.keep(b"x\n")
    attempt.save(b"", exit_code=0, kept=len(BEFORE) + 2)

    assert attempt.complete() == b"x\n"
    assert attempt.end() == RecordedEnd(exit_code=0, begin=len(BEFORE), end=len(BEFORE) + 2)


@pytest.mark.parametrize("facts", [{"at_end": False}, {"begin": -1}])
def test_output_that_may_lack_something_is_not_recorded_as_kept(
    attempt: Attempt, facts: dict[str, Any]
) -> None:
    attempt.save(b"x\n", exit_code=0, **facts)

    assert attempt.complete() == b"x\n"
    assert attempt.end() is None


def test_output_beyond_the_limit_is_cut_off_and_not_recorded_as_kept(attempt: Attempt) -> None:
    attempt.save(b"x" * 2000 + b"\n", exit_code=0)

    assert attempt.complete() == b"x" * (1000 - len(BEFORE))
    assert attempt.output.read(1, 1, OutputChannel.STDOUT, 0, 2000).truncated
    assert attempt.end() is None


def test_half_a_line_of_a_killed_agent_is_left_out(attempt: Attempt) -> None:
    attempt.save(b'x\n{"session": "half-a-sec')

    assert attempt.complete() == b"x\n"


def test_a_second_try_changes_nothing(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is killed after it has appended, and again after it has recorded that."""
    attempt.save(b"x\nx\n", exit_code=0)
    raw = attempt.rest.read_bytes()
    for _ in range(3):
        attempt.rest.write_bytes(raw)
        assert attempt.complete() == b"x\nx\n"

    assert attempt.end() == RecordedEnd(exit_code=0, begin=len(BEFORE), end=len(BEFORE) + 4)


Break = Callable[[Attempt], object]


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (lambda a: a.keep(b"z\n"), "the output file has other output"),
        (lambda a: a.keep(b"x\ny\n"), "the output file has other output"),
        (lambda a: a.rest.write_bytes(b"x"), "the rest is not as it was saved"),
        (lambda a: a.rest.write_bytes(b"xx\n"), "the rest is not as it was saved"),
        (lambda a: a.rest.unlink(), "FileNotFoundError"),
        (lambda a: (a.rest.unlink(), a.rest.symlink_to("/etc/hostname")), "OSError"),
        (
            lambda a: a.workspaces.output(1, 1).write_bytes(BEFORE[:-1]),
            "the output file is shorter than recorded",
        ),
    ],
)
def test_output_that_does_not_fit_stays_as_it_is(
    attempt: Attempt, breaks: Break, reason: str
) -> None:
    attempt.save(b"x\n", exit_code=0)
    breaks(attempt)
    before = attempt.workspaces.output(1, 1).read_bytes()

    with structlog.testing.capture_logs() as logs:
        attempt.completer().complete(turn_of(JSON_LINES, None))

    assert attempt.workspaces.output(1, 1).read_bytes() == before
    assert attempt.end() is None
    (event,) = logs
    assert (event["event"], event["reason"]) == ("recovery.output_not_completed", reason)


# -- secrets -------------------------------------------------------------------------------------


def line(**members: object) -> bytes:
    return json.dumps(members).encode() + b"\n"


def test_a_session_line_is_hidden(attempt: Attempt) -> None:
    attempt.save(line(type="session", value="secret") + b"no protocol\n")

    assert attempt.complete() == b'{"type":"session","value":"[secret]"}\nno protocol\n'


@pytest.mark.parametrize("dialect", [CLAUDE, CODEX])
def test_a_handle_on_record_is_hidden_and_other_ids_are_not(
    attempt: Attempt, dialect: Dialect
) -> None:
    attempt.save(line(a=HANDLE, b=ANOTHER, c="[secret]"))

    assert attempt.complete(dialect, HANDLE) == line(a="[secret]", b=ANOTHER, c="[secret]")


def test_every_id_is_hidden_until_the_agent_has_named_its_session(attempt: Attempt) -> None:
    named = line(type="thread.started", thread_id=HANDLE)
    attempt.save(line(a=ANOTHER) + named + line(a=HANDLE, b=ANOTHER))

    hidden = line(type="thread.started", thread_id="[secret]")
    assert attempt.complete(CODEX) == (line(a="[secret]") + hidden + line(a="[secret]", b=ANOTHER))


# -- which launches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"boot_id": "another"}, False),
        ({"pid": 71}, False),
        ({"start_ticks": 901}, False),
        ({"pid": None}, False),
        ({"turn": 2}, False),
    ],
)
def test_only_the_shim_of_the_launch_in_this_boot_has_saved_a_rest(
    attempt: Attempt,
    changes: dict[str, Any],
    expected: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    attempt.save(b"x\n")

    assert attempt.completer().has_rest(replace(LAUNCH, **changes)) is expected


@pytest.mark.parametrize(
    "facts", [{"kept": -1}, {"size": -1}, {"kept": None}, {"size": True}, {"begin": "0"}]
)
def test_a_record_without_a_usable_rest_has_none(attempt: Attempt, facts: dict[str, Any]) -> None:
    attempt.save(b"x\n", **facts)

    assert not attempt.completer().has_rest(LAUNCH)
