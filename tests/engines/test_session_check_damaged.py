"""Sessions that are missing, damaged, another's, unreadable or in an unknown format."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service.domain.session_check import SessionFingerprint, SessionReason, StoredHandle
from runrecovery_service.engines.sessions import sessions_of
from runrecovery_service.engines.sessions.lines import FOUND
from support.sessions import PRESETS, SessionHome, StoredSession, text_of

NEEDS_A_USER: Final = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def test_a_removed_session_is_invalid(session: StoredSession) -> None:
    fingerprint = session.fingerprint()
    session.file.unlink()

    assert session.check(fingerprint) is SessionReason.MISSING


@pytest.mark.parametrize("left", [(), (".runrecovery.config.toml.lock",)])
def test_a_session_is_unknown_while_its_agent_home_is_missing_or_empty(
    session: StoredSession, left: tuple[str, ...]
) -> None:
    fingerprint = session.fingerprint()
    shutil.rmtree(session.home.path)
    assert session.check(fingerprint) is SessionReason.HOME_AWAY

    session.home.path.mkdir()
    for name in left:  # the service's own file does not count
        (session.home.path / name).touch()
    assert session.check(fingerprint) is SessionReason.HOME_AWAY
    assert session.home.fingerprint(session.handle, session.workspace) is None


def test_a_missing_session_is_invalid_if_its_agent_home_has_any_file(
    session: StoredSession,
) -> None:
    shutil.rmtree(session.home.path)
    session.home.path.mkdir()
    (session.home.path / "auth.json").touch()

    assert session.check() is SessionReason.MISSING


def test_a_missing_session_is_unknown_if_its_agent_home_cannot_be_listed(
    session: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    session.file.unlink()
    monkeypatch.setattr(os, "scandir", fail)

    assert session.check() is SessionReason.NOT_ANSWERED


def test_an_empty_session_is_invalid(session: StoredSession) -> None:
    os.truncate(session.file, 0)

    assert session.check() is SessionReason.EMPTY


def test_a_session_whose_first_line_is_broken_is_invalid(session: StoredSession) -> None:
    session.file.write_bytes(b'{"broken\n' + b"".join(session.lines[1:]))

    assert session.check() is SessionReason.BROKEN


@pytest.mark.parametrize("with_fingerprint", [False, True])
def test_a_session_of_another_workspace_is_invalid(
    session: StoredSession, *, with_fingerprint: bool
) -> None:
    fingerprint = SessionFingerprint(10, 10) if with_fingerprint else None
    other = session.workspace.with_name("other")
    lines = [
        *session.home.beginning(session.handle, other), *session.home.turn(session.handle, other, 5)
    ]  # fmt: skip
    session.file.write_bytes(text_of(lines))

    assert session.check(fingerprint) is SessionReason.ELSEWHERE


def test_a_file_that_holds_another_session_is_invalid(session: StoredSession) -> None:
    shutil.copy(session.home.write(session.home.new_id(2), session.workspace), session.file)

    assert session.check() is SessionReason.ELSEWHERE


# -- unknown -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b'{"version":9,"turns":[]}\n', b'{"version":9}\n{}\n', b"{}"])
def test_a_session_in_an_unknown_format_is_unknown(session: StoredSession, text: bytes) -> None:
    session.file.write_bytes(text)

    assert session.check() is SessionReason.NOT_KNOWN
    assert session.check(session.fingerprint()) is SessionReason.UNCHANGED  # as the CLI left it


def test_a_session_is_unknown_if_the_environment_names_no_agent_home(
    session: StoredSession,
) -> None:
    stored = StoredHandle(handle=session.handle, workspace=session.workspace)
    for env in ({}, {"HOME": ""}, {"HOME": "relative"}):
        store = sessions_of(session.home.preset, env)

        assert list(store.check([stored, stored])) == [FOUND[SessionReason.NO_HOME]] * 2
        assert store.observe(stored).fingerprint is None


@pytest.mark.parametrize("preset", PRESETS)
def test_the_agent_home_is_below_home_if_the_clis_own_variable_is_not_set(
    preset: str, tmp_path: Path
) -> None:
    below = {"codex": ".codex", "gemini": "", "claude": ".claude"}[preset]
    home = SessionHome(preset, tmp_path.resolve() / below)
    home.write(home.new_id(1), tmp_path / "w")
    stored = StoredHandle(handle=home.new_id(1), workspace=tmp_path / "w")

    assert list(sessions_of(preset, {"HOME": str(tmp_path)}).check([stored])) == [
        FOUND[SessionReason.WHOLE]
    ]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_session_that_the_system_fails_to_read_is_unknown(
    session: StoredSession, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)

    assert session.check() is SessionReason.NOT_ANSWERED


def test_sessions_are_unknown_if_their_folder_cannot_be_listed(
    session: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[object] = []

    def fail(path: object, *_: object) -> list[str]:
        listed.append(path)
        raise OSError(errno.EIO, "input/output error")

    session.file.unlink()
    monkeypatch.setattr(os, "listdir", fail)
    monkeypatch.setattr(os, "open", fail)
    stored = StoredHandle(handle=session.handle, workspace=session.workspace)

    assert list(session.home.store.check([stored] * 3)) == [FOUND[SessionReason.NOT_ANSWERED]] * 3
    # Codex and Gemini CLI: the folder is listed once for the whole bulk check.
    assert len(listed) == (3 if session.home.preset == "claude" else 1)


def make_folder(file: Path) -> None:
    file.mkdir()


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


def make_symlink_loop(file: Path) -> None:
    file.symlink_to(file)


def make_dangling_symlink(file: Path) -> None:
    file.symlink_to(file.parent / "nowhere")


def make_device_symlink(file: Path) -> None:
    file.symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_folder, SessionReason.NOT_A_FILE),
        (make_pipe, SessionReason.NOT_A_FILE),
        (make_device_symlink, SessionReason.NOT_A_FILE),
        (make_dangling_symlink, SessionReason.MISSING),
        (make_symlink_loop, SessionReason.NOT_ANSWERED),
    ],
)
def test_anything_but_a_regular_file_is_no_session(
    session: StoredSession, make: Callable[[Path], None], reason: SessionReason
) -> None:
    fingerprint = session.fingerprint()
    session.file.unlink()
    make(session.file)

    assert session.check(fingerprint) is reason
    assert session.home.fingerprint(session.handle, session.workspace) is None


def test_a_symlink_to_a_session_is_followed(session: StoredSession, tmp_path: Path) -> None:
    real = session.file.rename(tmp_path / "kept.jsonl")
    session.file.symlink_to(real)

    assert session.check() is SessionReason.WHOLE


@NEEDS_A_USER
@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_session_that_the_service_may_not_read_is_invalid(
    session: StoredSession, of: str
) -> None:
    fingerprint = session.fingerprint()
    closed = session.file if of == "file" else session.file.parent
    mode = closed.stat().st_mode
    closed.chmod(0)
    try:
        assert session.check(fingerprint) is SessionReason.UNREADABLE
    finally:
        closed.chmod(mode)
