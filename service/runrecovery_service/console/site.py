"""The console as an ASGI application: its addresses, and the headers of every response."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from runrecovery_service.console.actions import Actions
from runrecovery_service.console.live import Live
from runrecovery_service.console.pages import RunPages, Site
from runrecovery_service.console.rendering import STATIC
from runrecovery_service.console.service_pages import ServicePages
from runrecovery_service.console.visitors import Visitors
from runrecovery_service.http.asgi import Application, Receive, Scope, Send
from runrecovery_service.http.calls import ContractCalls
from runrecovery_service.rpc.gate import Gate

SECURITY_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none';"
        " object-src 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def build_console(calls: ContractCalls, visitors: Visitors, gate: Gate) -> Application:
    """Return the console as an ASGI application."""
    site = Site(calls, visitors)
    runs, service, live = RunPages(site), ServicePages(site), Live(site, gate)
    actions = Actions(site, runs)
    routes = [
        Route("/", site.page(runs.waiting)),
        Route("/runs", site.page(runs.runs)),
        Route("/runs/{run_id}", site.page(runs.run)),
        Route("/runs/{run_id}/answer", site.page(actions.answer), methods=["POST"]),
        Route("/runs/{run_id}/cancel", site.page(actions.cancel), methods=["POST"]),
        Route("/runs/{run_id}/reopen", site.page(actions.reopen), methods=["POST"]),
        Route("/restarts", site.page(service.restarts)),
        Route("/restarts/{report_id}", site.page(service.report)),
        Route("/plan", site.page(service.plan)),
        Route("/instances", site.page(service.instances)),
        Route("/login", actions.login_page),
        Route("/login", actions.login, methods=["POST"]),
        Route("/logout", actions.logout, methods=["POST"]),
        Route("/live/waiting", live.waiting),
        Route("/live/service", live.service),
        Route("/live/instances", live.instances),
        Route("/live/runs", live.runs),
        Route("/live/runs/{run_id}", live.run),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]

    async def on_http_error(request: Request, error: Exception) -> Response:
        visitor = await site.visitor_of(request)
        if isinstance(error, HTTPException) and error.status_code != 404:
            page = site.renderer.page("refused", visitor, error.status_code, text=error.detail)
            page.headers.update(error.headers or {})  # a 405 names the verbs that are allowed
            return page
        return site.not_found(visitor)

    app = Starlette(routes=routes, exception_handlers={HTTPException: on_http_error})
    app.router.redirect_slashes = False  # behind a proxy, it would redirect https:// to http://
    return _with_headers(app)


def _with_headers(app: Application) -> Application:
    """Add the headers that every response of the console has."""
    added = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        is_static = scope.get("path", "").startswith("/static/")

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # File names contain no version, so a browser must ask whether a file has changed.
                is_file = is_static and message["status"] in {200, 304}
                cache = (b"cache-control", b"no-cache" if is_file else b"no-store")
                message["headers"] = [*message.get("headers", []), *added, cache]
            await send(message)

        await app(scope, receive, send_with_headers)

    return serve
