"""Questions are answered by forms, without a script, at a real service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from support.api import Api, status_word
from support.console_api import ConsoleVisit
from support.http_api import http_address
from support.service import Home

OPTIONS = ["yes", {"label": "Later", "value": {"hours": 2}}]
FIELDS = [{"label": "Your name", "value": "name"}, "city"]


def ask(api: Api, run_id: str, **question: Any) -> None:
    """Let a run ask a question."""
    api.create("resumable", {"questions": [{"prompt": "So?", **question}]}, run_id=run_id)
    api.until_status(run_id, "WAITING_USER")


def answer_in(api: Api, run_id: str) -> Any:
    """Return the accepted answer of a run's question."""
    (question,) = api.interactions(run_id)
    return MessageToDict(question.response) if question.HasField("response") else None


@pytest.mark.parametrize(
    ("run_id", "question", "fields", "answer"),
    [
        ("text", {"kind": "open_text"}, {"text": "Go on.\r\nPlease."}, "Go on.\nPlease."),
        ("choice", {"kind": "choose_one", "options": OPTIONS}, {"choice": "1"}, {"hours": 2.0}),
        ("confirm", {"kind": "confirm"}, {"choice": "1"}, "no"),
        (
            "fields",
            {"kind": "fill_fields", "options": FIELDS},
            {"field-0": "Ada", "field-1": "Århus"},
            {"name": "Ada", "city": "Århus"},
        ),
        ("risk", {"kind": "risk_ack"}, {"choice": "yes", "accepted": "yes"}, "yes"),
    ],
)
def test_a_form_answers_its_question(
    visit: ConsoleVisit,
    api: Api,
    run_id: str,
    question: dict[str, Any],
    fields: Mapping[str, str],
    answer: Any,
) -> None:
    ask(api, run_id, **question)

    sent = visit.post(f"/runs/{run_id}/answer", {**visit.form_of(run_id), **fields})

    assert (sent.status, sent.headers["location"]) == (303, f"/runs/{run_id}?done=answered")
    assert answer_in(api, run_id) == answer
    assert b"Your answer is recorded." in visit.get(f"/runs/{run_id}?done=answered").body


def test_a_question_that_somebody_else_answered_says_so_and_keeps_what_was_written(
    visit: ConsoleVisit, api: Api
) -> None:
    ask(api, "late", kind="open_text")
    form = visit.form_of("late")
    api.reply("late", 1, "mine")
    api.until_ended("late")

    sent = visit.post("/runs/late/answer", {**form, "text": "what I thought"})

    assert sent.status == 409
    assert b"Somebody else answered this question before you. Your answer was not sent." in (
        sent.body
    )
    assert b"what I thought" in sent.body
    assert answer_in(api, "late") == "mine"


def test_a_form_that_is_sent_twice_answers_once(visit: ConsoleVisit, api: Api) -> None:
    ask(api, "twice", kind="open_text")
    form = {**visit.form_of("twice"), "text": "once"}

    sent = [visit.post("/runs/twice/answer", form) for _ in range(2)]

    assert [(reply.status, reply.headers["location"]) for reply in sent] == [
        (303, "/runs/twice?done=answered")
    ] * 2
    assert len(api.interactions("twice")) == 1


def test_a_form_of_another_state_of_the_run_is_refused(visit: ConsoleVisit, api: Api) -> None:
    ask(api, "stale", kind="open_text")
    form = {**visit.form_of("stale"), "etag": "another"}

    sent = visit.post("/runs/stale/answer", {**form, "text": "go"})

    assert sent.status == 409
    assert b"The run has changed meanwhile" in sent.body
    assert answer_in(api, "stale") is None


def test_an_answer_that_the_service_cannot_take_now_is_shown_again(tmp_path: Path) -> None:
    with Home(tmp_path, http_listen="127.0.0.1:0", insecure_listen=True) as home:
        service, api = home.start()
        ask(api, "later", kind="open_text")
        visit = ConsoleVisit(http_address(service))
        form = visit.form_of("later")
        with home.store(writable=True) as store:  # SQLite refuses every other write meanwhile
            store.execute("BEGIN IMMEDIATE")
            sent = visit.post("/runs/later/answer", {**form, "text": "my long answer"})

        assert sent.status == 503
        assert b"Nothing was sent." in sent.body
        assert b"my long answer" in sent.body
        assert b"data-live" not in sent.body


def test_an_empty_answer_is_refused_with_the_reason(visit: ConsoleVisit, api: Api) -> None:
    ask(api, "empty", kind="open_text")

    sent = visit.post("/runs/empty/answer", {**visit.form_of("empty"), "text": " "})

    assert (sent.status, b"Write an answer first." in sent.body) == (422, True)
    assert answer_in(api, "empty") is None


def test_a_run_is_canceled_by_its_page(visit: ConsoleVisit, api: Api) -> None:
    ask(api, "cancel-me", kind="open_text")

    sent = visit.post("/runs/cancel-me/cancel", visit.form_of("cancel-me"))

    assert (sent.status, sent.headers["location"]) == (303, "/runs/cancel-me?done=canceled")
    assert status_word(api.until_ended("cancel-me")) == "CANCELED"


def test_the_oldest_question_comes_first(visit: ConsoleVisit, api: Api) -> None:
    for name in ("first-asked", "second-asked"):
        ask(api, name, kind="open_text", prompt=f"I am {name}")

    page = visit.get("/").body

    assert 0 < page.index(b"I am first-asked") < page.index(b"I am second-asked")
