"""Whether a CLI's session can be resumed is told from its file, whatever lies in its place."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.session_check import (
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    SessionVerdict,
    StoredHandle,
)
from runrecovery_service.engines.sessions import claude, codex, files, gemini, sessions_of
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.lines import FOUND, VERDICT_OF, Excerpt, judge_excerpt
from support.sessions import PRESETS, SessionHome, session_id, text_of

KIB: Final = 1024
NEEDS_A_USER: Final = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


class Desk:
    """A CLI's home with one session of one workspace."""

    def __init__(self, preset: str, path: Path) -> None:
        self.home = SessionHome(preset, path / "home")
        self.workspace = path / "workspaces" / "work space.1"
        self.workspace.mkdir(parents=True)
        self.handle = self.home.new_id(1)
        self.file = self.home.write(self.handle, self.workspace, filler=100 * KIB)

    def found(self, mark: SessionFingerprint | None = None) -> SessionReason | None:
        """Check the session; its verdict is that of its reason."""
        finding = self.home.check(self.handle, self.workspace, mark)
        assert finding.reason is not None
        assert finding.verdict is VERDICT_OF[finding.reason]
        return finding.reason

    def mark(self) -> SessionFingerprint:
        """Mark the session."""
        mark = self.home.mark(self.handle, self.workspace)
        assert mark is not None
        return mark

    @property
    def lines(self) -> list[bytes]:
        """The lines of its file."""
        return self.file.read_bytes().splitlines(keepends=True)


@pytest.fixture(params=PRESETS)
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(request.param, tmp_path.resolve())


# -- whole -------------------------------------------------------------------------------------


def test_a_whole_session_is_valid(desk: Desk) -> None:
    assert desk.found() is SessionReason.WHOLE


@pytest.mark.parametrize("turns", [1, 2, 9])
def test_a_session_of_any_number_of_turns_is_valid(desk: Desk, turns: int) -> None:
    desk.home.write(desk.handle, desk.workspace, turns=turns, filler=3)

    assert desk.found() is SessionReason.WHOLE


def test_a_session_as_it_was_marked_is_not_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = desk.mark()
    monkeypatch.setattr(files, "_excerpt", None)

    assert desk.found(mark) is SessionReason.UNCHANGED


def test_a_session_that_was_touched_is_read(desk: Desk) -> None:
    mark = desk.mark()
    os.utime(desk.file, ns=(1, 1))

    assert desk.found(mark) is SessionReason.WHOLE


def test_a_session_that_grew_by_a_turn_is_valid(desk: Desk) -> None:
    mark = desk.mark()
    desk.home.add_turn(desk.file, desk.handle, desk.workspace)

    assert desk.found(mark) is SessionReason.WHOLE


def test_a_turn_that_was_cut_off_behind_the_mark_takes_nothing_of_the_question(desk: Desk) -> None:
    mark = desk.mark()
    turn = text_of(desk.home.turn(desk.handle, desk.workspace, 9))
    for added in (turn[:7], turn[: turn.index(b"\n") + 1], turn[:-1]):
        with desk.file.open("ab") as file:
            file.write(added)

        assert desk.found(mark) is SessionReason.WHOLE


