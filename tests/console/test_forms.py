"""Forms of questions, and parts of pages that can be empty, as the templates draw them."""

from __future__ import annotations

import re

from google.protobuf.json_format import ParseDict
from runrecovery.v1 import recovery_service_pb2, run_pb2
from runrecovery_service.console.plan_view import plan_view
from runrecovery_service.console.rendering import Renderer
from runrecovery_service.console.visitors import Visitor, form_token
from runrecovery_service.console.waiting import waiting_questions
from runrecovery_service.http.calls import CallOrigin

VISITOR = Visitor(
    origin=CallOrigin(authorization=None, peer=""),
    name="ada",
    can_answer=True,
    can_create=False,
    can_operate=False,
    form_token=form_token("a secret"),
)
PERMISSION = {
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
