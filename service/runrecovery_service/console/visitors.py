"""Identifies visitors by a cookie, finds their rights, and refuses forged forms.

The cookie holds the caller's token itself. So a login works after a restart and at every replica,
and ends when the token is removed from the configuration. The service has only digests of tokens.
Any other secret in the cookie would need a key that all replicas share.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from hashlib import sha256
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from runrecovery_service.domain.caller import Caller
from runrecovery_service.domain.role import Role
from runrecovery_service.http.calls import CallOrigin
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.callers import CallerGuard

MAX_AGE_S: Final = 12 * 3600
"""How long a browser keeps the token."""
FORM_FIELD: Final = "form_token"
MAX_TOKEN_CHARS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """The sender of a request.

    Attributes:
        origin: the origin of the calls that pages make for the visitor.
        name: the name of the caller; empty if no callers are configured.
        form_token: a field of every form, by which the console recognises its own forms.
        new_secret: the value of the cookie to set for a visitor without one; otherwise empty.
    """

    origin: CallOrigin
    name: str
    can_answer: bool
    can_create: bool
    can_operate: bool
    form_token: str
    new_secret: str = ""


class Visitors:
    """Identifies visitors.

    Args:
        guard: knows the callers.
        has_tls: whether browsers send the cookies over TLS only.
        may_all_write: whether every visitor can answer and cancel if no callers are configured.
    """

    def __init__(self, guard: CallerGuard | None, *, has_tls: bool, may_all_write: bool) -> None:
        self._guard = guard
        self._has_tls = has_tls
        self._may_all_write = may_all_write
        # A browser takes a cookie with this prefix only from this very host, over TLS.
        prefix = "__Host-" if has_tls else ""
        self._token_cookie = f"{prefix}runrecovery-token"
        self._form_cookie = f"{prefix}runrecovery-form"

    @property
    def needs_login(self) -> bool:
        """True if callers are configured."""
        return self._guard is not None and bool(self._guard.table.known)

    def visitor_of(self, request: Request) -> Visitor | None:
        """Return the visitor, or None if the visitor must log in first."""
        if not self.needs_login:
            return self._anyone(request)
        token = self.token_in(request)
        caller = self.caller_of(token)
        if caller is None:
            return None
        return Visitor(
            origin=self.origin_of(request, token),
            name=caller.name,
            can_answer=caller.role >= Role.REPLIER,
            can_create=caller.role >= Role.CREATOR,
            can_operate=caller.role >= Role.OPERATOR,
            form_token=form_token(token),
        )

    def token_in(self, request: Request) -> str:
        """Return the token in the cookie of a request; empty if it has none, or none is needed."""
        return request.cookies.get(self._token_cookie, "") if self.needs_login else ""

    def caller_of(self, token: str) -> Caller | None:
        """Return the caller to whom a token belongs."""
        if self._guard is None or not token or len(token) > MAX_TOKEN_CHARS:
            return None
        return self._guard.table.of_token(token)

    def origin_of(self, request: Request, token: str) -> CallOrigin:
        """Return the origin of calls with this token, or of calls without one if it is empty."""
        client = request.client
        return CallOrigin(
            authorization=f"Bearer {token}" if token else None,
            peer=f"{client.host}:{client.port}" if client else "",
        )

    def _anyone(self, request: Request) -> Visitor:
        secret = request.cookies.get(self._form_cookie, "")
        new_secret = "" if secret else secrets.token_hex(16)
        return Visitor(
            origin=self.origin_of(request, ""),
            name="",
            can_answer=self._may_all_write,
            can_create=self._may_all_write,
            can_operate=True,
            form_token=form_token(secret or new_secret),
            new_secret=new_secret,
        )

    def keep_token(self, response: Response, token: str) -> None:
        """Set the cookie with a token."""
        self._set(response, self._token_cookie, token, MAX_AGE_S)

    def keep_secret(self, response: Response, visitor: Visitor) -> None:
        """Set the cookie with the secret for forms, for a visitor without a login."""
        if visitor.new_secret:
            self._set(response, self._form_cookie, visitor.new_secret, MAX_AGE_S)

    def forget_token(self, response: Response) -> None:
        """Delete the cookie with the token."""
        self._set(response, self._token_cookie, "", 0)

    def _set(self, response: Response, name: str, value: str, max_age_s: int) -> None:
        response.set_cookie(
            name,
            value,
            max_age=max_age_s,
            path="/",
            secure=self._has_tls,
            httponly=True,
            samesite="strict",
        )


def form_token(secret: str) -> str:
    """Return the token of a visitor's forms. No other site knows it, so none can forge a form.

    The token is derived from the cookie. So it is the same after a restart, and at every replica.
    """
    return hmac.digest(secret.encode(), b"runrecovery console form", sha256).hex()


def is_own_form(headers: Mapping[str, str], visitor: Visitor, given_token: str) -> bool:
    """Return whether a form was sent by a page of this console."""
    return is_same_origin(headers) and hmac.compare_digest(
        given_token.encode("utf-8", "replace"), visitor.form_token.encode()
    )


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a browser sent a request for a page of this console.

    A browser names the origin of a form. A request without an origin is refused: it comes from a
    program, and programs can call the contract.
    """
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin")
    if site is None and origin is None:
        return False
    if site is not None and site != "same-origin":
        return False
    return origin is None or urlsplit(origin).netloc == headers.get("host")
