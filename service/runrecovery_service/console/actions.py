"""Handles forms: answer, cancel, reopen, log in and out. Each response leads back to a page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import grpc
from runrecovery.v1 import run_pb2
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from runrecovery_service.console.contract import Contract
from runrecovery_service.console.forms import read_form
from runrecovery_service.console.pages import RunPages, Site
from runrecovery_service.console.questions import AnswerProblem, Draft, answer_of
from runrecovery_service.console.run_list import is_run_id
from runrecovery_service.console.visitors import FORM_FIELD, Visitor, is_own_form, is_same_origin
from runrecovery_service.http.calls import CallFailed
from runrecovery_service.rpc.json_values import InvalidJson, read_value

FORGED: Final = (
    "This form was not sent by a page of the console, or the page was too old. Reload it."
)
READ_ONLY: Final = "You may read here, but not change anything."

Change: TypeAlias = Callable[[str, str], Awaitable[None]]


_CHANGED: Final = {grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION}
"""The codes of a call that came too late, because the run has changed."""


_WRITTEN: Final = frozenset({"text", "reason", "input", *(f"field-{at}" for at in range(100))})
"""The fields of a question's form in which a person writes."""


class Actions:
    """The endpoints to which forms are sent."""

    def __init__(self, site: Site, pages: RunPages) -> None:
        self._site = site
        self._pages = pages

    async def answer(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Answer the open question of a run."""
        given = await read_form(request)
        if refused := self._refusal(request, visitor, given, may=visitor.can_answer):
            return refused
        run_id = request.path_params["run_id"]
        if not is_run_id(run_id):
            return self._site.not_found(visitor)
        try:
            await _send_answer(contract, run_id, given)
        except AnswerProblem as problem:
            return await self._again(request, visitor, contract, 422, problem.text, given)
        except CallFailed as error:
            if error.code is grpc.StatusCode.INVALID_ARGUMENT:
                return await self._again(request, visitor, contract, 422, error.message, given)
            if error.code not in _CHANGED:
                written = "\n".join(text for name, text in given.items() if name in _WRITTEN)
                return self._site.failure(visitor, error, is_form=True, written=written)
            late = await _late_answer(contract, run_id, given)
            if late is not None:
                return await self._again(request, visitor, contract, 409, late, given)
        there = "/" if given.get("back") == "/" else f"/runs/{run_id}"
        return RedirectResponse(f"{there}?done=answered", 303)

    async def cancel(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Cancel a run."""
        given = await read_form(request)
        if refused := self._refusal(request, visitor, given, may=visitor.can_answer):
            return refused
        return await self._change(request, visitor, contract, given, contract.cancel, "canceled")

    async def reopen(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Reopen a run."""
        given = await read_form(request)
        if refused := self._refusal(request, visitor, given, may=visitor.can_create):
            return refused
        return await self._change(request, visitor, contract, given, contract.reopen, "reopened")

    async def _change(
        self,
        request: Request,
        visitor: Visitor,
        contract: Contract,
        given: Mapping[str, str],
        change: Change,
        done: str,
    ) -> Response:
        run_id = request.path_params["run_id"]
        if not is_run_id(run_id):
            return self._site.not_found(visitor)
        try:
            await change(run_id, given.get("etag", ""))
        except CallFailed as error:
            if error.code not in _CHANGED:
                raise
            text = "The run has changed meanwhile. Look at it again first."
            if error.code is grpc.StatusCode.FAILED_PRECONDITION:
                text = error.message
            return await self._again(request, visitor, contract, 409, text, given)
        return RedirectResponse(f"/runs/{run_id}?done={done}", 303)

    async def _again(
        self,
        request: Request,
        visitor: Visitor,
        contract: Contract,
        status: int,
        problem: str,
        given: Mapping[str, str],
    ) -> Response:
        """Show the run again, with an error message and the text that the person had written."""
        draft = Draft({name: text for name, text in given.items() if name != FORM_FIELD})
        return await self._pages.show_run(
            request, visitor, contract, status=status, problem=problem, draft=draft
        )

    def _refusal(
        self, request: Request, visitor: Visitor, given: Mapping[str, str], *, may: bool
    ) -> Response | None:
        if not is_own_form(request.headers, visitor, given.get(FORM_FIELD, "")):
            return self._site.renderer.page("refused", visitor, 403, text=FORGED)
        if not visitor.name and not may:  # with callers, the call itself is refused
            return self._site.renderer.page("refused", visitor, 403, text=READ_ONLY)
        return None

    async def login_page(self, request: Request) -> Response:
        """Ask for a token."""
        if not self._site.visitors.needs_login:
            return RedirectResponse("/", 303)
        following = local_path(request.query_params.get("next", ""))
        return self._site.renderer.page("login", None, next=following, problem="")

    async def login(self, request: Request) -> Response:
        """Put the token into a cookie, if it belongs to a caller."""
        given = await read_form(request)
        following = local_path(given.get("next", ""))
        if not is_same_origin(request.headers):
            return self._site.renderer.page("refused", None, 403, text=FORGED)
        token = given.get("token", "").strip()
        visitors = self._site.visitors
        if visitors.caller_of(token) is None:
            await self._site.record_wrong_token(request, token)
            problem = "No caller has this token."
            return self._site.renderer.page("login", None, 401, next=following, problem=problem)
        response = RedirectResponse(following, 303)
        visitors.keep_token(response, token)
        return response

    async def logout(self, request: Request) -> Response:
        """Delete the cookie with the token."""
        if not is_same_origin(request.headers):
            return self._site.renderer.page("refused", None, 403, text=FORGED)
        response = RedirectResponse("/login", 303)
        self._site.visitors.forget_token(response)
        return response


async def _send_answer(contract: Contract, run_id: str, given: Mapping[str, str]) -> None:
    """Answer the open question of a run.

    Raises:
        AnswerProblem: the form is incomplete.
        CallFailed: the call failed, or the question of the form is not open any more.
    """
    run = await contract.get_run(run_id)
    pending = run.pending_interaction
    if str(pending.interaction_id) != given.get("interaction_id"):
        raise CallFailed(grpc.StatusCode.FAILED_PRECONDITION, "another question is open, or none")
    await contract.reply(
        run_id, pending.interaction_id, answer_of(pending, given), given.get("etag", "")
    )


async def _late_answer(contract: Contract, run_id: str, given: Mapping[str, str]) -> str | None:
    """Return why an answer came too late; None if the same answer was accepted before."""
    for question in await contract.list_interactions(run_id):
        if str(question.interaction_id) != given.get("interaction_id"):
            continue
        if question.auto_decided:
            return "Your answer came too late: the question was decided automatically."
        if question.HasField("replied_at"):
            if _is_same_answer(question, given):
                return None
            who = question.replied_by or "Somebody else"
            return f"{who} answered this question before you. Your answer was not sent."
    return "The run has changed meanwhile, so your answer was not sent. Look at it again first."


def _is_same_answer(question: run_pb2.Interaction, given: Mapping[str, str]) -> bool:
    """Return whether the accepted answer is that of this form, which a browser can send twice."""
    asked = run_pb2.PendingInteraction(kind=question.kind, options=question.options)
    if question.HasField("tool_call"):
        asked.tool_call.CopyFrom(question.tool_call)
    try:
        return answer_of(asked, given) == read_value(question.response)
    except (AnswerProblem, InvalidJson):
        return False


def local_path(text: str) -> str:
    """Return the text if it is a path of this console, else `/`, so that no link leads away."""
    parts = urlsplit(text)
    is_local = text.startswith("/") and not text.startswith(("//", "/\\")) and not parts.netloc
    return text if is_local and text.isprintable() and not parts.scheme else "/"
