"""The prompts for agent CLIs: the run's input, how to end a turn, the user's reply. Pure.

Every prompt begins with text of the service, because some CLIs take a text that begins with `/` or
`-` for a command.
"""

from __future__ import annotations

import json
from datetime import UTC
from typing import Final

from runrecovery_service.domain.interruption import Interruption, InterruptionCause
from runrecovery_service.domain.permission import Allow, Deny, parse_answer
from runrecovery_service.domain.run import Interaction, JsonObject, JsonValue, ToolCall
from runrecovery_service.engines import questions
from runrecovery_service.engines.dialect import Resumed

HOW_TO_END: Final = f"""\
Nobody can see what you write until you end your turn. When you need a decision or a fact that only
the user has, do not guess: end your turn with one JSON object on lines of its own, and nothing
after it:
{{"ask_user": {{"prompt": "your question"}}}}
You may add "options" (a list of texts to choose from) and "kind" (one of
{", ".join(questions.KINDS)}). The answer comes as the next message.
When you are done, end your turn with one JSON object instead that says what came of it:
{{"result": {{"summary": "…"}}}}"""

HOW_TO_GO_ON: Final = (
    "Commands that you had started may have run completely, partly or not at all, although you see"
    " no result of them here. Before you continue, look at your workspace and at everything else"
    " that your commands change. Do not repeat what has already taken effect. Then complete your"
    " turn."
)
RESTATED_CHARS: Final = 16_384
"""The longest message that is repeated after an interruption. A longer one would take much of the
context of the agent, and CLIs save a message before they send it to the model."""
_WHAT_HAPPENED: Final = {
    InterruptionCause.RESTART: "The service that runs you was restarted.",
    InterruptionCause.SUSPENSION: "The machine that you run on stood still for a while.",
    InterruptionCause.SHIM_LOST: "The process that supervised you was lost.",
}
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
    if reply.tool_call is not None:
        return permission_prompt(reply, reply.tool_call)
    if reply.auto_decided:
        return f"{NOBODY_ANSWERED}\n"
    response = reply.response
    words = response if isinstance(response, str) else _as_json(response)
    return f"The user answers:\n\n{words}\n"


def permission_prompt(reply: Interaction, call: ToolCall) -> str:
    """Return the text that tells an agent the answer to a permission question."""
    asked = f"your call of {call.tool} with this input:\n\n{_as_json(call.input)}\n"
    match parse_answer(reply.response):
        case Allow(input=changed) if not call.is_last:
            given = call.input if changed is None else changed
            return (
                f"The user allowed your call of {call.tool}. It has not run, because you made it"
                f" together with other calls. Call {call.tool} now, alone, with exactly this"
                f" input:\n\n{_as_json(given)}\n"
            )
        case Allow(input=None):
            return f"The user allowed {asked}"
        case Allow(input=changed):
            return f"The user allowed {asked}\nbut with this input:\n\n{_as_json(changed)}\n"
        case Deny(reason=str(reason)):
            return f"The user refused {asked}\nfor this reason: {reason}\n"
    who = "Nobody answered whether to allow" if reply.auto_decided else "The user refused"
    return f"{who} {asked}"


def resume_prompt(run_input: JsonObject, resumed: Resumed) -> str:
    """Return the prompt that resumes a session: the reply, or the notice of an interruption."""
    if resumed.interruption is not None:
        return _after_interruption(run_input, resumed.interruption)
    assert resumed.reply is not None  # noqa: S101 - a session is resumed for one of the two
    return reply_prompt(resumed.reply)


def interruption_notice(interruption: Interruption) -> str:
    """Return the text that tells an agent about the interruption of its turn."""
    at = interruption.at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    again = f" This is interruption {interruption.times} of this turn." * (interruption.times > 1)
    return (
        f"{_WHAT_HAPPENED[interruption.cause]} At {at} your process was found to have been ended"
        f" in the middle of your turn.{again} {HOW_TO_GO_ON}"
    )


def _after_interruption(run_input: JsonObject, interruption: Interruption) -> str:
    """Return the notice, and the message that began the turn.

    If the process was killed early, its session possibly lacks this message.
    """
    notice = interruption_notice(interruption)
    if interruption.reply is not None:
        before = reply_prompt(interruption.reply)
    else:
        before = first_prompt(run_input)
    if len(before) > RESTATED_CHARS:
        return f"{notice}\n"
    return f"{notice}\n\nThe message that began this turn, in case it is missing above:\n\n{before}"


def _as_json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
