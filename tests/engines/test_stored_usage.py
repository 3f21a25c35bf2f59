"""The calls in the session file of a CLI that was killed before it printed its usage.

The lines are those of codex-cli 0.171.0, gemini-cli 0.61.0 and claude-code 2.1.332, shortened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service.domain.session_check import StoredHandle
from runrecovery_service.domain.usage import StoredUsage, Usage
from runrecovery_service.engines.sessions import stored_usage
from runrecovery_service.engines.sessions.stored_usage import UsageNotKnown, UsageReader
from support.sessions import AT, Line, StoredSession, text_of

MESSAGE: Final = {"timestamp": AT, "type": "gemini", "content": "", "thoughts": []}


def codex_tokens(calls: int) -> Line:
    """Return the tokens of this number of calls, as Codex writes them."""
    return {
        "input_tokens": 100 * calls,
        "cached_input_tokens": 40 * calls,
        "cache_write_input_tokens": 10 * calls,
        "output_tokens": 20 * calls,
        "reasoning_output_tokens": 5 * calls,
        "total_tokens": 120 * calls,
    }


def codex_usage(calls: int) -> Usage:
    """Return the usage of `codex_tokens`."""
    return Usage(
        input_tokens=100 * calls,
        cached_input_tokens=40 * calls,
        cache_write_input_tokens=10 * calls,
        output_tokens=20 * calls,
        reasoning_output_tokens=5 * calls,
    )


def codex_record(thread: int) -> Line:
    """Return the line that comes with the answer of a call."""
    used = {"usage": codex_tokens(1), "turn_token_usage": codex_tokens(1)}
    payload = {"thread_id": "t", "response_id": "r", **used}
    payload["thread_token_usage"] = codex_tokens(thread)
    return {"timestamp": AT, "type": "token_usage_record", "payload": payload}


def codex_count(total: int) -> Line:
    """Return the line that comes after the tools of an answer."""
    info = {"total_token_usage": codex_tokens(total), "last_token_usage": codex_tokens(1)}
    payload = {"type": "token_count", "info": info, "rate_limits": None}
    return {"timestamp": AT, "type": "event_msg", "payload": payload}


def gemini_message(key: str, **more: object) -> Line:
    """Return a message of Gemini CLI's model with its tokens."""
    tokens = {"input": 100, "output": 20, "cached": 40, "thoughts": 5, "tool": 0, "total": 125}
    return {"id": key, **MESSAGE, "tokens": tokens, "model": "gemini-2.5-flash", **more}


def gemini_usage(calls: int) -> Usage:
    """Return the usage of `calls` messages of `gemini_message`."""
    return Usage(
        input_tokens=100 * calls,
        cached_input_tokens=40 * calls,
        output_tokens=25 * calls,
        reasoning_output_tokens=5 * calls,
        model="gemini-2.5-flash" if calls else "",
    )


def claude_line(key: str, *, output_tokens: int = 20, **more: object) -> Line:
    """Return a line with a part of an answer, as Claude Code stores and prints it."""
    used = {
        "input_tokens": 50,
        "cache_creation_input_tokens": 10,
        "cache_read_input_tokens": 40,
        "output_tokens": output_tokens,
    }
    message = {"id": key, "model": "model", "content": [{"type": "text"}], "usage": used}
    return {"type": "assistant", "message": {**message, **more}}


def claude_usage(calls: int, *, output_tokens: int = 20) -> Usage:
    """Return the usage of `calls` answers of `claude_line`."""
    return Usage(
        input_tokens=100 * calls,
        cached_input_tokens=40 * calls,
        cache_write_input_tokens=10 * calls,
        output_tokens=output_tokens * calls,
        model="model",
    )


def session(preset: str, folder: Path, lines: Sequence[Line] = ()) -> StoredSession:
    """Write a session whose first turn was killed after these lines."""
    made = StoredSession.write(preset, folder)
    beginning = made.home.beginning(made.handle, made.workspace)
    made.file.write_bytes(text_of([*beginning, *lines]))
    return made


