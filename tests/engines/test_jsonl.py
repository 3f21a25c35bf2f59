"""The JSON-lines protocol: the messages to an engine, and how its lines are parsed."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from runrecovery.v1 import run_service_pb2
from runrecovery_service.domain.run import InteractionKind, JsonValue, Option, Question, Session
from runrecovery_service.domain.usage import TurnUsage, Usage
from runrecovery_service.engines import jsonl
from runrecovery_service.engines.dialect import (
    AskMessage,
    Message,
    ProgressMessage,
    ProtocolError,
    ResultMessage,
    Resumed,
    RunContext,
    SessionMessage,
    UnknownMessage,
    UsageMessage,
)
from runrecovery_service.engines.jsonl import parse
from runrecovery_service.engines.message_limits import MAX_JSONL_LINE_BYTES
from runrecovery_service.engines.strict_json import MAX_DEPTH
from support.questions import answered

TASK = RunContext(run_id="r-1", attempt=2, input={"topic": "ß"}, workspace="/w")

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def line(**message: object) -> bytes:
    return json.dumps(message).encode()


def test_a_start_message_has_the_run_its_input_and_its_workspace() -> None:
    assert json.loads(jsonl.start_message(TASK)) == {
        "type": "start",
        "run_id": "r-1",
        "attempt": 2,
        "input": {"topic": "ß"},
        "workspace": "/w",
    }


def test_an_automatic_decision_is_marked_in_reply_and_resume() -> None:
    session = Session(type="jsonl", handle="h", turn=3)
    decided = answered(2, None, auto_decided=True)

    resumed = json.loads(jsonl.resume_message(TASK, Resumed(session=session, reply=decided)))
    replied = json.loads(jsonl.reply_message(decided))

    assert resumed["reply"] == {"interaction_id": 2, "response": None, "auto_decided": True}
    assert replied == {"type": "reply", **resumed["reply"]}


def test_a_resume_message_has_the_session_and_the_reply() -> None:
    session = Session(type="jsonl", handle="h", turn=3)

    sent = json.loads(
        jsonl.resume_message(TASK, Resumed(session=session, reply=answered(4, {"a": None})))
    )

    assert sent == {
        "type": "resume",
        "run_id": "r-1",
        "attempt": 2,
        "input": {"topic": "ß"},
        "workspace": "/w",
        "session": {"type": "jsonl", "value": "h"},
        "reply": {"interaction_id": 4, "response": {"a": None}},
    }


@given(JSON)
def test_every_message_is_one_line_of_ascii(response: JsonValue) -> None:
    sent = jsonl.reply_message(answered(1, response))

    assert sent.endswith(b"\n")
    assert sent.count(b"\n") == 1
    assert sent.isascii()
    assert json.loads(sent) == {"type": "reply", "interaction_id": 1, "response": response}


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (line(type="session", value="abc"), SessionMessage(value="abc")),
        (line(type="session", value="x" * 4096), SessionMessage(value="x" * 4096)),
        (line(type="progress", message="at it"), ProgressMessage(message="at it")),
        (line(type="progress", message=""), ProgressMessage(message="")),
        (line(type="result", output={}), ResultMessage(output={})),
        (line(type="result", output={"a": [1, None]}), ResultMessage(output={"a": [1, None]})),
        (
            line(type="usage", input_tokens=5, output_tokens=2, cost_usd=0.5, model="m"),
            UsageMessage(
                used=TurnUsage(
                    turn=Usage(input_tokens=5, output_tokens=2, cost_nanos=500_000_000, model="m")
                )
            ),
        ),
        (
            line(
                type="usage",
                input_tokens=5,
                cached_input_tokens=3,
                cache_write_input_tokens=2,
                output_tokens=2,
                reasoning_output_tokens=1,
            ),
            UsageMessage(
                used=TurnUsage(
                    turn=Usage(
                        input_tokens=5,
                        cached_input_tokens=3,
                        cache_write_input_tokens=2,
                        output_tokens=2,
                        reasoning_output_tokens=1,
                    )
                )
            ),
        ),
        (
            line(type="usage", input_tokens=-5, output_tokens=2),
            UnknownMessage(type="usage", problem="input_tokens is not from 0 to 1000000000000"),
        ),
        (
            line(type="usage", tokens=12),
            UnknownMessage(type="usage", problem="input_tokens is missing"),
        ),
        (line(type="thought", text="hm"), UnknownMessage(type="thought")),
        (line(type="t" * 100), UnknownMessage(type="t" * 64)),
        (line(type="progress", message="x", extra=1), ProgressMessage(message="x")),
        (b' {"type":"progress","message":"x"} \r\n', ProgressMessage(message="x")),
        ('{"type":"progress","message":"é"}'.encode(), ProgressMessage(message="é")),
    ],
)
def test_a_message_of_the_agent_is_parsed(printed: bytes, expected: Message) -> None:
    assert parse(printed) == expected


@pytest.mark.parametrize("kind", list(InteractionKind))
def test_every_kind_of_question_is_parsed(kind: InteractionKind) -> None:
    assert parse(line(type="ask", kind=kind.value, prompt="?")) == AskMessage(
        question=Question(kind=kind, prompt="?")
    )


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("yes", Option(label="yes", value="yes")),
        (3, Option(label="3", value=3)),
        (0.5, Option(label="0.5", value=0.5)),
        ({"label": "Yes", "value": True}, Option(label="Yes", value=True)),
        ({"label": "Nothing", "value": None}, Option(label="Nothing", value=None)),
        ({"label": "Both", "value": {"a": [1]}, "x": 1}, Option(label="Both", value={"a": [1]})),
    ],
)
def test_options_are_parsed(option: JsonValue, expected: Option) -> None:
    message = parse(line(type="ask", kind="choose_one", prompt="?", options=[option]))

    assert isinstance(message, AskMessage)
    assert message.question.options == (expected,)


def nested(depth: int) -> JsonValue:
    """Return nested objects: the most expensive shape for protobuf."""
    value: JsonValue = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "printed",
    [
        b"",
        b"\n",
        b"Hello!",
        b"[]",
        b'"text"',
        b"null",
        b"{}",
        b'{"type":null}',
        b'{"type":1}',
        b'{"type":"session"}',
        b'{"type":"session","value":""}',
        b'{"type":"session","value":7}',
        line(type="session", value="x" * 4097),
        b'{"type":"ask","prompt":"?"}',
        b'{"type":"ask","kind":"riddle","prompt":"?"}',
        b'{"type":"ask","kind":["open_text"],"prompt":"?"}',
        b'{"type":"ask","kind":"open_text"}',
        b'{"type":"ask","kind":"open_text","prompt":" "}',
        b'{"type":"ask","kind":"open_text","prompt":["?"]}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":{}}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":"ab"}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":[true]}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":[null]}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":[""]}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":[{"label":"a"}]}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":[{"value":1}]}',
        b'{"type":"ask","kind":"choose_one","prompt":"?","options":[{"label":1,"value":1}]}',
        b'{"type":"progress"}',
        b'{"type":"progress","message":{}}',
        b'{"type":"result"}',
        b'{"type":"result","output":[]}',
        b'{"type":"result","output":null}',
        b'{"type":"result","output":{"a":NaN}}',
        b'{"type":"result","output":{"a":Infinity}}',
        b'{"type":"result","output":{"a":-Infinity}}',
        b'{"type":"result","output":{"a":1e999}}',
        b'{"type":"result","output":{"a":1' + b"0" * 400 + b"}}",
        b'{"type":"result","output":{"a":1' + b"0" * 5000 + b"}}",
        b'{"type":"result","output":{"a":1,"a":2}}',
        b'{"type":"result","output":{},"type":"ask"}',
        b'{"type":"result","output":{"a":"\\u0000"}}',
        b'{"type":"result","output":{"\\u0000":1}}',
        b'{"type":"result","output":{"a":["\\ud800"]}}',
        b'{"type":"progress","message":"\\udfff"}',
        b'{"type":"progress","message":"\xff"}',
        b'\xef\xbb\xbf{"type":"progress","message":"x"}',
        '{"type":"progress","message":"x"}'.encode("utf-16"),
        b'{"type":"progress","message":"x"}{"type":"progress","message":"x"}',
        b'{"type":"progress","message":"a\nb"}',
        line(type="progress", message="x" * (1 << 20)),
        line(type="result", output=nested(MAX_DEPTH)),
        b'{"type":"result","output":{"a":' + b"[" * 100_000,
        b'{"type":"result","output":{"a":' + b"[" * 500 + b"]" * 500 + b"}}",
    ],
)
def test_a_line_that_is_no_message_is_a_protocol_error(printed: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(printed)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse(b'{"type":"progress","message":"\\ud83d\\ude00"}') == ProgressMessage(message="😀")


def test_a_line_of_exactly_the_size_limit_is_parsed() -> None:
    empty = line(type="progress", message="")
    full = line(type="progress", message="x" * (MAX_JSONL_LINE_BYTES - len(empty)))

    assert len(full) == MAX_JSONL_LINE_BYTES
    assert isinstance(parse(full), ProgressMessage)


def test_clients_can_parse_the_deepest_output_that_is_accepted() -> None:
    message = parse(line(type="result", output=nested(MAX_DEPTH - 1)))
    assert isinstance(message, ResultMessage)
    answer = run_service_pb2.ListRunsResponse()
    json_format.ParseDict(message.output, answer.runs.add().output, max_recursion_depth=200)

    again = run_service_pb2.ListRunsResponse.FromString(answer.SerializeToString())

    assert again == answer


def test_a_protocol_error_does_not_quote_the_line() -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(b'{"type":"session","value":"hunter2"')

    assert "hunter2" not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_repr_of_a_session_message_hides_the_handle() -> None:
    assert "hunter2" not in repr(SessionMessage(value="hunter2"))


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_every_line_is_a_message_or_a_protocol_error(printed: bytes) -> None:
    try:
        message = parse(printed)
    except ProtocolError:
        return
    assert isinstance(
        message, SessionMessage | AskMessage | ProgressMessage | ResultMessage | UnknownMessage
    )


@given(st.dictionaries(TEXT, JSON, max_size=4))
def test_an_output_is_parsed_as_it_was_printed(output: dict[str, JsonValue]) -> None:
    printed = json.dumps({"type": "result", "output": output}, ensure_ascii=False).encode()

    assert parse(printed) == ResultMessage(output=output)
