"""Routes HTTP requests: calls of the contract, probes, pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, Final

import structlog

from runrecovery_service.http.asgi import (
    Application,
    ClientGone,
    Exchange,
    Receive,
    Response,
    Scope,
    Send,
    header_values,
)
from runrecovery_service.http.calls import CallOrigin, ContractCalls
from runrecovery_service.http.connect import ConnectHandler
from runrecovery_service.http.origins import OriginPolicy
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.health import NAMES

CONTRACT: Final = "/runrecovery.v1."
NO_METHOD: Final = b'{"code": "unimplemented", "message": "the contract has no such method"}\n'
TEXT: Final = b"text/plain; charset=utf-8"
CERTIFICATE: Final = "certificate"
"""Key in the state of a connection: the names in the certificate of its client."""

log = structlog.get_logger()


def call_origin(scope: Scope, *, authorization: str | None = None) -> CallOrigin:
    """Return the sender of a request.

    Args:
        authorization: used in place of the header, for callers that a cookie identifies; None: the
            header of the request is used.
    """
    given = header_values(scope, b"authorization") if authorization is None else [authorization]
    # A second value is passed on too, because a call with two values must be refused.
    more = [("authorization", value) for value in given[1:]]
    more += [("traceparent", value) for value in header_values(scope, b"traceparent")]
    host, port = scope["client"] or ("", 0)
    host = f"[{host}]" if ":" in host else host
    return CallOrigin(
        authorization=given[0] if given else None,
        peer=f"http:{host}:{port}",
        certificate=scope["state"].get(CERTIFICATE, {}),
        metadata=tuple(more),
    )


class HttpApp:
    """The application of the HTTP server.

    Args:
        max_request_bytes: the largest body of a call.
        pages: answers every path that is neither a call nor a probe; None: there are no pages.
    """

    def __init__(
        self,
        *,
        calls: ContractCalls,
        gate: Gate,
        origins: OriginPolicy,
        max_request_bytes: int,
        pages: Application | None = None,
    ) -> None:
        self._methods = calls.methods
        self._connect = ConnectHandler(calls, max_request_bytes=max_request_bytes)
        self._origins = origins
        self._pages = pages
        self._probes: Mapping[str, Callable[[], bool]] = {
            "/healthz": lambda: True,
            "/readyz": lambda: NAMES[""](gate),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        has_started = False

        async def send_noting(message: MutableMapping[str, Any]) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._route(Exchange(scope, receive, send_noting))
        except ClientGone:
            pass
        except Exception:  # nothing above this task would report the defect
            log.exception("http.defect", path=scope["path"][:200])
            if not has_started:
                await Response(500, b"internal error\n", TEXT).send(send)

    async def _route(self, exchange: Exchange) -> None:
        path: str = exchange.scope["path"]
        if response := _unclear(exchange.scope) or self._origins.refusal(exchange.scope):
            await exchange.respond(response)
        elif path.startswith(CONTRACT):
            headers = self._origins.cors_headers(exchange.scope)
            await self._call(path.removeprefix("/"), replace(exchange, headers=headers))
        elif probe := self._probes.get(path):
            await exchange.respond(_probe_response(exchange.scope["method"], serves=probe()))
        elif self._pages is not None:
            await self._pages(exchange.scope, exchange.receive, exchange.send)
        else:
            await exchange.respond(Response(404, b"no such page\n", TEXT))

    async def _call(self, path: str, exchange: Exchange) -> None:
        method = self._methods.get(path)
        if method is None:
            await exchange.respond(Response(404, NO_METHOD))
        elif response := self._origins.preflight(exchange.scope):
            await exchange.respond(response)
        else:
            await self._connect.answer(method, call_origin(exchange.scope), exchange)


def _unclear(scope: Scope) -> Response | None:
    """Return the refusal of a request that a proxy could parse differently, else None."""
    close = ((b"connection", b"close"),)
    if scope["http_version"] not in {"1.0", "1.1"}:
        return Response(505, b"only HTTP/1.1 and HTTP/1.0 are spoken\n", TEXT, close)
    if header_values(scope, b"content-length") and header_values(scope, b"transfer-encoding"):
        what = b"a request has either Content-Length or Transfer-Encoding\n"
        return Response(400, what, TEXT, close)
    return None


def _probe_response(verb: str, *, serves: bool) -> Response:
    if verb not in {"GET", "HEAD"}:
        return Response(405, b"use GET\n", TEXT, headers=((b"allow", b"GET, HEAD"),))
    return Response(200, b"ok\n", TEXT) if serves else Response(503, b"not serving\n", TEXT)
