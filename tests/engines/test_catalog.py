"""Engines by name, their session files, and the check of a session."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.errors import UnknownEngine
from runrecovery_service.domain.run import Profile
from runrecovery_service.domain.session_check import (
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    SessionVerdict,
    StoredHandle,
    UnknownSession,
)
from runrecovery_service.engines.catalog import Catalog, Engine, check_sessions
from runrecovery_service.engines.sessions import sessions_of


def engine(
    name: str = "demo", session_file: str | None = "{workspace}/session-{value}.json"
) -> Engine:
    return Engine(
        name=name,
        command=("agent",),
        profile=Profile.RESUMABLE,
        env_allow=(),
        max_concurrent=None,
        session_file=session_file,
    )


def check(engine: Engine, workspace: Path, handle: str) -> SessionFinding:
    (finding,) = check_sessions(engine, [StoredHandle(handle=handle, workspace=workspace)])
    return finding


def test_an_engine_is_found_by_its_name() -> None:
    catalog = Catalog([engine("b"), engine("a")])

    assert catalog.get("a") == engine("a")
    assert catalog.names == ("a", "b")


def test_engines_are_replaced_at_once_and_a_snapshot_keeps_the_ones_before() -> None:
    catalog = Catalog([engine("a"), engine("b", None)])
    before = catalog.snapshot()

    catalog.replace(Catalog([engine("a", None), engine("c")]))

    assert (catalog.get("a"), catalog.names) == (engine("a", None), ("a", "c"))
    assert (before.get("a"), before.names) == (engine("a"), ("a", "b"))


def test_an_unknown_engine_is_refused_with_the_known_names() -> None:
    with pytest.raises(UnknownEngine) as caught:
        Catalog([engine("b"), engine("a")]).get("c")

    assert caught.value.known == ("a", "b")


@pytest.mark.parametrize(("own_s", "wait_s"), [(30.0, 30.0), (None, 90.0)])
def test_a_question_waits_as_its_run_says_or_else_as_its_engine_says(
    own_s: float | None, wait_s: float
) -> None:
    run: Any = SimpleNamespace(engine="demo", session_timeout_s=own_s)

    assert Catalog([replace(engine(), session_timeout_s=90.0)]).wait_s(run) == wait_s


def test_a_session_path_contains_the_workspace_and_the_handle(tmp_path: Path) -> None:
    assert engine().session_path(tmp_path, "ab-1._") == tmp_path / "session-ab-1._.json"


def test_placeholders_in_the_workspace_are_not_replaced() -> None:
    assert engine().session_path(Path("/w/{value}"), "x") == Path("/w/{value}/session-x.json")


def test_a_session_path_may_be_outside_the_workspace() -> None:
    home = engine(session_file="/home/agent/.sessions/{value}")

    assert home.session_path(Path("/w"), "x") == Path("/home/agent/.sessions/x")


@pytest.mark.parametrize(
    "value", ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\0", "a\n", "ä", "a b", "x" * 513]
)
def test_a_handle_that_is_no_file_name_has_no_session_path(tmp_path: Path, value: str) -> None:
    bare = engine(session_file="{workspace}/{value}")

    assert bare.session_path(tmp_path, value) is None
    assert check(bare, tmp_path, value).reason is SessionReason.UNUSABLE


@given(st.text(max_size=20))
def test_no_handle_leads_out_of_the_session_folder(value: str) -> None:
    path = engine(session_file="{workspace}/{value}").session_path(Path("/w/s"), value)

    assert path is None or Path(os.path.normpath(path)).parent == Path("/w/s")


def test_a_session_whose_file_is_not_empty_is_valid(tmp_path: Path) -> None:
    (tmp_path / "session-x.json").write_text("{}")

    assert check(engine(), tmp_path, "x") == SessionFinding(
        SessionVerdict.VALID, SessionReason.PRESENT
    )


def test_a_session_without_its_file_is_invalid(tmp_path: Path) -> None:
    assert check(engine(), tmp_path, "x") == SessionFinding(
        SessionVerdict.INVALID, SessionReason.MISSING
    )


def test_an_empty_file_is_no_session(tmp_path: Path) -> None:
    (tmp_path / "session-x.json").touch()

    assert check(engine(), tmp_path, "x") == SessionFinding(
        SessionVerdict.INVALID, SessionReason.EMPTY
    )


def test_a_directory_is_no_session(tmp_path: Path) -> None:
    (tmp_path / "session-x.json").mkdir()

    assert check(engine(), tmp_path, "x") == SessionFinding(
        SessionVerdict.INVALID, SessionReason.NOT_A_FILE
    )


def test_a_pipe_is_no_session(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "session-x.json")

    assert check(engine(), tmp_path, "x") == SessionFinding(
        SessionVerdict.INVALID, SessionReason.NOT_A_FILE
    )


def test_a_name_too_long_for_the_disk_is_no_session(tmp_path: Path) -> None:
    assert check(engine(), tmp_path, "x" * 512) == SessionFinding(
        SessionVerdict.INVALID, SessionReason.UNUSABLE
    )


def test_an_engine_without_a_session_file_has_no_session_check(tmp_path: Path) -> None:
    silent = engine(session_file=None)

    assert silent.session_store is None
    assert silent.session_check is None
    stored = StoredHandle(handle="x", workspace=tmp_path)
    assert list(check_sessions(silent, [stored])) == []


@pytest.mark.parametrize(
    ("unknown", "verdict"),
    [
        (UnknownSession.KEEP, SessionVerdict.UNKNOWN),
        (UnknownSession.FAIL, SessionVerdict.UNKNOWN_REFUSED),
    ],
)
def test_unknown_session_decides_about_a_file_that_the_system_fails_to_read(
    tmp_path: Path, unknown: UnknownSession, verdict: SessionVerdict
) -> None:
    loop = tmp_path / "session-x.json"
    loop.symlink_to(loop)

    finding = check(replace(engine(), unknown_session=unknown), tmp_path, "x")

    assert finding == SessionFinding(verdict, SessionReason.NOT_ANSWERED)
    assert finding.holds is (unknown is UnknownSession.KEEP)


@pytest.mark.parametrize("unknown", UnknownSession)
def test_a_missing_session_of_a_preset_is_only_unknown_if_it_was_never_seen(
    tmp_path: Path, unknown: UnknownSession
) -> None:
    (tmp_path / "home" / "sessions").mkdir(parents=True)
    sessions = sessions_of("codex", {"CODEX_HOME": str(tmp_path / "home")})
    codex = replace(engine(), sessions=sessions, unknown_session=unknown)
    bare = StoredHandle(handle="01a2224c-844d-7cb3-9d3f-de37c32f5481", workspace=tmp_path)
    marked = replace(bare, fingerprint=SessionFingerprint(1, 2))
    kept = unknown is UnknownSession.KEEP
    by_policy = SessionVerdict.UNKNOWN if kept else SessionVerdict.UNKNOWN_REFUSED
    missing = SessionFinding(SessionVerdict.INVALID, SessionReason.MISSING)

    assert list(check_sessions(codex, [bare, marked])) == [
        SessionFinding(by_policy, SessionReason.MISSING), missing
    ]  # fmt: skip
    assert list(check_sessions(codex, [bare, marked], seen_before=False)) == [missing] * 2


def test_a_missing_session_file_of_an_engine_is_invalid_without_a_fingerprint(
    tmp_path: Path,
) -> None:
    assert check(engine(), tmp_path, "gone") == SessionFinding(
        SessionVerdict.INVALID, SessionReason.MISSING
    )