def read(made: StoredSession) -> StoredUsage:
    """Return the usage in the session file."""
    stored = StoredHandle(handle=made.handle, workspace=made.workspace)
    return made.home.store.read_usage(stored, output_of(made))


def output_of(made: StoredSession) -> Path:
    """Return the file with the kept output of the CLI."""
    return made.workspace.parent / "stdout.log"


def assert_proves_nothing(made: StoredSession, reason: str) -> None:
    with pytest.raises(UsageNotKnown, match=f"^{reason}$"):
        read(made)


def test_codex_has_proved_a_call_whose_tool_was_interrupted_but_does_not_add_to_it(
    tmp_path: Path,
) -> None:
    lines = [codex_record(1), codex_count(1), codex_record(2)]

    assert read(session("codex", tmp_path, lines)) == StoredUsage(
        calls=codex_usage(2), total=codex_usage(1)
    )


def test_codex_keeps_both_totals_after_a_resume(tmp_path: Path) -> None:
    lines = [codex_record(1), codex_record(2), codex_count(1), codex_record(3), codex_count(2)]

    assert read(session("codex", tmp_path, lines)) == StoredUsage(
        calls=codex_usage(3), total=codex_usage(2)
    )


def test_an_older_codex_proves_what_its_count_has(tmp_path: Path) -> None:
    lines = [codex_count(1), codex_count(2)]

    assert read(session("codex", tmp_path, lines)) == StoredUsage(
        calls=codex_usage(2), total=codex_usage(2)
    )


def test_a_codex_session_without_a_call_proves_that_there_was_none(tmp_path: Path) -> None:
    no_info = {"type": "event_msg", "payload": {"type": "token_count", "info": None}}

    assert read(session("codex", tmp_path, [no_info])) == StoredUsage(calls=Usage())


def test_a_message_of_gemini_counts_once_however_often_it_is_stored(tmp_path: Path) -> None:
    first, second = gemini_message("a"), gemini_message("b")
    with_call = gemini_message("a", toolCalls=[{"id": "c", "result": []}])
    history = {"$set": {"messages": [with_call, {"id": "u", "type": "user"}]}}
    lines = [first, with_call, second, history, {"$rewindTo": "b"}, gemini_message("c")]

    assert read(session("gemini", tmp_path, lines)) == StoredUsage(calls=gemini_usage(3))


def test_the_second_file_of_a_gemini_session_adds_only_new_messages(tmp_path: Path) -> None:
    made = session("gemini", tmp_path, [gemini_message("a")])
    newer = made.file.with_name(made.file.name.replace("T13-18", "T13-19"))
    begun = made.home.beginning(made.handle, made.workspace)
    newer.write_bytes(text_of([*begun, gemini_message("a"), gemini_message("b")]))

    assert read(made) == StoredUsage(calls=gemini_usage(2))


def test_messages_of_gemini_whose_sum_is_impossible_prove_nothing(tmp_path: Path) -> None:
    most = {"input": 10**12, "output": 0, "total": 10**12}

    made = session("gemini", tmp_path, [gemini_message(key, tokens=most) for key in ("a", "b")])

    assert_proves_nothing(made, "broken")


