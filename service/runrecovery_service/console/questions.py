"""Turns questions into forms, and a filled-in form into the response of SubmitReply. Pure.

The fields and buttons of a form are named `choice`, `text`, `field-N`, `input` and `reason`. A form
names options by number; their values stay on the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import StrEnum
from typing import Final

from google.protobuf.struct_pb2 import Struct, Value
from runrecovery.v1 import run_pb2

from runrecovery_service.console.moments import Moment, moment
from runrecovery_service.console.words import KINDS
from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.json_values import InvalidJson, read_struct, read_value, write_value

MAX_BUTTONS: Final = 6
MAX_BUTTON_CHARS: Final = 40
"""With more options, or a longer option, a form has a list to choose from instead of buttons."""
MAX_OPTIONS: Final = 200
"""The most options of a question on a page. An agent can offer 200,000, and such a page would take
seconds to make."""


class FormKind(StrEnum):
    """The kind of form that a question gets."""

    TEXT = "text"
    BUTTONS = "buttons"
    LIST = "list"
    FIELDS = "fields"
    RISK = "risk"
    TOOL_CALL = "tool_call"


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of a form: its label, and its number in the form."""

    label: str
    number: int
    is_first: bool


@dataclass(frozen=True, slots=True)
class ToolCallView:
    """A tool call that needs permission, as a page shows it. `input` is indented JSON."""

    tool: str
    input: str
    workspace: str
    pattern: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionView:
    """An open question.

    Attributes:
        asked_at: when the question was asked; None: an old version recorded the question.
        decides_at: the deadline; None: the question waits without a limit.
        decided_automatically: whether the run continues without an answer at the deadline. If not,
            the run fails then.
        hidden_options: the number of options that the form leaves out.
    """

    run_id: str
    engine: str
    labels: tuple[tuple[str, str], ...]
    etag: str
    interaction_id: int
    kind: str
    prompt: str
    form: FormKind
    choices: tuple[Choice, ...]
    tool_call: ToolCallView | None
    asked_at: Moment | None
    decides_at: Moment | None
    decided_automatically: bool
    hidden_options: int


@dataclass(frozen=True, slots=True)
class AnswerProblem(Exception):
    """A form does not answer its question. The text explains it to the person."""

    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """The content of a refused form, which is shown again so that no text is lost."""

    fields: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str) -> str:
        """Return the text of a field; empty if there is none."""
        return self.fields.get(name, "")


def question_of(run: run_pb2.Run) -> QuestionView | None:
    """Return the open question of a run; None if it has none."""
    if not run.HasField("pending_interaction"):
        return None
    pending = run.pending_interaction
    form = form_of(pending)
    labels = [label for label, _ in options_of(pending)]
    return QuestionView(
        run_id=run.run_id,
        engine=run.engine,
        labels=tuple(sorted(run.labels.items())),
        etag=run.etag,
        interaction_id=pending.interaction_id,
        kind="Permission" if form is FormKind.TOOL_CALL else KINDS.get(pending.kind, "Question"),
        prompt=pending.prompt,
        form=form,
        choices=tuple(Choice(label, at, at == 0) for at, label in enumerate(labels)),
        tool_call=tool_call_view(pending.tool_call) if pending.HasField("tool_call") else None,
        asked_at=moment(pending.asked_at),
        decides_at=moment(pending.wait_deadline_at),
        decided_automatically=not run.interactive_profile.require_user_reply,
        hidden_options=max(0, len(pending.options) - MAX_OPTIONS),
    )


def form_of(pending: run_pb2.PendingInteraction) -> FormKind:
    """Return the kind of form that a question gets."""
    if pending.HasField("tool_call"):
        return FormKind.TOOL_CALL
    if pending.kind == run_pb2.INTERACTION_KIND_RISK_ACK and not pending.options:
        return FormKind.RISK
    if pending.kind == run_pb2.INTERACTION_KIND_FILL_FIELDS and pending.options:
        return FormKind.FIELDS
    options = options_of(pending)
    if not options or pending.kind == run_pb2.INTERACTION_KIND_OPEN_TEXT:
        return FormKind.TEXT
    is_short = all(len(label) <= MAX_BUTTON_CHARS for label, _ in options)
    return FormKind.BUTTONS if is_short and len(options) <= MAX_BUTTONS else FormKind.LIST


