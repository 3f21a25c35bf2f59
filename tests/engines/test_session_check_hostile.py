"""A session check survives every handle and every file, and reads a bounded part."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.session_check import (
    SessionFingerprint,
    SessionReason,
    SessionVerdict,
    StoredHandle,
)
from runrecovery_service.engines.sessions import files, sessions_of
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.lines import FOUND, VERDICT_OF, Excerpt, judge_excerpt
from support.sessions import PRESETS, SessionHome, StoredSession, session_id, text_of

KIB: Final = 1024


def sizes_parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the length of each text that is parsed from now on."""
    parsed: list[int] = []
    real = json.loads

    def loads(text: bytes) -> object:
        parsed.append(len(text))
        return real(text)

    monkeypatch.setattr(json, "loads", loads)
    return parsed


def test_a_line_longer_than_the_read_limit_is_not_parsed(
    session: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = sizes_parsed(monkeypatch)
    long_line = b"[],[]," * (8 * KIB * KIB // 6) + b"\n"
    session.file.write_bytes(long_line * 2)
    assert session.check() is SessionReason.NOT_KNOWN
    assert session.check(SessionFingerprint(len(long_line), 5)) is SessionReason.NOT_KNOWN
    assert [
        size for size in parsed if size > 1000
    ] == []  # Gemini CLI's list of projects is shorter

    head = text_of(session.home.beginning(session.handle, session.workspace))
    session.file.write_bytes(head + long_line)
    assert session.check() is SessionReason.NOT_KNOWN
    assert max(parsed) < files.FIRST_READ


def test_a_line_whose_beginning_was_not_read_is_not_parsed(
    session: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = sizes_parsed(monkeypatch)
    turn = session.home.turn(session.handle, session.workspace, 5)
    head = text_of(session.home.beginning(session.handle, session.workspace))
    long_line = b"[],[]," * (2 * KIB * KIB // 6) + b"\n"
    session.file.write_bytes(head + long_line + text_of(turn))

    assert session.check() is SessionReason.WHOLE
    assert max(parsed) < files.FIRST_READ


HOSTILE: Final = ["", ".", "..", "latest", "1", "../../etc/passwd", "a/b", "a\0b", "ä", "-" * 36]


@pytest.mark.parametrize("handle", HOSTILE)
def test_a_handle_that_is_no_session_id_is_unusable(session: StoredSession, handle: str) -> None:
    assert session.home.check(handle, session.workspace) == FOUND[SessionReason.UNUSABLE]
    assert session.home.fingerprint(handle, session.workspace) is None


@given(st.text(max_size=40))
def test_no_handle_makes_a_check_raise(handle: str) -> None:
    stored = StoredHandle(handle=handle, workspace=Path("/nowhere"))
    for preset in PRESETS:
        (finding,) = sessions_of(preset, {"HOME": "/nowhere"}).check([stored])

        assert finding.reason in {SessionReason.UNUSABLE, SessionReason.HOME_AWAY}


UUIDS: Final = st.one_of(
    st.uuids().map(str),
    st.uuids().map(lambda one: str(one).upper()),
    st.integers(0, 2**128 - 1).map(lambda bits: str(uuid.UUID(int=bits))),
    st.integers(0, 2**48 - 1).map(lambda ms: session_id(1, begun_ms=ms)),
    st.sampled_from(["ffffffff-ffff-7fff-8fff-ffffffffffff", str(uuid.UUID(int=0))]),
)


@given(UUIDS, st.binary(max_size=200), st.sampled_from(PRESETS), st.none() | st.integers(1, 250))
def test_no_session_id_and_no_file_content_makes_a_check_raise(
    handle: str, text: bytes, preset: str, kept: int | None
) -> None:
    with tempfile.TemporaryDirectory() as top:
        home, workspace = SessionHome(preset, Path(top, "home")), Path(top, "w")
        file = home.file(handle, workspace)
        file.parent.mkdir(parents=True)
        file.write_bytes(text)
        fingerprint = None if kept is None else SessionFingerprint(kept, 5)

        finding = home.check(handle, workspace, fingerprint)
        assert finding.reason not in {
            SessionReason.NOT_ANSWERED,
            SessionReason.UNUSABLE,
            SessionReason.HOME_AWAY,
        }
        home.fingerprint(handle, workspace)


@pytest.mark.parametrize("failing", ["finder", "layout"])
def test_a_defect_leaves_only_the_session_that_met_it_unknown(
    session: StoredSession, failing: str
) -> None:
    class Defective:
        """A finder and a layout of which one raises for the other session."""

        def paths(self, stored: StoredHandle) -> Iterator[Path]:
            if failing == "finder" and stored.handle != session.handle:
                raise ZeroDivisionError(stored.handle)
            yield session.file

        def identify(self, head: object, stored: StoredHandle) -> SessionReason | None:
            if failing == "layout" and stored.handle != session.handle:
                raise ZeroDivisionError(stored.handle)
            return None

        def is_end_of_turn(self, line: object) -> bool:
            return True

        def may_follow_end(self, line: object) -> bool:
            return False

    store = CliSessions(session.home.path, Defective, Defective())
    fine = StoredHandle(handle=session.handle, workspace=session.workspace)
    bad = replace(fine, handle=session.home.new_id(2))

    with structlog.testing.capture_logs() as logged:
        found = list(store.check([bad, fine, bad]))

    assert found == [
        FOUND[SessionReason.NOT_ANSWERED],
        FOUND[SessionReason.WHOLE],
        FOUND[SessionReason.NOT_ANSWERED],
    ]
    assert logged == [
        {"event": "sessions.look_failed", "log_level": "warning", "error": "ZeroDivisionError"}
    ]
    assert store.observe(bad).fingerprint is None


WORDS: Final = st.sampled_from([
    "type", "payload", "message", "content", "sessionId", "cwd", "$set", "messages", "role",
    "session_meta", "event_msg", "response_item", "user", "assistant", "gemini", "tool_use",
    "projectHash", "id", "stop_reason", "isMeta", "toolCalls",
])  # fmt: skip
JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=6),
    max_leaves=12,
)
LINES: Final = st.lists(
    st.dictionaries(WORDS, JSON, max_size=8).map(lambda line: json.dumps(line).encode())
    | st.binary(max_size=20),
    max_size=6,
)


@given(LINES, st.sampled_from([b"", b"\n"]), st.sampled_from(PRESETS), st.integers(0, 200))
def test_every_text_gets_a_verdict(lines: list[bytes], end: bytes, preset: str, at: int) -> None:
    text = b"\n".join(lines) + end
    stored = StoredHandle(handle=session_id(1), workspace=Path("/w"))
    layout = sessions_of(preset, {"HOME": "/"}).layout

    for excerpt in (
        Excerpt(text, text, tail_is_all=True),
        Excerpt(text[:at], text[at:], tail_is_all=False),
    ):
        assert VERDICT_OF[judge_excerpt(excerpt, stored, layout)] in SessionVerdict
