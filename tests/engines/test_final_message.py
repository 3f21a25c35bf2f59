"""The final text of an agent CLI is parsed as a question or as a result."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.run import InteractionKind, JsonObject, Option, Question
from runrecovery_service.engines import final_message, strict_json
from runrecovery_service.engines.dialect import AskMessage, ResultMessage
from runrecovery_service.engines.final_message import parse
from runrecovery_service.engines.message_limits import MAX_FINAL_MESSAGE_BYTES

ASK = '{"ask_user": {"prompt": "Where to?"}}'
WHERE = Question(kind=InteractionKind.OPEN_TEXT, prompt="Where to?")
PRETTY = json.dumps({"ask_user": {"prompt": "Where to?"}}, indent=2)


def question(text: str) -> Question:
    message = parse(text)
    assert isinstance(message, AskMessage)
    return message.question


def output(text: str) -> JsonObject:
    message = parse(text)
    assert isinstance(message, ResultMessage)
    return message.output


@pytest.mark.parametrize(
    "text",
    [
        ASK,
        f"\n  {ASK}\n\n",
        f"I looked at everything.\n\n{ASK}",
        f"{{not json\n{ASK}",
        PRETTY,
        f"First this.\n{PRETTY}\n",
        f"```json\n{ASK}\n```",
        f"Before.\n```\n{PRETTY}\n```\n",
        f"A `{{}}` first:\n```py\nx = {{}}\n```\nand then\n```json\n{ASK}\n```",
        f"I need to know. {ASK}",
        f"- {ASK}",
        f"```json5\r\n{ASK}\r\n```\r\n",
        f"~~~\n{ASK}\n~~~",
        f"````\n{ASK}\n````",
        f'{{"result": {{}}}} is what I would say, but\n{ASK}',
        '{"ask_user": "Where to?"}',
    ],
)
def test_an_ask_user_object_at_the_end_is_a_question(text: str) -> None:
    assert question(text) == WHERE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "All done.",
        f"{ASK}\nI will wait.",
        '{"ask_user": {"prompt": "Where to?"}, "result": {}}',
        '{"ask_user": {"prompt": " "}}',
        '{"ask_user": {"text": "Where to?"}}',
        '{"ask_user": 7}',
        '{"result": "all good"}',
        '{"result": {"a": 1, "a": 2}}',
        '{"result": {"number": NaN}}',
        '["result"]',
        "```\nnot closed {}",
        "}" * 1000,
    ],
)
def test_any_other_text_is_the_result_unchanged(text: str) -> None:
    assert output(text) == {"text": text}


def test_a_result_object_is_the_output() -> None:
    assert output('Done.\n{"result": {"files": ["a"], "ok": true}}') == {"files": ["a"], "ok": True}


def test_a_question_has_the_kind_and_the_options_of_its_object() -> None:
    asked = {"prompt": "Sure?", "kind": "confirm", "options": ["yes", {"label": "No", "value": 0}]}

    assert question(json.dumps({"ask_user": asked})) == Question(
        kind=InteractionKind.CONFIRM,
        prompt="Sure?",
        options=(Option(label="yes", value="yes"), Option(label="No", value=0)),
    )


@pytest.mark.parametrize(
    ("extra", "kind", "count"),
    [
        ({"options": ["a", "b"]}, InteractionKind.CHOOSE_ONE, 2),
        ({"options": ["a", None, [], ""]}, InteractionKind.CHOOSE_ONE, 1),
        ({"options": "a or b"}, InteractionKind.OPEN_TEXT, 0),
        ({"kind": "multiple choice"}, InteractionKind.OPEN_TEXT, 0),
        ({"kind": 3, "options": ["a"]}, InteractionKind.CHOOSE_ONE, 1),
    ],
)
def test_a_mistake_in_kind_or_options_does_not_lose_the_question(
    extra: dict[str, object], kind: InteractionKind, count: int
) -> None:
    found = question(json.dumps({"ask_user": {"prompt": "Which?", **extra}}))

    assert (found.kind, len(found.options)) == (kind, count)


def test_characters_that_no_store_accepts_are_replaced() -> None:
    assert output("a\0b\ud800c") == {
        "text": "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    }


def test_a_text_that_is_too_long_is_truncated_and_marked_as_such() -> None:
    found = output("x" + "ü" * MAX_FINAL_MESSAGE_BYTES)

    assert found == {"text": "ü" * (MAX_FINAL_MESSAGE_BYTES // 2), "truncated": True}


def test_a_truncated_text_begins_with_a_whole_character() -> None:
    found = output("€" * MAX_FINAL_MESSAGE_BYTES)

    assert MAX_FINAL_MESSAGE_BYTES % 3 == 1
    assert found == {"text": "€" * (MAX_FINAL_MESSAGE_BYTES // 3), "truncated": True}


def test_a_question_after_a_text_that_is_too_long_is_found() -> None:
    assert question("x" * 5 * MAX_FINAL_MESSAGE_BYTES + ASK) == WHERE


def test_a_code_fence_inside_an_object_does_not_end_it() -> None:
    asked = {"prompt": "Run this?\n```\nrm -r build\n```", "kind": "confirm"}

    assert question(f"```json\n{json.dumps({'ask_user': asked})}\n```").prompt == asked["prompt"]


@pytest.mark.parametrize(
    "text",
    [
        "```\n" + " " * 1_000_000 + "x```",
        "{ " * 500_000 + "}",
        '{"result": ' * 90_000 + "}",
        '{"result":\n' * 64 + "[" + "{}," * 300_000 + "x}",
        ("{" + " " * 1000) * 1000 + "}",
    ],
    ids=["blanks", "braces", "nested", "wide", "gaps"],
)
def test_a_text_made_to_be_slow_is_parsed_a_limited_number_of_times(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def count_and_read(text: str, begin: int) -> tuple[JsonObject, int]:
        tries.append(begin)
        return strict_json.read_first_object(text, begin)

    monkeypatch.setattr(final_message, "read_first_object", count_and_read)

    parse(text)

    assert len(tries) <= final_message.TRIES


def test_an_object_that_is_too_long_is_text() -> None:
    text = json.dumps({"result": {"long": "x" * MAX_FINAL_MESSAGE_BYTES}})

    assert output(text)["truncated"] is True


def test_nesting_that_is_too_deep_is_text() -> None:
    text = '{"result": ' + '{"a": ' * 5000 + "1" + "}" * 5001

    assert output(text) == {"text": text}


@given(st.text())
def test_every_text_is_a_result_or_a_question(text: str) -> None:
    assert isinstance(parse(text), ResultMessage | AskMessage)


@given(st.lists(st.sampled_from(["{", "}", "\n", '"', "```", "ask_user", ":", " ", "[", "\\"])))
def test_every_text_that_resembles_json_is_a_result_or_a_question(pieces: list[str]) -> None:
    assert isinstance(parse("".join(pieces)), ResultMessage | AskMessage)
