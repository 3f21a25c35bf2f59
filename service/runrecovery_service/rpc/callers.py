"""Identifies the caller of each request, and checks whether the caller may send it.

A call carries a bearer token as metadata, or comes on a connection with a certificate. If a call
has a token, only the token counts: a call with a wrong token is refused, whatever its certificate.

Tokens are compared by their SHA-256, in constant time. The keys of the lookup also depend on a
random key of this process, so that the time of a lookup shows nothing about the stored digests.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from hashlib import blake2b, sha256
from typing import Any, Final, TypeAlias

import grpc
import structlog

from runrecovery_service.domain.caller import ANYONE, NOBODY, Caller, Credentials, token_problem
from runrecovery_service.domain.errors import CallerOverloaded, CallerUnknown, Denied
from runrecovery_service.domain.role import Role
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc import errors
from runrecovery_service.rpc.refusal_pace import Rate, RefusalPace

AUTHORIZATION: Final = "authorization"
LOG_INTERVAL_S: Final = 60.0
"""The interval in which refused calls of one caller are logged once, with their number."""
CHANGED: Final = "the caller of the call was removed or changed; call again"

CALLER: Final[ContextVar[Caller]] = ContextVar("caller", default=NOBODY)
"""The caller of the call that the present task handles. gRPC makes a task for each call."""


def caller_name() -> str | None:
    """Return the name of the present caller; None where no callers are configured."""
    return CALLER.get().name or None


Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

log = structlog.get_logger()


class CallerTable:
    """All callers, by token and by certificate. A change makes a new table.

    A table without callers admits everyone, as `ANYONE`.

    Attributes:
        known: the credentials that the table was made of.
    """

    def __init__(self, known: Iterable[Credentials]) -> None:
        self.known = tuple(known)
        self._key = secrets.token_bytes(32)
        self._by_token: dict[bytes, tuple[bytes, Caller]] = {}
        self._by_certificate: dict[str, Caller] = {}
        self._strong: set[bytes] = set()
        for each in self.known:
            for digest in each.tokens:
                self._by_token[self._place(digest)] = (digest, each.caller)
            if each.certificate_name is not None:
                self._by_certificate[each.certificate_name] = each.caller

    @property
    def reads_certificates(self) -> bool:
        """True if a certificate identifies some caller."""
        return bool(self._by_certificate)

    def of_token(self, token: str) -> Caller | None:
        """Return the caller with this token. A malformed, weak or empty token belongs to no caller.

        This is checked here as well, because a configured digest does not show how weak its token
        is. Each token is checked once: the check takes as long as the rest of this method.
        """
        digest = sha256(token.encode()).digest()
        found = self._by_token.get(self._place(digest))
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        if digest not in self._strong:
            if token_problem(token) is not None:
                return None
            self._strong.add(digest)
        return found[1]

    def of_certificate(self, names: Mapping[str, Iterable[bytes]]) -> Caller | None:
        """Return the caller by the names in a certificate, as gRPC gives them.

        The common name counts only in a certificate without URIs and DNS names, because an
        authority may let applicants choose it. Only a URI is compared with a name like a URI.

        Raises:
            CallerUnknown: the certificate names more than one caller.
        """
        uris, hosts = names.get("peer_uri", ()), names.get("peer_dns", ())
        others = hosts if uris or hosts else names.get("x509_common_name", ())
        given = [_text(uri) for uri in uris]
        given += [name for name in map(_text, others) if "://" not in name]
        found = {self._by_certificate[name] for name in given if name in self._by_certificate}
        if len(found) > 1:
            raise CallerUnknown("the certificate of the call names more than one caller")
        return found.pop() if found else None

    def _place(self, digest: bytes) -> bytes:
        return blake2b(digest, key=self._key, digest_size=16).digest()


@dataclass(slots=True, eq=False)
class _OpenStream:
    """A stream, its caller, and the timeout by which the guard ends the stream, once at most."""

    context: Context
    caller: Caller
    limit: asyncio.Timeout
    is_ended: bool = False


class CallerGuard:
    """Admits calls. Use it on the event loop."""

    def __init__(
        self,
        table: CallerTable,
        *,
        log_interval_s: float = LOG_INTERVAL_S,
        pace: RefusalPace | None = None,
    ) -> None:
        """Make the guard.

        Args:
            log_interval_s: how often refused calls of one caller are logged.
            pace: delays refusals; None: a `RefusalPace` with its defaults.
        """
        self._table = table
        self._in_progress: Counter[str] = Counter()
        self._rates: dict[str, Rate] = {}
        self._pace = pace or RefusalPace()
        self._streams: set[_OpenStream] = set()
        self._refusals = RefusalLog(log_interval_s)

    @property
    def table(self) -> CallerTable:
        """The callers."""
        return self._table

    def now_s(self) -> float:
        """Return the time by which the calls in a second are counted."""
        return asyncio.get_running_loop().time()

    def replace_table(self, table: CallerTable) -> None:
        """Admit the callers of another table from now on.

        A stream ends if its caller was removed or has other rights now, or if its token or
        certificate no longer belongs to its caller. Calls with one response finish.
        """
        self._table = table
        self._rates.clear()  # the other table can have other rates
        now_s = asyncio.get_running_loop().time()
        for stream in self._streams:
            if stream.is_ended:  # its handler can still be running
                continue
            try:
                is_kept = self._identify(stream.context).has_rights_of(stream.caller)
            except CallerUnknown:
                is_kept = False
            if not is_kept:
                stream.is_ended = True
                stream.limit.reschedule(now_s)

    @asynccontextmanager
    async def while_admitted(self, context: Context, caller: Caller) -> AsyncIterator[None]:
        """Let a stream continue until another table ends it.

        Raises:
            CallerUnknown: another table has ended the stream.
        """
        limit = asyncio.timeout(None)
        stream = _OpenStream(context, caller, limit)
        try:
            async with limit:
                self._streams.add(stream)
                yield
        except TimeoutError:
            if not stream.is_ended:
                raise
            raise CallerUnknown(CHANGED) from None
        finally:
            self._streams.discard(stream)

    async def admit(self, context: Context, method: str, needed: Role) -> Caller:
        """Admit a call: return its caller, and set `CALLER` of this task. Otherwise end the call.

        Call `release` afterwards. There are three reasons to end the call: neither its token nor
        its certificate belongs to a caller; the caller's role is less than `needed`; or the caller
        has reached a limit of its own.
        """
        try:
            caller = self._identify(context)
            caller.demand_role(needed)
            self._demand_room(caller, counts=True)
        except (CallerUnknown, Denied, CallerOverloaded) as error:
            self.record_refusal(context, method, error)
            await self.pace_refusal("" if isinstance(error, CallerUnknown) else error.caller)
            status = errors.status_of(error)
            await context.abort(status.code, status.message, trailing_metadata=status.trailers)
        CALLER.set(caller)
        self._in_progress[caller.name] += 1
        return caller

    def would_admit(self, context: Context, needed: Role) -> bool:
        """Return whether `admit` would return a caller now. Count no call."""
        try:
            caller = self._identify(context)
            caller.demand_role(needed)
            self._demand_room(caller, counts=False)
        except (CallerUnknown, Denied, CallerOverloaded):
            return False
        return True

    def record_refusal(
        self, context: Context, method: str, error: CallerUnknown | Denied | CallerOverloaded
    ) -> None:
        """Log a refused call, or count it for the next line about this caller."""
        name = "" if isinstance(error, CallerUnknown) else error.caller
        self._refusals.record(name, method=method, peer=context.peer(), reason=str(error))

    async def pace_refusal(self, caller: str) -> None:
        """Wait until a refusal of the caller is to be answered: for longer if there are many."""
        await self._pace.wait(caller)

    def end_waiting(self) -> None:
        """Answer waiting refusals now, and later ones at once: the server stops."""
        self._pace.end()

    def log_refusals(self) -> None:
        """Log now the refused calls that would be logged at the end of a minute."""
        self._refusals.flush()

    def release(self, caller: Caller) -> None:
        """Record that a call of the caller has ended."""
        self._in_progress[caller.name] -= 1

    def _demand_room(self, caller: Caller, *, counts: bool) -> None:
        if caller.max_calls is not None and self._in_progress[caller.name] >= caller.max_calls:
            raise CallerOverloaded(caller.name, limit="calls in progress")
        if caller.max_calls_per_s is not None:
            rate = self._rates.get(caller.name)
            if rate is None:
                rate = Rate(caller.max_calls_per_s, burst=caller.max_calls_per_s)
                self._rates[caller.name] = rate
            now_s = self.now_s()
            if rate.wait_s(now_s):
                raise CallerOverloaded(caller.name, limit="calls in a second")
            if counts:
                rate.take(now_s)

    def _identify(self, context: Context) -> Caller:
        table = self._table
        if not table.known:
            return ANYONE
        given = [
            value for key, value in context.invocation_metadata() or () if key == AUTHORIZATION
        ]
        if not given:
            names = context.auth_context() if table.reads_certificates else {}
            caller = table.of_certificate(names)
            if caller is None:
                raise CallerUnknown("the call has no token, and its caller is not known otherwise")
            return caller
        if len(given) > 1:
            raise CallerUnknown("the call has more than one authorization")
        scheme, _, token = _text(given[0]).partition(" ")
        caller = table.of_token(token) if scheme.lower() == "bearer" else None
        if caller is None:
            raise CallerUnknown("the token of the call is not valid")
        return caller


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


class RefusalLog:
    """Logs refused calls: of one caller, or of all unknown ones, at most once in `interval_s`."""

    def __init__(self, interval_s: float = LOG_INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._waiting: dict[str, asyncio.TimerHandle] = {}
        self._calls: Counter[str] = Counter()
        self._latest: dict[str, dict[str, str]] = {}

    def record(self, caller: str, **facts: str) -> None:
        """Log a refused call, or count it for the line that ends the present interval."""
        self._calls[caller] += 1
        self._latest[caller] = facts
        if caller not in self._waiting:
            self._write(caller)

    def flush(self) -> None:
        """Log the calls that are counted and not logged yet."""
        for caller in list(self._calls):
            self._waiting.pop(caller).cancel()
            self._write(caller)

    def _end_interval(self, caller: str) -> None:
        del self._waiting[caller]
        if caller in self._calls:
            self._write(caller)

    def _write(self, caller: str) -> None:
        self._waiting[caller] = asyncio.get_running_loop().call_later(
            self._interval_s, self._end_interval, caller
        )
        calls, facts = self._calls.pop(caller), self._latest.pop(caller)
        log.warning("rpc.call_refused", caller=caller, calls=calls, **facts)
