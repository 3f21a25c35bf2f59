"""Callers: who sends a request, and which rights the sender has."""

from __future__ import annotations

import math
import re
from dataclasses import field, replace
from hashlib import sha256
from typing import Final

from runrecovery_service.domain.errors import EngineNotAllowed, RoleNotSufficient, RunNotFound
from runrecovery_service.domain.role import Role
from runrecovery_service.lazy_dataclass import dataclass

MIN_TOKEN_BITS: Final = 128
MIN_DISTINCT_CHARS: Final = 8
"""The fewest different characters of a random token; `aaaa…` and `12341234…` have fewer."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""The characters of RFC 6750."""
_ALPHABETS: Final = (
    (re.compile(r"[0-9]*"), 10),
    (re.compile(r"[0-9a-f]*|[0-9A-F]*"), 16),
    (re.compile(r"[0-9a-z]*|[0-9A-Z]*"), 36),
)


NO_TOKEN_DIGEST: Final = sha256(b"").hexdigest()
"""The SHA-256 of an empty text. In a configuration, it comes from an empty token file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One caller of the service.

    Attributes:
        name: recorded with everything that the caller changes.
        engines: the engines whose runs the caller is allowed to create, see and change. None: all.
        max_calls: calls and streams of the caller at one time. None: only the service has limits.
        max_calls_per_s: calls and streams that the caller can begin in a second. None: no limit.
    """

    name: str
    role: Role
    engines: frozenset[str] | None = None
    max_calls: int | None = None
    max_calls_per_s: int | None = None

    def demand_role(self, needed: Role) -> None:
        """Raise RoleNotSufficient unless the caller's role includes the needed role."""
        if self.role < needed:
            raise RoleNotSufficient(self.name, role=self.role.name, needed=needed.name)

    def has_rights_of(self, other: Caller) -> bool:
        """Return whether both callers have the same name and rights. Limits are not compared."""
        return self._without_limits() == other._without_limits()

    def sees(self, engine: str) -> bool:
        """Return whether the caller is allowed to see the runs of this engine."""
        return self.engines is None or engine in self.engines

    def demand_engine(self, engine: str) -> None:
        """Raise EngineNotAllowed unless the caller is allowed to create runs of this engine."""
        if not self.sees(engine):
            raise EngineNotAllowed(self.name, engine)

    def demand_visible(self, run_id: str, engine: str) -> None:
        """Raise RunNotFound, as for a missing run, unless the caller is allowed to see the run."""
        if not self.sees(engine):
            raise RunNotFound(run_id)

    def _without_limits(self) -> Caller:
        return replace(self, max_calls=None, max_calls_per_s=None)


ANYONE: Final = Caller(name="", role=Role.OPERATOR)
"""The caller of every request where no callers are configured."""

NOBODY: Final = Caller(name="", role=Role.VIEWER, engines=frozenset(), max_calls=0)
"""The caller of a call whose sender is not known, or not known yet. It sees no run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The tokens and the certificate name by which a caller is recognised.

    Attributes:
        tokens: the SHA-256 of each token.
        certificate_name: a URI or DNS name of the caller's certificate, or the common name of a
            certificate that has neither.
    """

    caller: Caller
    tokens: tuple[bytes, ...] = field(default=(), repr=False)
    certificate_name: str | None = None


def token_problem(token: str) -> str | None:
    """Return why a token is refused, or None for a good token. The text never quotes the token.

    No check can tell that a token is random. But a token of its length, in the kinds of characters
    that it uses, must be able to have `MIN_TOKEN_BITS`.
    """
    if not _TOKEN.fullmatch(token):
        return "must be one line of letters, digits and -._~+/="
    alphabet = next((size for chars, size in _ALPHABETS if chars.fullmatch(token)), 64)
    bits = len(token.rstrip("=")) * math.log2(alphabet)
    if bits < MIN_TOKEN_BITS or len(set(token)) < MIN_DISTINCT_CHARS:
        return f"must have at least {MIN_TOKEN_BITS} random bits, for example 32 hexadecimal digits"
    return None
