"""The prompts that the agent CLIs get."""

from __future__ import annotations

import json

import pytest
from runrecovery_service.domain.run import JsonObject
from runrecovery_service.engines import final_message, prompts
from runrecovery_service.engines.dialect import AskMessage, ResultMessage
from support.questions import answered


def test_the_first_prompt_explains_how_to_end_and_contains_the_task() -> None:
    text = prompts.first_prompt({"prompt": "/etc/hosts: what is it?"})

    assert text == f"{prompts.HOW_TO_END}\n\nYour task:\n\n/etc/hosts: what is it?\n"


def test_the_first_prompt_contains_the_other_keys_of_the_input_as_json() -> None:
    text = prompts.first_prompt({"prompt": "Mend it.", "ticket": {"id": 7}})

    assert json.loads(text.partition("Mend it.\n\n")[2]) == {"ticket": {"id": 7}}


@pytest.mark.parametrize("given_input", [{}, {"goal": "ß"}, {"prompt": 7}, {"prompt": None}])
def test_the_first_prompt_contains_an_input_without_a_prompt_as_json(
    given_input: JsonObject,
) -> None:
    assert (
        json.loads(prompts.first_prompt(given_input).partition("Your task:\n\n")[2]) == given_input
    )


@pytest.mark.parametrize(
    ("response", "text"),
    [("/quit", "/quit"), ("", ""), (True, "true"), ({"city": "Köln"}, '{\n  "city": "Köln"\n}')],
)
def test_the_reply_prompt_puts_an_introduction_before_the_answer(
    response: object, text: str
) -> None:
    assert prompts.reply_prompt(answered(1, response)) == f"The user answers:\n\n{text}\n"  # type: ignore[arg-type] # any JSON


def test_the_reply_prompt_names_an_automatic_decision() -> None:
    assert (
        prompts.reply_prompt(answered(1, None, auto_decided=True)) == f"{prompts.NOBODY_ANSWERED}\n"
    )


def test_the_examples_in_the_first_prompt_parse_as_a_question_and_a_result() -> None:
    shown = [line for line in prompts.HOW_TO_END.splitlines() if line.startswith("{")]

    assert [type(final_message.parse(line)) for line in shown] == [AskMessage, ResultMessage]
