"""The path of a session of each CLI, and the special cases of its files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from runrecovery_service.domain.session_check import SessionReason, StoredHandle
from runrecovery_service.engines.sessions import claude, codex, gemini
from runrecovery_service.engines.sessions.lines import FOUND
from support.processes import open_files
from support.sessions import SessionHome, session_id, text_of


@pytest.mark.parametrize(
    ("begun_ms", "days"),
    [
        (1_795_871_924_059, ["2026/11/28", "2026/11/27", "2026/11/29"]),
        (1_767_225_600_000, ["2026/01/01", "2025/12/31", "2026/01/02"]),
    ],
)
def test_a_codex_session_is_sought_on_the_day_in_its_id_and_the_days_beside_it(
    begun_ms: int, days: list[str]
) -> None:
    assert codex.days_of(session_id(1, begun_ms=begun_ms)) == days
    assert codex.days_of(session_id(1, version=4)) == []


@pytest.mark.parametrize("begun_ms", [codex.END_OF_TIME_MS, 253_402_300_799_999, 2**48 - 1])
def test_a_codex_id_with_an_impossible_time_has_no_day_and_its_session_is_still_found(
    tmp_path: Path, begun_ms: int
) -> None:
    handle = session_id(1, begun_ms=begun_ms)
    home = SessionHome("codex", tmp_path)
    home.write(handle, tmp_path / "w")

    assert codex.days_of(handle) == []
    assert codex.days_of(session_id(1, begun_ms=codex.END_OF_TIME_MS - 1))[0] == "2999/12/31"
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]


@pytest.mark.parametrize("version", [4, 7])
@pytest.mark.parametrize("day", ["2026/11/27", "2026/11/29", "2020/01/01"])
def test_a_codex_session_is_found_in_the_folder_of_any_day(
    tmp_path: Path, version: int, day: str
) -> None:
    home, handle = SessionHome("codex", tmp_path), session_id(1, version=version)
    file = home.write(handle, tmp_path / "w")
    target = tmp_path / "sessions" / day / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]


@pytest.mark.parametrize("content", ["whole", "empty", "damaged"])
def test_a_checked_file_is_closed(tmp_path: Path, content: str) -> None:
    home, handle = SessionHome("codex", tmp_path), session_id(1)
    file = home.write(handle, tmp_path / "w")
    if content != "whole":
        file.write_bytes(b"" if content == "empty" else b"{")

    home.check(handle, tmp_path / "w")

    assert str(file) not in open_files(os.getpid())


def test_a_bulk_check_lists_each_folder_of_codex_once(
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


def test_a_session_that_codex_compressed_is_unknown_even_with_a_fingerprint(tmp_path: Path) -> None:
    home, handle = SessionHome("codex", tmp_path), session_id(1)
    file = home.write(handle, tmp_path / "w")
    fingerprint = home.fingerprint(handle, tmp_path / "w")
    file.with_suffix(".jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")

    assert home.check(handle, tmp_path / "w", fingerprint) == FOUND[SessionReason.UNCHANGED]
    file.unlink()
    assert home.check(handle, tmp_path / "w", fingerprint) == FOUND[SessionReason.NOT_KNOWN]


def test_a_newer_gemini_file_without_a_turn_is_not_taken_for_the_session(tmp_path: Path) -> None:
    home, handle = SessionHome("gemini", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    newer = file.with_name(file.name.replace("13-18", "13-19"))
    newer.write_bytes(text_of(home.beginning(handle, tmp_path / "w")))
    fingerprint = home.fingerprint(handle, tmp_path / "w")

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]
    assert fingerprint is not None
    assert fingerprint.size == file.stat().st_size
    assert home.check(handle, tmp_path / "w", fingerprint) == FOUND[SessionReason.UNCHANGED]
    file.unlink()
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]


def test_gemini_sessions_whose_ids_begin_alike_are_distinguished(tmp_path: Path) -> None:
    home = SessionHome("gemini", tmp_path)
    one, other = session_id(1), session_id(2)
    assert one[:8] == other[:8]
    file = home.write(one, tmp_path / "w")
    file.rename(file.with_name(file.name.replace("13-18", "13-17")))
    home.write(other, tmp_path / "w")

    assert home.check(other, tmp_path / "w") == FOUND[SessionReason.WHOLE]
    assert home.check(one, tmp_path / "w") == FOUND[SessionReason.WHOLE]


@pytest.mark.parametrize("listed", [None, b"", b"{", b"[]", b'{"projects": 3}'])
def test_a_gemini_project_is_found_by_its_project_root_file(
    tmp_path: Path, listed: bytes | None
) -> None:
    home, handle = SessionHome("gemini", tmp_path), session_id(1, version=4)
    home.write(handle, tmp_path / "w")
    projects = tmp_path / ".gemini" / "projects.json"
    projects.unlink()
    if listed is not None:
        projects.write_bytes(listed)

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]


def test_a_gemini_project_list_over_the_size_limit_is_not_read(tmp_path: Path) -> None:
    home, handle = SessionHome("gemini", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    projects = tmp_path / ".gemini" / "projects.json"
    with projects.open("ab") as opened:
        opened.truncate(gemini.MOST_PROJECTS_BYTES + 1)

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]  # by .project_root
    (file.parents[1] / ".project_root").unlink()
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.NOT_KNOWN]


@pytest.mark.parametrize("name", ["../../outside", "..", "/etc", "", 3, None])
def test_a_gemini_project_name_cannot_lead_out_of_its_folder(tmp_path: Path, name: object) -> None:
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
        ("/cafe\u0301-ws", "-cafe--ws"),  # Claude Code 2.1.197 does not normalize Unicode
        ("/\U0001f680", "---"),
        ("/" + "x" * 199, "-" + "x" * 199),
        ("/" + "a" * 250, "-" + "a" * 199 + "-feo44x"),
    ],
)
def test_a_claude_project_folder_is_named_after_the_workspace(workspace: str, name: str) -> None:
    assert claude.folder_of(workspace) == name


def test_claude_workspaces_are_compared_by_their_bytes(tmp_path: Path) -> None:
    apart, whole = tmp_path / "cafe\u0301-ws", tmp_path / "caf\u00e9-ws"
    home, handle = SessionHome("claude", tmp_path / "home"), session_id(1, version=4)
    file = home.write(handle, apart)

    assert file.parent.name.endswith("-cafe--ws")
    assert home.check(handle, apart) == FOUND[SessionReason.WHOLE]
    assert home.check(handle, whole) == FOUND[SessionReason.MISSING]
    shutil.copytree(file.parent, home.file(handle, whole).parent)
    assert home.check(handle, whole) == FOUND[SessionReason.ELSEWHERE]


@pytest.mark.parametrize("note", ["isSidechain", "isMeta"])
def test_notes_of_claude_after_the_answer_are_no_user_message(tmp_path: Path, note: str) -> None:
    home, handle = SessionHome("claude", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    line = {"type": "user", "message": {"role": "user", "content": "x"}, "sessionId": handle}
    with file.open("ab") as opened:
        opened.write(text_of([line | {note: True}]))
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]

    with file.open("ab") as opened:
        opened.write(text_of([line]))
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]


def test_a_session_of_claude_that_ends_with_a_deferred_call_is_whole(tmp_path: Path) -> None:
    # The results of other calls of the same message follow the deferral.
    home, handle = SessionHome("claude", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")

    def add(kind: str, **more: object) -> None:
        with file.open("ab") as opened:
            opened.write(text_of([{"type": kind, "sessionId": handle, **more}]))

    def message(role: str, block: object) -> dict[str, object]:
        return {"role": role, "content": [block]}

    add("assistant", message=message("assistant", {"type": "tool_use", "id": "a"}))
    add("assistant", message=message("assistant", {"type": "tool_use", "id": "b"}))
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]
    add("attachment", attachment={"type": "hook_success"})
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]
    add("attachment", attachment={"type": "hook_deferred_tool", "toolUseID": "a"})
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]
    add("user", message=message("user", {"type": "tool_result", "tool_use_id": "b"}))
    add("last-prompt")
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.WHOLE]
    add("assistant", message=message("assistant", {"type": "tool_use", "id": "c"}))
    add("user", message=message("user", {"type": "tool_result", "tool_use_id": "c"}))
    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]


def test_a_session_of_claude_that_ends_with_a_long_result_is_cut_off(tmp_path: Path) -> None:
    home, handle = SessionHome("claude", tmp_path), session_id(1, version=4)
    file = home.write(handle, tmp_path / "w")
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "c"}]}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "x" * 100_000}
    answer = {"role": "user", "content": [result]}
    lines = [
        {"type": "assistant", "sessionId": handle, "message": call},
        {"type": "user", "sessionId": handle, "message": answer},
    ]
    with file.open("ab") as opened:
        opened.write(text_of(lines))

    assert home.check(handle, tmp_path / "w") == FOUND[SessionReason.CUT_OFF]
