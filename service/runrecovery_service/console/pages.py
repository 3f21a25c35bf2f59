"""The pages about runs: the questions that wait, the list, and one run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, TypeAlias
from urllib.parse import quote, urlencode

import grpc
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from runrecovery_service.console.contract import Contract, reason_of
from runrecovery_service.console.output import CHANNELS, output_view
from runrecovery_service.console.questions import Draft, question_of
from runrecovery_service.console.rendering import NOTICES, WHOLE_CHARS, Renderer
from runrecovery_service.console.run_list import RunFilter, is_run_id, row_of
from runrecovery_service.console.run_view import (
    MAX_DECISIONS,
    answered_questions,
    decision_views,
    run_view,
)
from runrecovery_service.console.timeline import timeline_of
from runrecovery_service.console.visitors import Visitor, Visitors
from runrecovery_service.console.waiting import (
    version_of,
    waiting_questions,
    waiting_request,
)
from runrecovery_service.console.words import STATUS_BY_NAME
from runrecovery_service.http.calls import CallFailed, ContractCalls

SHORT_CHARS: Final = 8_000
"""The most characters of one text on a page."""
MAX_OFFSET: Final = 2**62

Page: TypeAlias = Callable[[Request, Visitor, Contract], Awaitable[Response]]
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


class Site:
    """The parts that all pages share: visitors, calls of the contract, templates."""

    def __init__(self, calls: ContractCalls, visitors: Visitors) -> None:
        self.visitors = visitors
        self.renderer = Renderer()
        self._calls = calls

    def contract_of(self, visitor: Visitor) -> Contract:
        """Return the contract as a visitor can call it."""
        return Contract(self._calls, visitor.origin)

    async def visitor_of(self, request: Request) -> Visitor | None:
        """Return the visitor, or None if the visitor must log in first."""
        visitor = self.visitors.visitor_of(request)
        if visitor is None and (token := self.visitors.token_in(request)):
            await self.record_wrong_token(request, token)
        return visitor

    async def record_wrong_token(self, request: Request, token: str) -> None:
        """Log a wrong token like that of a call. Return with a delay if there are many of them."""
        contract = Contract(self._calls, self.visitors.origin_of(request, token or "none"))
        with suppress(CallFailed):
            await contract.status()

    def page(self, respond: Page) -> Endpoint:
        """Return the endpoint of a page: visitors log in first, and failures become pages."""

        async def endpoint(request: Request) -> Response:
            visitor = await self.visitor_of(request)
            if visitor is None:
                return self._login_first(request)
            try:
                response = await respond(request, visitor, self.contract_of(visitor))
            except CallFailed as error:
                response = self.failure(visitor, error, is_form=request.method != "GET")
            self.visitors.keep_secret(response, visitor)
            return response

        return endpoint

    def failure(
        self, visitor: Visitor, error: CallFailed, *, is_form: bool, written: str = ""
    ) -> Response:
        """Return the page for a call that failed.

        Args:
            is_form: whether the call was made for a form, so that the page cannot be loaded again.
            written: the text that a person had written into the form.
        """
        status, title, advice = _FAILURES.get(error.code, _UNEXPECTED)
        is_away = error.code is grpc.StatusCode.UNAVAILABLE and not is_form
        if is_form:
            advice = "Nothing was sent. Go back, and send the form again when the cause is gone."
        return self.renderer.page(
            "failure",
            visitor,
            status,
            title=title,
            advice=advice,
            message=error.message,
            reason=reason_of(error),
            live="/live/service" if is_away else "",
            version="away" if is_away else "",
            reload_s=3 if is_away else 0,
            written=written,
        )

    def not_found(self, visitor: Visitor | None) -> Response:
        """Return the page for an address that does not exist."""
        status, title, advice = _FAILURES[grpc.StatusCode.NOT_FOUND]
        return self.renderer.page(
            "failure",
            visitor,
            status,
            title=title,
            advice=advice,
            message="",
            reason="",
            written="",
        )

    def _login_first(self, request: Request) -> Response:
        if request.method == "GET" and request.headers.get("sec-fetch-site") == "cross-site":
            # A browser sends no cookie when a person follows a link on another site. When this page
            # loads itself again, the browser sends the cookie.
            return self.renderer.page("continue", None, reload_s=1)
        there = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        query = f"?{urlencode({'next': there})}" if request.method == "GET" and there != "/" else ""
        return RedirectResponse(f"/login{query}", 303)


_UNEXPECTED: Final = (502, "The call failed", "Try again. If it fails again, look at the log.")
_FAILURES: Final = {
    grpc.StatusCode.NOT_FOUND: (
        404,
        "Not found",
        "It does not exist, retention has removed it, or it is not yours to see.",
    ),
    grpc.StatusCode.PERMISSION_DENIED: (
        403,
        "Not for your role",
        "Log in with a token of a caller who may do this.",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (401, "Your token is not valid", "Log in again."),
    grpc.StatusCode.UNAVAILABLE: (
        503,
        "The service is not ready",
        "This page loads again by itself when the service is.",
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (503, "The service is busy", "Wait a moment, and reload."),
    grpc.StatusCode.INVALID_ARGUMENT: (400, "The address is not valid", "Check the filter."),
}


class RunPages:
    """The pages about runs."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def waiting(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Show the questions that wait for a person."""
        token = request.query_params.get("page", "")
        answer = await contract.list_runs(waiting_request(token))
        following = answer.next_page_token
        return self._site.renderer.page(
            "waiting",
            visitor,
            questions=waiting_questions(answer.runs),
            next=f"/?{urlencode({'page': following})}" if following else "",
            is_first=not token,
            notice=_notice(request),
            limit=SHORT_CHARS,
            live=f"/live/waiting?{urlencode({'page': token})}",
            version=version_of(answer.runs),
        )

    async def runs(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Show a page of the list of runs."""
        wanted = RunFilter.of(request.query_params)
        run_id = request.query_params.get("run", "").strip()
        if is_run_id(run_id):
            return RedirectResponse(f"/runs/{quote(run_id)}", 303)
        token = request.query_params.get("page", "")
        answer = await contract.list_runs(wanted.request(token))
        return self._site.renderer.page(
            "runs",
            visitor,
            rows=[row_of(run) for run in answer.runs],
            filter=wanted,
            statuses=list(STATUS_BY_NAME),
            bad_id=run_id,
            next=wanted.address(page=answer.next_page_token) if answer.next_page_token else "",
            is_first=not token,
            live=wanted.address(page=token).replace("/runs", "/live/runs", 1),
            version=version_of(answer.runs),
        )

    async def run(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Show a run."""
        return await self.show_run(request, visitor, contract)

    async def show_run(
        self,
        request: Request,
        visitor: Visitor,
        contract: Contract,
        *,
        status: int = 200,
        problem: str = "",
        draft: Draft | None = None,
    ) -> Response:
        """Show a run. If a form was refused, show the problem and the draft of the form too."""
        run_id = request.path_params["run_id"]
        if not is_run_id(run_id):
            return self._site.not_found(visitor)
        query = request.query_params
        channel = query.get("channel", "") if query.get("channel") in CHANNELS else "stdout"
        start = output_offset(query.get("from"))
        # One after another, because `max_calls` can allow a caller only one call at a time.
        seen = await contract.run_events(run_id)
        questions = await contract.list_interactions(run_id)
        explained = await contract.explain(run_id)
        output = await output_view(contract, run_id, channel, start)
        now = datetime.now(UTC)
        view = run_view(seen.run, now)
        follow = (
            ""
            if view.is_ended or start is not None
            else _follow(output.attempt, channel, output.end)
        )
        return self._site.renderer.page(
            "run",
            visitor,
            status,
            run=view,
            question=question_of(seen.run),
            timeline=timeline_of(seen.events, now, is_cut=seen.is_cut),
            answered=answered_questions(questions, seen.run.pending_interaction.interaction_id),
            decisions=decision_views(explained.explanations),
            are_decisions_cut=len(explained.explanations) > MAX_DECISIONS,
            output=output,
            follow=follow,
            problem=problem,
            draft=draft or Draft(),
            notice=_notice(request),
            limit=WHOLE_CHARS if query.get("whole") else SHORT_CHARS,
            live=f"/live/runs/{run_id}",
            page="" if request.method == "GET" else f"/runs/{run_id}",
            version=str(seen.sequence),
        )


def _follow(attempt: int, channel: str, offset: int) -> str:
    return urlencode({"attempt": attempt, "channel": channel, "from": offset})


def output_offset(text: str | None) -> int | None:
    """Return the position in the output that a text names; None if it names none."""
    if not text or not text.isascii() or not text.isdecimal() or len(text) > 18:
        return None
    return min(int(text), MAX_OFFSET)


def _notice(request: Request) -> str:
    return NOTICES.get(request.query_params.get("done", ""), "")