def options_of(pending: run_pb2.PendingInteraction) -> list[tuple[str, JsonValue]]:
    """Return label and value of the first `MAX_OPTIONS` options.

    A confirmation without options gets yes and no.
    """
    options = [(option.label, _json(option.value)) for option in pending.options[:MAX_OPTIONS]]
    if not options and pending.kind == run_pb2.INTERACTION_KIND_CONFIRM:
        return [("Yes", "yes"), ("No", "no")]
    return options


def answer_of(pending: run_pb2.PendingInteraction, given: Mapping[str, str]) -> JsonValue:
    """Return the response that a filled-in form means.

    Raises:
        AnswerProblem: the form is incomplete, or belongs to another question.
    """
    match form_of(pending):
        case FormKind.TOOL_CALL:
            return _decision(given)
        case FormKind.RISK:
            return _risk(given)
        case FormKind.FIELDS if len(pending.options) > MAX_OPTIONS:
            raise AnswerProblem("The question has more fields than a page can. Use SubmitReply.")
        case FormKind.FIELDS:
            return _filled(options_of(pending), given)
        case FormKind.TEXT:
            text = given.get("text", "").replace("\r\n", "\n")
            if not text.strip():
                raise AnswerProblem("Write an answer first.")
            return text
        case _:
            return _chosen(options_of(pending), given)


def _chosen(options: Sequence[tuple[str, JsonValue]], given: Mapping[str, str]) -> JsonValue:
    number = given.get("choice", "")
    if not number.isascii() or not number.isdecimal() or len(number) > 4:
        raise AnswerProblem("Choose one of the answers first.")
    if int(number) >= len(options):
        raise AnswerProblem("The question has no such answer.")
    return options[int(number)][1]


def _risk(given: Mapping[str, str]) -> JsonValue:
    if given.get("choice") == "no":
        return "no"
    if given.get("choice") != "yes" or given.get("accepted") != "yes":
        raise AnswerProblem("Tick the box to accept the risk, or refuse it.")
    return "yes"


def _filled(options: Sequence[tuple[str, JsonValue]], given: Mapping[str, str]) -> JsonValue:
    answer: dict[str, JsonValue] = {}
    for at, (label, value) in enumerate(options):
        text = given.get(f"field-{at}", "").replace("\r\n", "\n")
        if not text.strip():
            raise AnswerProblem(f"Fill in every field: {label} is empty.")
        answer[field_key(label, value)] = text
    return answer


def field_key(label: str, value: JsonValue) -> str:
    """Return a field's key in the response: the option's value if it is a text, else the label."""
    return value if isinstance(value, str) else label


def _decision(given: Mapping[str, str]) -> JsonValue:
    match given.get("choice"):
        case "deny":
            reason = given.get("reason", "").replace("\r\n", "\n").strip()
            return {"decision": "deny", "reason": reason} if reason else "deny"
        case "allow":
            return "allow"
        case "allow-changed":
            return {"decision": "allow", "input": _object(given.get("input", ""))}
        case _:
            raise AnswerProblem("Allow the call or deny it.")


def _object(text: str) -> JsonObject:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        write_value(Value(), value)  # fails for half a surrogate pair, or for 10 ** 400
    except (ValueError, OverflowError, RecursionError):
        raise AnswerProblem("The changed input is not valid JSON.") from None
    if not isinstance(value, dict):
        raise AnswerProblem("The changed input must be a JSON object, like { … }.")
    return value


def _refuse_constant(word: str) -> JsonValue:
    raise ValueError(f"{word} is not JSON")


def tool_call_view(call: run_pb2.ToolCall) -> ToolCallView:
    """Return what the page shows of a tool call that needs permission."""
    return ToolCallView(
        tool=call.tool,
        input=json_text(call.input),
        workspace=call.workspace,
        pattern=call.pattern,
    )


def json_text(value: Struct | Value) -> str:
    """Return a value of the contract as indented JSON, or a string without its quotes."""
    try:
        plain = read_struct(value) if isinstance(value, Struct) else read_value(value)
    except InvalidJson:
        return str(value)
    return plain if isinstance(plain, str) else json.dumps(plain, indent=2, ensure_ascii=False)


def _json(value: Value) -> JsonValue:
    try:
        return read_value(value)
    except InvalidJson:
        return None