@pytest.mark.parametrize(
    ("preset", "line"),
    [("codex", codex_record(1)), ("gemini", gemini_message("a")), ("claude", claude_line("a"))],
)
class TestOfEach:
    """Claims that hold for each CLI."""

    def test_a_last_line_that_the_kill_has_cut_does_not_count(
        self, tmp_path: Path, preset: str, line: Line
    ) -> None:
        made = session(preset, tmp_path, [line])
        whole = read(made)
        with made.file.open("ab") as file:
            file.write(text_of([line])[:-9])

        assert read(made) == whole
        assert whole.calls.total_tokens in {120, 125}

    def test_a_damaged_line_proves_nothing(self, tmp_path: Path, preset: str, line: Line) -> None:
        made = session(preset, tmp_path, [line])
        with made.file.open("ab") as file:
            file.write(text_of([line])[:-9] + b"\n" + text_of([line]))

        assert_proves_nothing(made, "broken")

    def test_an_impossible_number_proves_nothing(
        self, tmp_path: Path, preset: str, line: Line
    ) -> None:
        text = text_of([line]).replace(b":100,", b":-100,").replace(b":50,", b":-50,")

        made = session(preset, tmp_path)
        with made.file.open("ab") as file:
            file.write(text)

        assert_proves_nothing(made, "broken")

    def test_a_long_file_is_not_read(
        self, tmp_path: Path, preset: str, line: Line, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = session(preset, tmp_path, [line])
        size = made.file.stat().st_size
        store = made.home.store
        assert store.ledger is not None
        stored = StoredHandle(handle=made.handle, workspace=made.workspace)

        reader = UsageReader(store.layout, store.ledger, most_bytes=size)
        assert reader.read([made.file], stored).calls.input_tokens == 100
        with pytest.raises(UsageNotKnown, match="too_long"):
            replace(reader, most_bytes=size - 1).read([made.file], stored)
        assert stored_usage.MOST_BYTES == 64 * 1024**2

    def test_the_file_of_another_session_proves_nothing(
        self, tmp_path: Path, preset: str, line: Line
    ) -> None:
        made = session(preset, tmp_path, [line])
        other = made.home.new_id(2)
        text = made.file.read_bytes().replace(made.handle.encode(), other.encode())
        made.file.write_bytes(text)

        assert_proves_nothing(made, "elsewhere")

    def test_a_file_that_is_gone_or_a_pipe_proves_nothing(
        self, tmp_path: Path, preset: str, line: Line
    ) -> None:
        made = session(preset, tmp_path, [line])
        made.file.unlink()
        assert_proves_nothing(made, "missing")

        os.mkfifo(made.file)
        assert_proves_nothing(made, "not_a_file")


def test_an_answer_of_claude_counts_once_however_many_lines_it_has(tmp_path: Path) -> None:
    lines = [
        claude_line("a", output_tokens=1),
        claude_line("a", output_tokens=20),
        claude_line("b"),
        claude_line("00000000-0000-0000-0000-000000000000", model="<synthetic>"),
    ]

    made = session("claude", tmp_path, lines)

    assert read(made) == StoredUsage(calls=claude_usage(2), is_open=True)


def test_the_output_of_claude_adds_the_answers_that_its_file_lacks(tmp_path: Path) -> None:
    made = session("claude", tmp_path, [claude_line("a")])
    printed = [claude_line("a", output_tokens=1), claude_line("b", output_tokens=1)]
    output_of(made).write_bytes(b'a warning about "usage"\n' + text_of(printed) + b'{"usage')

    expected = claude_usage(2, output_tokens=0).plus(Usage(output_tokens=21))
    assert read(made).calls == expected

    made.file.unlink()  # it was killed before it had saved its session
    assert read(made).calls == claude_usage(2, output_tokens=1)


def test_the_output_of_other_clis_proves_nothing(tmp_path: Path) -> None:
    made = session("codex", tmp_path, [codex_record(1)])
    output_of(made).write_bytes(text_of([codex_record(2)]))

    assert read(made).calls == codex_usage(1)


def test_an_output_that_is_no_file_or_too_long_proves_nothing(tmp_path: Path) -> None:
    made = session("claude", tmp_path, [claude_line("a")])
    os.mkfifo(output_of(made))
    assert_proves_nothing(made, "not_a_file")

    output_of(made).unlink()
    output_of(made).write_bytes(text_of([claude_line("b")]))
    store = made.home.store
    assert store.ledger is not None
    both = made.file.stat().st_size + output_of(made).stat().st_size
    reader = UsageReader(store.layout, store.ledger, most_bytes=both)
    stored = StoredHandle(handle=made.handle, workspace=made.workspace)
    assert reader.read([made.file], stored, output_of(made)).calls == claude_usage(2)
    with pytest.raises(UsageNotKnown, match="too_long"):
        replace(reader, most_bytes=both - 1).read([made.file], stored, output_of(made))
