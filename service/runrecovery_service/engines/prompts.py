"""The prompts for agent CLIs: the run's input, how to end a turn, the user's reply. Pure.

Every prompt begins with text of the service, because some CLIs take a text that begins with `/` or
`-` for a command.
"""

from __future__ import annotations

import json
from typing import Final

from runrecovery_service.domain.run import Interaction, JsonObject, JsonValue
from runrecovery_service.engines import questions

HOW_TO_END: Final = f"""\
Nobody can see what you write until you end your turn. When you need a decision or a fact that only
the user has, do not guess: end your turn with one JSON object on lines of its own, and nothing
after it:
{{"ask_user": {{"prompt": "your question"}}}}
You may add "options" (a list of texts to choose from) and "kind" (one of
{", ".join(questions.KINDS)}). The answer comes as the next message.
When you are done, end your turn with one JSON object instead that says what came of it:
{{"result": {{"summary": "…"}}}}"""

NOBODY_ANSWERED: Final = (
    "Nobody answered your question in time, and nobody will. Decide by yourself, and go on."
)


def first_prompt(run_input: JsonObject) -> str:
    """Return the first prompt of a run.

    If `input.prompt` is a text, it is the task, and the other fields of the input follow as JSON.
    Otherwise the whole input is the task, as JSON.
    """
    prompt = run_input.get("prompt")
    if not isinstance(prompt, str):
        return f"{HOW_TO_END}\n\nYour task:\n\n{_as_json(run_input)}\n"
    rest = {name: value for name, value in run_input.items() if name != "prompt"}
    more = f"\n\n{_as_json(rest)}" if rest else ""
    return f"{HOW_TO_END}\n\nYour task:\n\n{prompt}{more}\n"


def reply_prompt(reply: Interaction) -> str:
    """Return the prompt with the reply to the last question."""
    if reply.auto_decided:
        return f"{NOBODY_ANSWERED}\n"
    response = reply.response
    words = response if isinstance(response, str) else _as_json(response)
    return f"The user answers:\n\n{words}\n"


def _as_json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