def test_a_workspace_is_the_same_by_a_link(desk: Desk, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(desk.workspace.parent)

    assert desk.home.check(desk.handle, link / desk.workspace.name) == FOUND[SessionReason.WHOLE]


def test_a_home_that_is_a_link_is_followed(desk: Desk, tmp_path: Path) -> None:
    real = desk.home.path.rename(tmp_path / "elsewhere")
    desk.home.path.symlink_to(real)

    assert desk.found() is SessionReason.WHOLE


# -- cut off -----------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
def test_a_session_cut_in_half_is_invalid(desk: Desk, *, marked: bool) -> None:
    mark = desk.mark() if marked else None
    os.truncate(desk.file, desk.file.stat().st_size // 2)

    assert desk.found(mark) is SessionReason.CUT_OFF


@pytest.mark.parametrize("marked", [False, True])
def test_a_session_without_its_last_byte_is_invalid(desk: Desk, *, marked: bool) -> None:
    mark = desk.mark() if marked else None
    os.truncate(desk.file, desk.file.stat().st_size - 1)

    assert desk.found(mark) is SessionReason.CUT_OFF


def test_the_mark_finds_every_cut_at_the_end_of_a_line(desk: Desk) -> None:
    mark, lines = desk.mark(), desk.lines
    for left in range(1, len(lines)):
        desk.file.write_bytes(b"".join(lines[:left]))

        assert desk.found(mark) is SessionReason.CUT_OFF


def test_without_a_mark_a_cut_is_found_if_the_answer_is_lost(desk: Desk) -> None:
    lines = desk.lines
    answer = max(at for at, line in enumerate(lines) if b"ask_user" in line)
    for left in range(1, len(lines)):
        desk.file.write_bytes(b"".join(lines[:left]))

        assert desk.found() is (SessionReason.WHOLE if left > answer else SessionReason.CUT_OFF)


@pytest.mark.parametrize("left", range(2, 900, 97))
def test_a_session_cut_anywhere_in_its_end_is_invalid(desk: Desk, left: int) -> None:
    os.truncate(desk.file, desk.file.stat().st_size - left)
    if desk.file.read_bytes().endswith(b"\n"):
        pytest.skip("the end of a line")

    assert desk.found() is SessionReason.CUT_OFF


def test_a_session_whose_last_line_is_garbage_is_invalid(desk: Desk) -> None:
    desk.file.write_bytes(desk.file.read_bytes()[:-40] + b"\0" * 39 + b"\n")

    assert desk.found() is SessionReason.CUT_OFF


def test_a_session_that_was_written_anew_is_judged_by_its_end(desk: Desk) -> None:
    mark = SessionFingerprint(desk.file.stat().st_size - 20, 5)  # no line ends there
    assert desk.found(mark) is SessionReason.WHOLE

    os.truncate(desk.file, desk.file.stat().st_size - 1)
    assert desk.found(mark) is SessionReason.CUT_OFF


# -- damaged, or another's ---------------------------------------------------------------------


def test_a_session_that_was_removed_is_invalid(desk: Desk) -> None:
    mark = desk.mark()
    desk.file.unlink()

    assert desk.found(mark) is SessionReason.MISSING


@pytest.mark.parametrize("left", [(), (".runrecovery.config.toml.lock",)])
def test_a_home_in_which_nothing_is_mounted_says_nothing(desk: Desk, left: tuple[str, ...]) -> None:
    mark = desk.mark()
    shutil.rmtree(desk.home.path)
    assert desk.found(mark) is SessionReason.HOME_AWAY

    desk.home.path.mkdir()
    for name in left:  # of ours
        (desk.home.path / name).touch()
    assert desk.found(mark) is SessionReason.HOME_AWAY
    assert desk.home.mark(desk.handle, desk.workspace) is None


def test_a_home_with_anything_in_it_has_lost_a_session_that_is_missing(desk: Desk) -> None:
    shutil.rmtree(desk.home.path)
    desk.home.path.mkdir()
    (desk.home.path / "auth.json").touch()

    assert desk.found() is SessionReason.MISSING


def test_a_home_that_cannot_be_listed_says_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    desk.file.unlink()
    monkeypatch.setattr(os, "scandir", fail)

    assert desk.found() is SessionReason.NOT_ANSWERED


def test_an_empty_session_is_invalid(desk: Desk) -> None:
    os.truncate(desk.file, 0)

    assert desk.found() is SessionReason.EMPTY


def test_a_session_whose_first_line_is_broken_is_invalid(desk: Desk) -> None:
    desk.file.write_bytes(b'{"broken\n' + b"".join(desk.lines[1:]))

    assert desk.found() is SessionReason.BROKEN


@pytest.mark.parametrize("marked", [False, True])
def test_a_session_of_another_workspace_is_invalid(desk: Desk, *, marked: bool) -> None:
    mark = SessionFingerprint(10, 10) if marked else None
    other = desk.workspace.with_name("other")
    lines = [
        *desk.home.beginning(desk.handle, other), *desk.home.turn(desk.handle, other, 5)
    ]  # fmt: skip
    desk.file.write_bytes(text_of(lines))

    assert desk.found(mark) is SessionReason.ELSEWHERE


def test_another_session_in_its_place_is_invalid(desk: Desk) -> None:
    shutil.copy(desk.home.write(desk.home.new_id(2), desk.workspace), desk.file)

    assert desk.found() is SessionReason.ELSEWHERE


# -- unknown -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b'{"version":9,"turns":[]}\n', b'{"version":9}\n{}\n', b"{}"])
def test_a_form_that_is_not_known_is_unknown(desk: Desk, text: bytes) -> None:
    desk.file.write_bytes(text)

    assert desk.found() is SessionReason.NOT_KNOWN
    assert desk.found(desk.mark()) is SessionReason.UNCHANGED  # it is as the CLI left it


def test_without_a_home_nothing_is_known(desk: Desk) -> None:
    stored = StoredHandle(handle=desk.handle, workspace=desk.workspace)
    for env in ({}, {"HOME": ""}, {"HOME": "relative"}):
        store = sessions_of(desk.home.preset, env)

        assert list(store.check([stored, stored])) == [FOUND[SessionReason.NO_HOME]] * 2
        assert store.observe(stored).fingerprint is None


@pytest.mark.parametrize("preset", PRESETS)
def test_the_home_is_found_by_the_variables_of_the_agent(preset: str, tmp_path: Path) -> None:
    below = {"codex": ".codex", "gemini": "", "claude": ".claude"}[preset]
    home = SessionHome(preset, tmp_path.resolve() / below)
    home.write(home.new_id(1), tmp_path / "w")
    stored = StoredHandle(handle=home.new_id(1), workspace=tmp_path / "w")

    assert list(sessions_of(preset, {"HOME": str(tmp_path)}).check([stored])) == [
        FOUND[SessionReason.WHOLE]
    ]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_error_that_says_nothing_of_the_session_is_unknown(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)

    assert desk.found() is SessionReason.NOT_ANSWERED


def test_a_folder_that_cannot_be_listed_says_nothing_of_any_session(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def fail(path: object, *_: object) -> list[str]:
        asked.append(path)
        raise OSError(errno.EIO, "input/output error")

    desk.file.unlink()
    monkeypatch.setattr(os, "listdir", fail)
    monkeypatch.setattr(os, "open", fail)
    stored = StoredHandle(handle=desk.handle, workspace=desk.workspace)

    assert list(desk.home.store.check([stored] * 3)) == [FOUND[SessionReason.NOT_ANSWERED]] * 3
    assert len(asked) == (3 if desk.home.preset == "claude" else 1)  # it is asked once a bulk


def sizes_parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all that is parsed from now on."""
    parsed: list[int] = []
    real = json.loads

    def loads(text: bytes) -> object:
        parsed.append(len(text))
        return real(text)

    monkeypatch.setattr(json, "loads", loads)
    return parsed


def test_a_line_that_is_longer_than_we_read_is_not_parsed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = sizes_parsed(monkeypatch)
    long_line = b"[],[]," * (8 * KIB * KIB // 6) + b"\n"
    desk.file.write_bytes(long_line * 2)
    assert desk.found() is SessionReason.NOT_KNOWN
    assert desk.found(SessionFingerprint(len(long_line), 5)) is SessionReason.NOT_KNOWN
    assert [size for size in parsed if size > 1000] == []  # Gemini's list of projects aside

    head = text_of(desk.home.beginning(desk.handle, desk.workspace))
    desk.file.write_bytes(head + long_line)
    assert desk.found() is SessionReason.NOT_KNOWN
    assert max(parsed) < files.FIRST_READ


def test_of_a_line_whose_beginning_was_not_read_nothing_is_parsed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = sizes_parsed(monkeypatch)
    turn = desk.home.turn(desk.handle, desk.workspace, 5)
    head = text_of(desk.home.beginning(desk.handle, desk.workspace))
    long_line = b"[],[]," * (2 * KIB * KIB // 6) + b"\n"
    desk.file.write_bytes(head + long_line + text_of(turn))

    assert desk.found() is SessionReason.WHOLE
    assert max(parsed) < files.FIRST_READ


# -- in its place ------------------------------------------------------------------------------


def folder(file: Path) -> None:
    file.mkdir()


def pipe(file: Path) -> None:
    os.mkfifo(file)


def loop(file: Path) -> None:
    file.symlink_to(file)


def dangling(file: Path) -> None:
    file.symlink_to(file.parent / "nowhere")


def device(file: Path) -> None:
    file.symlink_to("/dev/null")


Replace: TypeAlias = Callable[[Path], None]


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (folder, SessionReason.NOT_A_FILE),
        (pipe, SessionReason.NOT_A_FILE),
        (device, SessionReason.NOT_A_FILE),
        (dangling, SessionReason.MISSING),
        (loop, SessionReason.NOT_ANSWERED),
    ],
)
def test_what_lies_in_the_place_of_a_session_is_no_session(
    desk: Desk, replace: Replace, reason: SessionReason
) -> None:
    mark = desk.mark()
    desk.file.unlink()
    replace(desk.file)

    assert desk.found(mark) is reason
    assert desk.home.mark(desk.handle, desk.workspace) is None


def test_a_link_to_a_session_is_followed(desk: Desk, tmp_path: Path) -> None:
    real = desk.file.rename(tmp_path / "kept.jsonl")
    desk.file.symlink_to(real)

    assert desk.found() is SessionReason.WHOLE


@NEEDS_A_USER
@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_session_that_may_not_be_read_is_invalid(desk: Desk, of: str) -> None:
    mark = desk.mark()
    closed = desk.file if of == "file" else desk.file.parent
    mode = closed.stat().st_mode
    closed.chmod(0)
    try:
        assert desk.found(mark) is SessionReason.UNREADABLE
    finally:
        closed.chmod(mode)


# -- handles -----------------------------------------------------------------------------------


HOSTILE: Final = ["", ".", "..", "latest", "1", "../../etc/passwd", "a/b", "a\0b", "ä", "-" * 36]


@pytest.mark.parametrize("handle", HOSTILE)
def test_a_handle_that_is_no_session_id_is_never_looked_for(desk: Desk, handle: str) -> None:
    assert desk.home.check(handle, desk.workspace) == FOUND[SessionReason.UNUSABLE]
    assert desk.home.mark(handle, desk.workspace) is None


@given(st.text(max_size=40))
def test_no_handle_gets_a_check_to_fail(handle: str) -> None:
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
def test_neither_an_id_nor_what_a_file_holds_gets_a_check_to_fail(
    handle: str, text: bytes, preset: str, kept: int | None
) -> None:
    with tempfile.TemporaryDirectory() as top:
        home, workspace = SessionHome(preset, Path(top, "home")), Path(top, "w")
        file = home.file(handle, workspace)
        file.parent.mkdir(parents=True)
        file.write_bytes(text)
        mark = None if kept is None else SessionFingerprint(kept, 5)

        finding = home.check(handle, workspace, mark)
        assert finding.reason not in {
            SessionReason.NOT_ANSWERED,
            SessionReason.UNUSABLE,
            SessionReason.HOME_AWAY,
        }
        home.mark(handle, workspace)


@pytest.mark.parametrize("failing", ["finder", "layout"])
def test_a_defect_costs_the_verdict_of_one_session(desk: Desk, failing: str) -> None:
    class Defective:
        """Fails for one session."""

        def paths(self, stored: StoredHandle) -> Iterator[Path]:
            if failing == "finder" and stored.handle != desk.handle:
                raise ZeroDivisionError(stored.handle)
            yield desk.file

        def identify(self, head: object, stored: StoredHandle) -> SessionReason | None:
            if failing == "layout" and stored.handle != desk.handle:
                raise ZeroDivisionError(stored.handle)
            return None

        def is_end_of_turn(self, line: object) -> bool:
            return True

    store = CliSessions(desk.home.path, Defective, Defective())
    fine = StoredHandle(handle=desk.handle, workspace=desk.workspace)
    bad = replace(fine, handle=desk.home.new_id(2))

    with structlog.testing.capture_logs() as told:
        found = list(store.check([bad, fine, bad]))

    assert found == [
        FOUND[SessionReason.NOT_ANSWERED],
        FOUND[SessionReason.WHOLE],
        FOUND[SessionReason.NOT_ANSWERED],
    ]
    assert told == [
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
def test_no_text_gets_a_check_to_fail(lines: list[bytes], end: bytes, preset: str, at: int) -> None:
    text = b"\n".join(lines) + end
    stored = StoredHandle(handle=session_id(1), workspace=Path("/w"))
    layout = sessions_of(preset, {"HOME": "/"}).layout

    for excerpt in (
        Excerpt(text, text, tail_is_all=True),
        Excerpt(text[:at], text[at:], tail_is_all=False),
    ):
        assert VERDICT_OF[judge_excerpt(excerpt, stored, layout)] in SessionVerdict


# -- of one CLI only ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun_ms", "days"),
    [
        (1_795_871_924_059, ["2026/11/28", "2026/11/27", "2026/11/29"]),
        (1_767_225_600_000, ["2026/01/01", "2025/12/31", "2026/01/02"]),
    ],
)
def test_a_session_of_codex_is_looked_for_in_the_days_of_its_id(
    begun_ms: int, days: list[str]
) -> None:
    assert codex.days_of(session_id(1, begun_ms=begun_ms)) == days
    assert codex.days_of(session_id(1, version=4)) == []


@pytest.mark.parametrize("begun_ms", [codex.END_OF_TIME_MS, 253_402_300_799_999, 2**48 - 1])
def test_a_time_that_no_clock_shows_is_of_no_day(tmp_path: Path, begun_ms: int) -> None:
    handle = session_id(1, begun_ms=begun_ms)
    home = SessionHome("codex", tmp_path)
    home.write(handle, tmp_path / "w")

    assert codex.days_of(handle) == []
    assert codex.days_of(session_id(1, begun_ms=codex.END_OF_TIME_MS - 1))[0] == "2999/12/31"
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]


@pytest.mark.parametrize("version", [4, 7])
@pytest.mark.parametrize("day", ["2026/11/27", "2026/11/29", "2020/01/01"])
def test_a_session_of_codex_is_found_on_any_day(tmp_path: Path, version: int, day: str) -> None:
    home, handle = SessionHome("codex", tmp_path), session_id(1, version=version)
    file = home.write(handle, tmp_path / "w")
    target = tmp_path / "sessions" / day / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]


def test_codexs_folders_are_listed_once_a_bulk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, real = SessionHome("codex", tmp_path), os.listdir
    home.write(session_id(0), tmp_path / "w")
    listed: list[Path] = []

    def listdir(path: Path) -> list[str]:
        listed.append(path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)

    handles = [StoredHandle(handle=session_id(n), workspace=tmp_path / "w") for n in range(50)]
    list(home.store.check(handles))

    assert len(listed) == len(set(listed)) == 6  # three days (one is there), root, year, month


def test_a_session_that_codex_compressed_is_unknown_whatever_its_mark(tmp_path: Path) -> None:
    home, handle = SessionHome("codex", tmp_path), session_id(1)
    file = home.write(handle, tmp_path / "w")
    mark = home.mark(handle, tmp_path / "w")
    file.with_suffix(".jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")

    assert home.check(handle, tmp_path / "w", mark) == FOUND[SessionReason.UNCHANGED]
    file.unlink()
    assert home.check(handle, tmp_path / "w", mark) == FOUND[SessionReason.NOT_KNOWN]


def test_the_newer_file_that_gemini_leaves_of_a_session_is_not_it(tmp_path: Path) -> None:
    home, handle = SessionHome("gemini", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    newer = file.with_name(file.name.replace("13-18", "13-19"))
    newer.write_bytes(text_of(home.beginning(handle, tmp_path / "w")))
    mark = home.mark(handle, tmp_path / "w")

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]
    assert mark is not None
    assert mark.size == file.stat().st_size
    assert home.check(handle, tmp_path / "w", mark) == FOUND[SessionReason.UNCHANGED]
    file.unlink()
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]


def test_another_session_with_the_same_beginning_of_its_id_is_not_it(tmp_path: Path) -> None:
    home = SessionHome("gemini", tmp_path)
    one, other = session_id(1), session_id(2)
    assert one[:8] == other[:8]
    file = home.write(one, tmp_path / "w")
    file.rename(file.with_name(file.name.replace("13-18", "13-17")))
    home.write(other, tmp_path / "w")

    assert home.check(other, tmp_path / "w") == FOUND[SessionReason.WHOLE]
    assert home.check(one, tmp_path / "w") == FOUND[SessionReason.WHOLE]


@pytest.mark.parametrize("listed", [None, b"", b"{", b"[]", b'{"projects": 3}'])
def test_a_project_of_gemini_is_found_by_its_own_word(tmp_path: Path, listed: bytes | None) -> None:
    home, handle = SessionHome("gemini", tmp_path), session_id(1, version=4)
    home.write(handle, tmp_path / "w")
    projects = tmp_path / ".gemini" / "projects.json"
    projects.unlink()
    if listed is not None:
        projects.write_bytes(listed)

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]


def test_a_list_of_projects_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    home, handle = SessionHome("gemini", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    projects = tmp_path / ".gemini" / "projects.json"
    with projects.open("ab") as opened:
        opened.truncate(gemini.MOST_PROJECTS_BYTES + 1)

    assert (
        home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]
    )  # by the project's own word
    (file.parents[1] / ".project_root").unlink()
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.NOT_KNOWN]


@pytest.mark.parametrize("name", ["../../outside", "..", "/etc", "", 3, None])
def test_a_project_of_gemini_leads_nowhere_else(tmp_path: Path, name: object) -> None:
    home, handle = SessionHome("gemini", tmp_path / "home"), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    shutil.copytree(file.parents[1], tmp_path / "home" / "outside")
    shutil.rmtree(file.parents[1])
    home.projects[str(tmp_path / "w")] = name  # type: ignore[assignment]
    home.list_projects()

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.MISSING]


@pytest.mark.parametrize(
    ("workspace", "name"),
    [
        ("/srv/agents/claude/w1", "-srv-agents-claude-w1"),
        ("/a_b/\u00fc.x y", "-a-b---x-y"),
        ("/cafe\u0301-ws", "-cafe--ws"),  # Claude Code 2.1.197 normalizes nothing
        ("/\U0001f680", "---"),
        ("/" + "x" * 199, "-" + "x" * 199),
        ("/" + "a" * 250, "-" + "a" * 199 + "-feo44x"),
    ],
)
def test_the_folder_of_claude_is_made_of_the_workspace(workspace: str, name: str) -> None:
    assert claude.folder_of(workspace) == name


def test_a_workspace_of_claude_is_the_same_by_its_bytes(tmp_path: Path) -> None:
    apart, whole = tmp_path / "cafe\u0301-ws", tmp_path / "caf\u00e9-ws"
    home, handle = SessionHome("claude", tmp_path / "home"), session_id(1, version=4)
    file = home.write(handle, apart)

    assert file.parent.name.endswith("-cafe--ws")
    assert home.check(handle, apart) == FOUND[SessionReason.WHOLE]
    assert home.check(handle, whole) == FOUND[SessionReason.MISSING]
    shutil.copytree(file.parent, home.file(handle, whole).parent)
    assert home.check(handle, whole) == FOUND[SessionReason.ELSEWHERE]


@pytest.mark.parametrize("note", ["isSidechain", "isMeta"])
def test_what_claude_notes_behind_an_answer_is_no_message_to_it(tmp_path: Path, note: str) -> None:
    home, handle = SessionHome("claude", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    line = {"type": "user", "message": {"role": "user", "content": "x"}, "sessionId": handle}
    with file.open("ab") as opened:
        opened.write(text_of([line | {note: True}]))
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]

    with file.open("ab") as opened:
        opened.write(text_of([line]))
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]


# -- bulk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bulk_of_many_is_answered_in_its_order(preset: str, tmp_path: Path) -> None:
    home = SessionHome(preset, tmp_path / "home")
    chosen = random.Random(7)  # noqa: S311 - cases, no secrets
    stored: list[StoredHandle] = []
    expected: list[SessionFinding] = []
    workspaces = [tmp_path / str(at) for at in range(50)]
    for at in range(5000):
        handle, workspace = home.new_id(at), workspaces[at % len(workspaces)]
        reason = chosen.choice(
            [
                SessionReason.WHOLE,
                SessionReason.UNCHANGED,
                SessionReason.MISSING,
                SessionReason.CUT_OFF,
                SessionReason.UNUSABLE,
            ]
        )
        mark = None
        if reason in {SessionReason.WHOLE, SessionReason.UNCHANGED, SessionReason.CUT_OFF}:
            found = home.write(handle, workspace).stat()
            mark = SessionFingerprint(found.st_size, found.st_mtime_ns)
        if reason is SessionReason.WHOLE:
            mark = None
        elif reason is SessionReason.CUT_OFF and mark is not None:
            mark = SessionFingerprint(mark.size + 1, mark.mtime_ns)
        elif reason is SessionReason.UNUSABLE:
            handle = f"../{handle}"
        stored.append(StoredHandle(handle=handle, workspace=workspace, fingerprint=mark))
        expected.append(FOUND[reason])

    assert list(home.store.check(stored)) == expected
