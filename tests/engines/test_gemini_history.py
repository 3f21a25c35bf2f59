"""Session files of Gemini CLI are repaired so that each tool call has one response when resumed."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from cli_agents.vendor_rules import gemini_violations
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.engines.sessions.gemini_history import GeminiHistory
from runrecovery_service.engines.sessions.repair import NotRepairable, Repair, repair

Json = dict[str, Any]

HEAD: Final[Json] = {"sessionId": "s", "projectHash": "h", "kind": "main"}


def response(call_id: str, output: str = "done") -> Json:
    return {"functionResponse": {"id": call_id, "name": "shell", "response": {"output": output}}}


def tool(call_id: str, *results: Json) -> Json:
    called: Json = {"id": call_id, "name": "shell", "args": {"command": "true"}}
    return called | ({"result": list(results)} if results else {})


def user(message_id: str, *parts: Json) -> Json:
    return {"id": message_id, "type": "user", "content": list(parts)}


def model(message_id: str, *tools: Json, content: Any = "") -> Json:
    message: Json = {"id": message_id, "type": "gemini", "content": content, "thoughts": []}
    return message | ({"toolCalls": list(tools)} if tools else {})


TASK: Final = user("u1", {"text": "task"})
ANSWER: Final = model("g9", content="the end")
UNKNOWN: Final[Json] = {
    "functionResponse": {
        "id": "a",
        "name": "shell",
        "response": {"error": "The outcome is not known: the tool was interrupted."},
    }
}


def as_resumed(lines: Iterable[Json]) -> list[Json]:
    """Return the contents that Gemini CLI 0.61.0 sends of these lines."""
    messages: dict[str, Json] = {}
    for line in lines:
        replaced = line.get("$set", {}).get("messages")
        if replaced is not None:
            messages = {}
        for message in [line] if "id" in line else replaced or []:
            messages[message["id"]] = message
    contents: list[Json] = []
    for message in messages.values():
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"text": parts}] if parts else []
        if message["type"] == "user":
            contents += [{"role": "user", "parts": parts}] if parts else []
            continue
        tools = message.get("toolCalls", [])
        calls = [{"functionCall": {"id": each["id"]}} for each in tools]
        if any("functionCall" in part or "thought" in part for part in parts):
            calls = []
        if parts or calls:
            contents.append({"role": "model", "parts": [*parts, *calls]})
            results = [part for each in tools for part in each.get("result", [])]
            contents += [{"role": "user", "parts": results}] if results else []
    return contents


def corrected(*lines: Json) -> list[Json]:
    return GeminiHistory().corrections(copy.deepcopy(list(lines)))


def test_a_response_that_is_stored_twice_is_removed_from_the_call() -> None:
    doubled = [HEAD, TASK, model("g1", tool("a", response("a"))), user("u2", response("a")), ANSWER]
    assert gemini_violations(as_resumed(doubled)) != []

    added = corrected(*doubled)

    assert added == [model("g1", tool("a")), ANSWER]
    assert gemini_violations(as_resumed([*doubled, *added])) == []


def test_a_history_that_is_valid_gets_no_line() -> None:
    assert corrected(HEAD, TASK, ANSWER) == []
    assert corrected(HEAD, TASK, model("g1", tool("a", response("a"))), ANSWER) == []
    assert corrected(HEAD, TASK, model("g1", tool("a")), user("u2", response("a")), ANSWER) == []
    assert corrected(HEAD, TASK, model("g1")) == []
    assert corrected() == []


def test_each_of_several_calls_keeps_one_response() -> None:
    both = (response("a"), response("b"))
    lines = [HEAD, TASK, model("g1", tool("a", *both), tool("b", *both)), ANSWER]

    added = corrected(*lines)

    assert added[0] == model("g1", tool("a", response("a")), tool("b", response("b")))
    assert gemini_violations(as_resumed([*lines, *added])) == []


def test_a_call_without_a_response_gets_one_that_says_so() -> None:
    lines = [HEAD, TASK, model("g1", tool("a")), user("u2", {"text": "go on"})]

    added = corrected(*lines)

    assert added == [model("g1", tool("a", UNKNOWN)), user("u2", {"text": "go on"})]
    assert gemini_violations(as_resumed([*lines, *added])) == []


def test_a_call_in_the_content_of_a_message_without_a_response_gets_one() -> None:
    call = {"functionCall": {"id": "a", "name": "shell"}}
    lines = [HEAD, TASK, model("g1", content=[call])]

    (added,) = corrected(*lines)

    assert added["toolCalls"] == [{"id": "a", "name": "shell", "result": [UNKNOWN]}]
    assert gemini_violations(as_resumed([*lines, added])) == []


def test_an_image_beside_a_response_stays() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": "AA=="}}
    both = (response("a"), image, response("b"))
    lines = [HEAD, TASK, model("g1", tool("a", *both), tool("b", response("b"))), ANSWER]

    added = corrected(*lines)

    assert added[0] == model("g1", tool("a", response("a"), image), tool("b", response("b")))


def test_a_response_without_a_call_is_removed() -> None:
    lines = [HEAD, TASK, user("u2", response("a"), {"text": "and more"}), ANSWER]

    assert corrected(*lines) == [user("u2", {"text": "and more"}), ANSWER]


def test_messages_that_were_replaced_or_rewound_do_not_count() -> None:
    doubled = [model("g1", tool("a", response("a"))), user("u2", response("a"))]

    assert corrected(HEAD, TASK, *doubled, {"$rewindTo": "g1"}, ANSWER) == []
    assert corrected(HEAD, TASK, *doubled, {"$set": {"messages": [TASK, ANSWER]}}) == []
    assert corrected(HEAD, TASK, *doubled, {"$rewindTo": "unknown"}, ANSWER) == []
    assert corrected(HEAD, {"$set": {"messages": [TASK, *doubled]}})[0] == model("g1", tool("a"))


def test_calls_without_an_id_are_left_to_the_cli() -> None:
    nameless = {"name": "shell", "args": {}, "result": [{"functionResponse": {"name": "shell"}}]}

    assert corrected(HEAD, TASK, model("g1", nameless), ANSWER) == []


IDS: Final = st.sampled_from(["a", "b", "c"])
PARTS: Final = st.one_of(
    IDS.map(response), st.just({"text": "words"}), st.just({"text": "hm", "thought": True})
)
CALLS: Final = IDS.map(lambda call_id: {"functionCall": {"id": call_id, "name": "shell"}})
TOOLS: Final = st.lists(
    st.builds(lambda call_id, results: tool(call_id, *results), IDS, st.lists(IDS.map(response))),
    unique_by=lambda each: each["id"],
    max_size=3,
)
CONTENTS: Final = st.one_of(
    st.just(""),
    st.just("words"),
    st.lists(CALLS, unique_by=lambda each: each["functionCall"]["id"], max_size=3),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Json]:
    """Return lines in which calls, results and responses do not fit each other."""
    lines: list[Json] = [HEAD]
    for number in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            lines.append(user(f"m{number}", *draw(st.lists(PARTS, max_size=4))))
        else:
            lines.append(model(f"m{number}", *draw(TOOLS), content=draw(CONTENTS)))
    return lines


@given(histories())
def test_every_repaired_history_is_valid_and_needs_no_other_repair(lines: list[Json]) -> None:
    added = corrected(*lines)

    assert gemini_violations(as_resumed([*lines, *added])) == []
    assert corrected(*lines, *added) == []


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["id", "type", "content", "toolCalls", "result", "functionResponse",
                         "functionCall", "$set", "messages", "$rewindTo", "sessionId", "thought"]),
        inner | st.sampled_from(["user", "gemini"]),
        max_size=4,
    ),
)  # fmt: skip


@given(st.lists(JSON))
def test_no_line_that_an_agent_can_write_breaks_the_repair(lines: Sequence[Any]) -> None:
    corrected(*(line for line in lines if isinstance(line, dict)))


# -- files -----------------------------------------------------------------------------------------


def write(path: Path, *lines: Mapping[str, Any]) -> bytes:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path.read_bytes()


DOUBLED: Final = (TASK, model("g1", tool("a", response("a"))), user("u2", response("a")), ANSWER)


def test_a_file_keeps_every_byte_and_is_repaired_once(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    before = write(path, HEAD, *DOUBLED)

    done = repair(path, GeminiHistory(), threading.Event())

    assert done == Repair(lines=2, after=len(before))
    after = path.read_bytes()
    assert after.startswith(before)
    assert [json.loads(line) for line in after[len(before) :].splitlines()] == [
        model("g1", tool("a")),
        ANSWER,
    ]
    assert repair(path, GeminiHistory(), threading.Event()) is None
    assert path.read_bytes() == after


def test_a_line_that_a_kill_has_cut_off_does_not_swallow_the_repair(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    before = write(path, HEAD, *DOUBLED) + b'{"id": "g10", "ty'
    path.write_bytes(before)

    assert repair(path, GeminiHistory(), threading.Event()) == Repair(lines=2, after=len(before))

    assert path.read_bytes().startswith(before + b"\n{")
    assert repair(path, GeminiHistory(), threading.Event()) is None


def test_a_repair_that_was_cut_off_is_completed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    before = write(path, HEAD, *DOUBLED)
    repair(path, GeminiHistory(), threading.Event())
    whole = path.read_bytes()

    for size in range(len(before), len(whole)):
        path.write_bytes(whole[:size])
        repair(path, GeminiHistory(), threading.Event())
        lines = [json.loads(line) for line in path.read_bytes().splitlines() if valid(line)]
        assert gemini_violations(as_resumed(lines)) == []


def valid(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_what_is_no_file_is_not_written(tmp_path: Path) -> None:
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    before = write(target, HEAD, *DOUBLED)
    link.symlink_to(target)
    os.mkfifo(pipe)

    with pytest.raises(OSError):  # noqa: PT011 - ELOOP has no class of its own
        repair(link, GeminiHistory(), threading.Event())
    with pytest.raises(NotRepairable, match="not_a_file"):
        repair(pipe, GeminiHistory(), threading.Event())

    assert target.read_bytes() == before


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    write(path, HEAD, *DOUBLED)
    os.truncate(path, 64 * 1024**2 + 1)  # sparse

    with pytest.raises(NotRepairable, match="too_long"):
        repair(path, GeminiHistory(), threading.Event())


def test_a_repair_that_nobody_waits_for_any_more_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    before = write(path, HEAD, *DOUBLED)
    given_up = threading.Event()
    given_up.set()

    with pytest.raises(NotRepairable, match="too_late"):
        repair(path, GeminiHistory(), given_up)

    assert path.read_bytes() == before


def test_a_repair_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    before = write(path, HEAD, *DOUBLED)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            repair(path, GeminiHistory(), threading.Event())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)

    assert path.read_bytes() == before
