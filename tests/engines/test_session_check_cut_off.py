"""A whole session is valid; one that was cut off is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runrecovery_service.domain.session_check import SessionFingerprint, SessionReason
from runrecovery_service.engines.sessions import files
from runrecovery_service.engines.sessions.lines import FOUND
from support.sessions import StoredSession, text_of


def test_a_whole_session_is_valid(session: StoredSession) -> None:
    assert session.check() is SessionReason.WHOLE


@pytest.mark.parametrize("turns", [1, 2, 9])
def test_a_session_of_any_number_of_turns_is_valid(session: StoredSession, turns: int) -> None:
    session.home.write(session.handle, session.workspace, turns=turns, filler=3)

    assert session.check() is SessionReason.WHOLE


def test_a_session_with_an_unchanged_fingerprint_is_not_read(
    session: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = session.fingerprint()
    monkeypatch.setattr(files, "_excerpt", None)

    assert session.check(fingerprint) is SessionReason.UNCHANGED


def test_a_session_whose_file_time_changed_is_read(session: StoredSession) -> None:
    fingerprint = session.fingerprint()
    os.utime(session.file, ns=(1, 1))

    assert session.check(fingerprint) is SessionReason.WHOLE


def test_a_session_that_grew_by_a_turn_is_valid(session: StoredSession) -> None:
    fingerprint = session.fingerprint()
    session.home.add_turn(session.file, session.handle, session.workspace)

    assert session.check(fingerprint) is SessionReason.WHOLE


def test_a_turn_cut_off_after_the_fingerprint_leaves_the_session_valid(
    session: StoredSession,
) -> None:
    fingerprint = session.fingerprint()
    turn = text_of(session.home.turn(session.handle, session.workspace, 9))
    for added in (turn[:7], turn[: turn.index(b"\n") + 1], turn[:-1]):
        with session.file.open("ab") as file:
            file.write(added)

        assert session.check(fingerprint) is SessionReason.WHOLE


def test_a_workspace_path_through_a_symlink_is_the_same_workspace(
    session: StoredSession, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(session.workspace.parent)

    assert (
        session.home.check(session.handle, link / session.workspace.name)
        == FOUND[SessionReason.WHOLE]
    )


def test_an_agent_home_that_is_a_symlink_is_followed(
    session: StoredSession, tmp_path: Path
) -> None:
    real = session.home.path.rename(tmp_path / "elsewhere")
    session.home.path.symlink_to(real)

    assert session.check() is SessionReason.WHOLE


# -- cut off -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_fingerprint", [False, True])
def test_a_session_cut_in_half_is_invalid(
    session: StoredSession, *, with_fingerprint: bool
) -> None:
    fingerprint = session.fingerprint() if with_fingerprint else None
    os.truncate(session.file, session.file.stat().st_size // 2)

    assert session.check(fingerprint) is SessionReason.CUT_OFF


@pytest.mark.parametrize("with_fingerprint", [False, True])
def test_a_session_without_its_last_byte_is_invalid(
    session: StoredSession, *, with_fingerprint: bool
) -> None:
    fingerprint = session.fingerprint() if with_fingerprint else None
    os.truncate(session.file, session.file.stat().st_size - 1)

    assert session.check(fingerprint) is SessionReason.CUT_OFF


def test_the_fingerprint_reveals_every_cut_at_a_line_end(session: StoredSession) -> None:
    fingerprint, lines = session.fingerprint(), session.lines
    for left in range(1, len(lines)):
        session.file.write_bytes(b"".join(lines[:left]))

        assert session.check(fingerprint) is SessionReason.CUT_OFF


def test_without_a_fingerprint_a_cut_at_a_line_end_is_found_if_it_took_the_answer(
    session: StoredSession,
) -> None:
    lines = session.lines
    answer = max(at for at, line in enumerate(lines) if b"ask_user" in line)
    for left in range(1, len(lines)):
        session.file.write_bytes(b"".join(lines[:left]))

        assert session.check() is (SessionReason.WHOLE if left > answer else SessionReason.CUT_OFF)


@pytest.mark.parametrize("left", range(2, 900, 97))
def test_a_session_cut_inside_one_of_its_last_lines_is_invalid(
    session: StoredSession, left: int
) -> None:
    os.truncate(session.file, session.file.stat().st_size - left)
    if session.file.read_bytes().endswith(b"\n"):
        pytest.skip("the end of a line")

    assert session.check() is SessionReason.CUT_OFF


def test_a_session_whose_last_line_is_garbage_is_invalid(session: StoredSession) -> None:
    session.file.write_bytes(session.file.read_bytes()[:-40] + b"\0" * 39 + b"\n")

    assert session.check() is SessionReason.CUT_OFF


def test_a_rewritten_session_is_judged_by_its_end(session: StoredSession) -> None:
    fingerprint = SessionFingerprint(session.file.stat().st_size - 20, 5)  # no line ends there
    assert session.check(fingerprint) is SessionReason.WHOLE

    os.truncate(session.file, session.file.stat().st_size - 1)
    assert session.check(fingerprint) is SessionReason.CUT_OFF
