"""Forms of questions, and the responses that they mean."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from google.protobuf.json_format import ParseDict
from runrecovery.v1 import run_pb2
from runrecovery_service.console.questions import (
    AnswerProblem,
    FormKind,
    answer_of,
    form_of,
    json_text,
    question_of,
)
from runrecovery_service.domain.run import JsonValue


def asked(kind: str, *options: object, **more: object) -> run_pb2.PendingInteraction:
    """Return an open question. An option is a text, or a label and a value."""
    given = [each if isinstance(each, tuple) else (each, each) for each in options]
    return ParseDict(
        {
            "interaction_id": 1,
            "kind": f"INTERACTION_KIND_{kind}",
            "prompt": "So?",
            "options": [{"label": label, "value": value} for label, value in given],
            **more,
        },
        run_pb2.PendingInteraction(),
    )


CALL = {"tool_call": {"tool": "Bash", "input": {"command": "ls"}, "workspace": "/w"}}


@pytest.mark.parametrize(
    ("question", "form"),
    [
        (asked("OPEN_TEXT"), FormKind.TEXT),
        (asked("CHOOSE_ONE"), FormKind.TEXT),
        (asked("CHOOSE_ONE", "a", "b"), FormKind.BUTTONS),
        (asked("CHOOSE_ONE", "a" * 41, "b"), FormKind.LIST),
        (asked("CHOOSE_ONE", *"abcdefg"), FormKind.LIST),
        (asked("CONFIRM"), FormKind.BUTTONS),
        (asked("CONFIRM", "yes", "no"), FormKind.BUTTONS),
        (asked("FILL_FIELDS", "name"), FormKind.FIELDS),
        (asked("FILL_FIELDS"), FormKind.TEXT),
        (asked("RISK_ACK"), FormKind.RISK),
        (asked("RISK_ACK", "Go", "Stop"), FormKind.BUTTONS),
        (asked("RISK_ACK", **CALL), FormKind.TOOL_CALL),
        (asked("UNSPECIFIED"), FormKind.TEXT),
    ],
)
def test_each_question_gets_the_form_of_its_kind(
    question: run_pb2.PendingInteraction, form: FormKind
) -> None:
    assert form_of(question) is form


@pytest.mark.parametrize(
    ("question", "given", "response"),
    [
        (asked("OPEN_TEXT"), {"text": "a\r\nb"}, "a\nb"),
        (asked("CHOOSE_ONE", "a", ("Two", {"n": 2})), {"choice": "1"}, {"n": 2}),
        (asked("CONFIRM"), {"choice": "0"}, "yes"),
        (asked("CONFIRM"), {"choice": "1"}, "no"),
        (asked("CONFIRM", ("Go", True), ("Stop", False)), {"choice": "1"}, False),
        (
            asked("FILL_FIELDS", ("Your name", "name"), ("Age", 7)),
            {"field-0": "Ada", "field-1": "36"},
            {"name": "Ada", "Age": "36"},
        ),
        (asked("RISK_ACK"), {"choice": "yes", "accepted": "yes"}, "yes"),
        (asked("RISK_ACK"), {"choice": "no"}, "no"),
        (asked("RISK_ACK", **CALL), {"choice": "allow"}, "allow"),
        (asked("RISK_ACK", **CALL), {"choice": "deny", "reason": " "}, "deny"),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "deny", "reason": "Not there."},
            {"decision": "deny", "reason": "Not there."},
        ),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "allow-changed", "input": '{"command": "pwd"}'},
            {"decision": "allow", "input": {"command": "pwd"}},
        ),
    ],
)
def test_a_form_means_the_response_that_the_question_asks_for(
    question: run_pb2.PendingInteraction, given: Mapping[str, str], response: JsonValue
) -> None:
    assert answer_of(question, given) == response


@pytest.mark.parametrize(
    ("question", "given", "problem"),
    [
        (asked("OPEN_TEXT"), {"text": " \n"}, "Write an answer first."),
        (asked("CHOOSE_ONE", "a", "b"), {}, "Choose one of the answers first."),
        (asked("CHOOSE_ONE", "a", "b"), {"choice": "2"}, "The question has no such answer."),
        (asked("CHOOSE_ONE", "a", "b"), {"choice": "-1"}, "Choose one of the answers first."),
        (asked("CHOOSE_ONE", "a", "b"), {"choice": "\u0661"}, "Choose one of the answers first."),
        (
            asked("FILL_FIELDS", "name", "age"),
            {"field-0": "Ada"},
            "Fill in every field: age is empty.",
        ),
        (
            asked("RISK_ACK"),
            {"choice": "yes"},
            "Tick the box to accept the risk, or refuse it.",
        ),
        (asked("RISK_ACK", **CALL), {}, "Allow the call or deny it."),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "allow-changed", "input": "{"},
            "The changed input is not valid JSON.",
        ),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "allow-changed", "input": '{"n": NaN}'},
            "The changed input is not valid JSON.",
        ),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "allow-changed", "input": "[" * 100_000},
            "The changed input is not valid JSON.",
        ),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "allow-changed", "input": '{"half": "\\ud83d"}'},
            "The changed input is not valid JSON.",
        ),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "allow-changed", "input": '{"n": 1' + "0" * 400 + "}"},
            "The changed input is not valid JSON.",
        ),
        (
            asked("FILL_FIELDS", *map(str, range(201))),
            {f"field-{number}": "x" for number in range(201)},
            "The question has more fields than a page can. Use SubmitReply.",
        ),
        (
            asked("RISK_ACK", **CALL),
            {"choice": "allow-changed", "input": "[]"},
            "The changed input must be a JSON object, like { … }.",
        ),
    ],
)
def test_an_incomplete_form_says_what_is_missing(
    question: run_pb2.PendingInteraction, given: Mapping[str, str], problem: str
) -> None:
    with pytest.raises(AnswerProblem) as raised:
        answer_of(question, given)

    assert raised.value.text == problem


def test_a_question_shows_its_deadline_and_what_happens_then() -> None:
    run = run_pb2.Run(run_id="r", etag="e", pending_interaction=asked("OPEN_TEXT"))
    run.pending_interaction.wait_deadline_at.FromJsonString("2026-11-30T10:00:00Z")
    run.interactive_profile.require_user_reply = True

    view = question_of(run)

    assert view is not None
    assert view.decides_at is not None
    assert (view.decides_at.utc, view.decided_automatically) == ("2026-11-30 10:00:00 UTC", False)


def test_a_run_without_a_question_has_no_form() -> None:
    assert question_of(run_pb2.Run(run_id="r")) is None


def test_a_text_is_shown_without_quotes_and_other_json_with_its_structure() -> None:
    question = asked("CHOOSE_ONE", ("a", "é"), ("b", {"n": [1]}))

    assert [json_text(option.value) for option in question.options] == [
        "é",
        '{\n  "n": [\n    1\n  ]\n}',
    ]
