"""Forms of questions, and parts of pages that can be empty, as the templates draw them."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from runrecovery.v1 import recovery_service_pb2, run_pb2
from runrecovery_service.console.forms import FORM_TYPE, read_form
from runrecovery_service.console.plan_view import plan_view
from runrecovery_service.console.questions import MAX_OPTIONS
from runrecovery_service.console.rendering import WHOLE_CHARS, Renderer
from runrecovery_service.console.shown_text import MAX_NAMED
from runrecovery_service.console.visitors import Visitor, form_token
from runrecovery_service.console.waiting import waiting_questions
from runrecovery_service.http import asgi
from runrecovery_service.http.asgi import ClientGone
from runrecovery_service.http.calls import CallOrigin
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

VISITOR = Visitor(
    origin=CallOrigin(authorization=None, peer=""),
    name="ada",
    can_answer=True,
    can_create=False,
    can_operate=False,
    form_token=form_token("a secret"),
)
FORM_SCOPE = {
    "type": "http",
    "method": "POST",
    "headers": [(b"content-type", FORM_TYPE.encode())],
}
PERMISSION: dict[str, Any] = {
    "run_id": "r",
    "etag": "the-etag",
    "pending_interaction": {
        "interaction_id": 4,
        "kind": "INTERACTION_KIND_RISK_ACK",
        "prompt": "May I?",
        "tool_call": {"tool": "Bash", "input": {"command": "ls"}, "workspace": "/w"},
    },
}


def test_enter_in_the_reason_of_a_permission_question_denies_the_call() -> None:
    questions = waiting_questions([ParseDict(PERMISSION, run_pb2.Run())])
    page = Renderer().page(
        "waiting", VISITOR, questions=questions, next="", is_first=True, limit=100
    )

    forms = re.findall(r'<form class="answer".*?</form>', bytes(page.body).decode(), re.DOTALL)

    # A browser presses the first button of a form when Enter is pressed in one of its fields.
    buttons = [re.findall(r'<button name="choice" value="([a-z-]+)"', form) for form in forms]
    fields = [re.findall(r' name="(reason|input)"', form) for form in forms]
    assert buttons == [["allow"], ["deny"], ["allow-changed"]]
    assert fields == [[], ["reason"], ["input"]]
    assert [form.count('name="etag" value="the-etag"') for form in forms] == [1, 1, 1]


def test_a_plan_without_a_new_decision_has_no_table_of_rules() -> None:
    group = {"outcome": "PLANNED_OUTCOME_KEPT_WAITING", "runs": 3}
    decided = {"rule": "resumable_waiting_preserved", "recovery_state": "RECOVERY_STATE_NONE"}
    before = {"runs_total": 3, "runs_unchanged": 3, "groups": [group]}
    after = {"runs_total": 3, "groups": [group], "decisions": [{**decided, "count": 3}]}

    pages = [
        Renderer().page(
            "plan",
            VISITOR,
            plan=plan_view(ParseDict(plan, recovery_service_pb2.RecoveryPlan())),
            rows=[],
            now=None,
            next="",
        )
        for plan in (before, after)
    ]

    assert ["By rule" in bytes(page.body).decode() for page in pages] == [False, True]


def page_of(limit: int, **pending: object) -> str:
    """Return the page with one question."""
    given = {**PERMISSION, "pending_interaction": {**PERMISSION["pending_interaction"], **pending}}
    questions = waiting_questions([ParseDict(given, run_pb2.Run())])
    page = Renderer().page(
        "waiting", VISITOR, questions=questions, next="", is_first=True, limit=limit
    )
    return bytes(page.body).decode()


def buttons_of(command: str, limit: int) -> list[str]:
    """Return the answers that the page offers to a permission question about a command."""
    call = {"tool": "Bash", "input": {"command": command}}
    page = page_of(limit, tool_call=call)
    return re.findall(r'<button name="choice" value="([a-z-]+)"', page)


def test_a_call_that_is_not_shown_whole_can_be_denied_and_not_allowed() -> None:
    long = "ls " + " " * 8000 + "; rm -rf ~"
    hidden = "ls " + "\u200b\ufeff" * MAX_NAMED + "; rm -rf ~"

    assert buttons_of(long, limit=8000) == ["deny"]
    assert buttons_of(long, limit=WHOLE_CHARS) == ["allow", "deny", "allow-changed"]
    assert buttons_of(hidden, limit=WHOLE_CHARS) == ["deny"]


def test_a_page_says_how_many_options_of_a_question_it_leaves_out() -> None:
    options = [{"label": f"<{number}>", "value": number} for number in range(MAX_OPTIONS + 50_000)]

    kind = "INTERACTION_KIND_CHOOSE_ONE"
    page = page_of(8000, kind=kind, options=options, tool_call=None)

    assert page.count('name="choice"') == MAX_OPTIONS
    assert "50,000 more options cannot be shown here." in page


async def test_a_form_that_does_not_arrive_in_time_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "BODY_S", 0.01)
    never = asyncio.Event()

    async def receive() -> Message:
        await never.wait()
        raise AssertionError("the body never arrives")

    with pytest.raises(HTTPException) as refused:
        await read_form(Request(FORM_SCOPE, receive))
    assert refused.value.status_code == 408


async def test_a_client_that_leaves_in_the_middle_of_a_form_is_no_defect() -> None:
    messages = [{"type": "http.request", "body": b"text=", "more_body": True}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    with pytest.raises(ClientGone):  # which the server ignores; it logs every other exception
        await read_form(Request(FORM_SCOPE, receive))
