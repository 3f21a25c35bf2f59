"""The tokens and the cost of an agent's model calls, as the agent reported them."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Final

from runrecovery_service.domain.storable_text import is_storable
from runrecovery_service.lazy_dataclass import dataclass

MAX_TOKENS: Final = 10**12
"""The most tokens that one report can have; sums of reports fit 64 bits."""
MAX_COST_USD: Final = 10_000.0
MAX_MODEL_CHARS: Final = 200
MAX_BUDGET_TOKENS: Final = 10**15
MAX_BUDGET_USD: Final = 1e9
NANOS: Final = 10**9


class InvalidUsage(ValueError):
    """A report has an impossible number. The text names the number, and quotes no part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens and cost, of a process, a turn, a run or an engine.

    Attributes:
        input_tokens: every token that the model read, the cached ones included.
        cached_input_tokens: the part of `input_tokens` that was read from the prompt cache.
        cache_write_input_tokens: the part of `input_tokens` that was written to the prompt cache.
        output_tokens: every token that the model wrote, its reasoning included.
        reasoning_output_tokens: the part of `output_tokens` that was reasoning.
        cost_nanos: 10⁻⁹ US dollars. None: no cost was reported.
        model: as the agent named it; empty: not named.
    """

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_input_tokens: int = 0
    output_tokens: int = 0
    reasoning_output_tokens: int = 0
    cost_nanos: int | None = None
    model: str = ""

    @property
    def total_tokens(self) -> int:
        """Return the tokens that a limit counts: the whole input and the whole output."""
        return self.input_tokens + self.output_tokens

    @property
    def fits_report(self) -> bool:
        """True if one report can have these tokens."""
        return max(self.input_tokens, self.output_tokens) <= MAX_TOKENS

    @property
    def cost_usd(self) -> float | None:
        """The cost in US dollars; None: no cost was reported."""
        return None if self.cost_nanos is None else self.cost_nanos / NANOS

    def plus(self, more: Usage) -> Usage:
        """Return the sum of both usages, with the model of `more` if `more` has one."""
        return self._combine(more, 1)

    def minus(self, part: Usage) -> Usage:
        """Return this usage without `part`. Numbers of the result can be negative.

        The result has the model of this usage.
        """
        return replace(self._combine(part, -1), model=self.model)

    def at_least(self, floor: Usage) -> Usage:
        """Return, for each number, the greater one of this usage and `floor`. The model stays."""
        costs = [cost for cost in (self.cost_nanos, floor.cost_nanos) if cost is not None]
        tokens = {name: max(getattr(self, name), getattr(floor, name)) for name in TOKEN_FIELDS}
        cost = max(costs, default=None)
        return Usage(**tokens, cost_nanos=cost, model=self.model or floor.model)

    def covers(self, part: Usage) -> bool:
        """Return True if no number of `part` is greater than the same number of this usage."""
        rest = self.minus(part)
        numbers: list[int] = [getattr(rest, name) for name in TOKEN_FIELDS]
        return min(*numbers, rest.cost_nanos or 0) >= 0

    def _combine(self, other: Usage, sign: int) -> Usage:
        costs = [self.cost_nanos, other.cost_nanos]
        tokens = {name: getattr(self, name) + sign * getattr(other, name) for name in TOKEN_FIELDS}
        return Usage(
            **tokens,
            cost_nanos=None if costs == [None, None] else (costs[0] or 0) + sign * (costs[1] or 0),
            model=other.model or self.model,
        )


TOKEN_FIELDS: Final = tuple(field.name for field in fields(Usage) if field.name.endswith("_tokens"))


def usage_of(
    *,
    input_tokens: object,
    output_tokens: object,
    cached: object = 0,
    cache_write: object = 0,
    reasoning: object = 0,
    cost_usd: object = None,
    model: object = "",
) -> Usage:
    """Return the usage that an agent reported. All parts are checked: an agent can send anything.

    Raises:
        InvalidUsage: a number is missing, negative, too large or not a number, or a part is larger
            than its whole.
    """
    usage = Usage(
        input_tokens=_tokens("input_tokens", input_tokens),
        cached_input_tokens=_tokens("cached_input_tokens", cached),
        cache_write_input_tokens=_tokens("cache_write_input_tokens", cache_write),
        output_tokens=_tokens("output_tokens", output_tokens),
        reasoning_output_tokens=_tokens("reasoning_output_tokens", reasoning),
        cost_nanos=_cost_nanos(cost_usd),
        model=_model(model),
    )
    if usage.cached_input_tokens + usage.cache_write_input_tokens > usage.input_tokens:
        raise InvalidUsage("cached tokens are more than input_tokens, which includes them")
    if usage.reasoning_output_tokens > usage.output_tokens:
        raise InvalidUsage("reasoning tokens are more than output_tokens, which includes them")
    return usage


def _tokens(name: str, value: object) -> int:
    if value is None:
        raise InvalidUsage(f"{name} is missing")
    if isinstance(value, float) and value.is_integer():  # also False of NaN and infinity
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidUsage(f"{name} is not a whole number")
    if not 0 <= value <= MAX_TOKENS:
        raise InvalidUsage(f"{name} is not from 0 to {MAX_TOKENS}")
    return value


def _cost_nanos(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidUsage("cost_usd is not a number")
    if not 0 <= value <= MAX_COST_USD or math.isnan(value):
        raise InvalidUsage(f"cost_usd is not from 0 to {MAX_COST_USD:g}")
    return round(value * NANOS)


def _model(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_MODEL_CHARS or not is_storable(value):
        raise InvalidUsage(f"model is not a text of at most {MAX_MODEL_CHARS} characters")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionUsage:
    """The usage of a session so far. Some CLIs report the total of the session, not of one process.

    Attributes:
        total: the latest total that a process of the session reported; None: no total yet.
        calls: the usage of later turns that were cut off before they reported a total. This usage
            has been counted. The next total either includes it or not, and it must not count twice.
        stored: the usage of all calls that the session file had at the end of the latest turn.
            None: not known.
    """

    total: Usage | None = None
    calls: Usage | None = None
    stored: Usage | None = None

    def plus_calls(self, calls: Usage) -> SessionUsage:
        """Return a copy with the calls of one more turn that was cut off."""
        return replace(self, calls=calls if self.calls is None else self.calls.plus(calls))

    def since(self, total: Usage, *, at_least: Usage | None = None) -> Usage:
        """Return the usage of the next process alone, which has reported `total`.

        If `total` is the total of the session, return its increase since the session's latest
        total, without `calls`, which were counted before. Return at least `at_least`.

        If the increase is negative or below `at_least`, `total` cannot be the total of the session.
        Then it is the total of the process alone, so return `total` itself.

        Args:
            at_least: the usage that the process certainly had; None: not known.
        """
        least = at_least or Usage()
        part = total.minus(self.total or Usage())
        if not part.covers(least):
            return total
        return part if self.calls is None else part.minus(self.calls).at_least(least)

    def before(self, turn: Usage) -> SessionUsage:
        """Return the usage of the session before a turn, whose usage this object includes."""
        calls = self.calls or Usage()
        if calls.covers(turn):
            left = calls.minus(turn)
            return replace(self, calls=left if left.total_tokens else None)
        return replace(self, total=(self.total or Usage()).plus(calls).minus(turn), calls=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnUsage:
    """The usage of a turn so far.

    Attributes:
        turn: the usage since the start of the turn's process.
        session: the new usage of the session, for the next process; None: it has not changed.
    """

    turn: Usage
    session: SessionUsage | None = None

    @property
    def is_of_session(self) -> bool:
        """True if only the session's usage is new: no call of the turn is known."""
        return replace(self.turn, model="") == Usage() and self.session is not None

    @property
    def is_of_calls(self) -> bool:
        """True if the agent reported single calls of the turn, and no total after these calls."""
        return self.session is not None and self.session.calls is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUsage:
    """The usage of the calls that are in a session file.

    Attributes:
        calls: the usage of all calls since the session began.
        total: the total of the session, to which the next process will add its usage. None: the CLI
            reports the usage of each process alone, or the total is not certain (`is_open`).
        is_open: whether it is not known if the next total will include the calls of killed turns.
    """

    calls: Usage
    total: Usage | None = None
    is_open: bool = False

    def lacks_calls(self, before: SessionUsage | None) -> bool:
        """Return True if the file had more calls `before`, so that it was changed or replaced."""
        known = None if before is None else before.stored
        return known is not None and not self.calls.covers(known)


def at_end_of_turn(
    reported: TurnUsage | None,
    stored: StoredUsage | None,
    *,
    before: SessionUsage | None,
    is_first: bool,
) -> TurnUsage | None:
    """Return the usage of a turn that has ended.

    A total that the agent reported counts as it is. Without a total, the calls that were added to
    the session file in this turn count, but at least the usage that the agent reported. If the file
    has fewer calls than before, only the reported usage counts.

    Args:
        reported: the report of the agent: a total, or single calls if the agent was killed; None:
            no report.
        stored: the usage in the session file; None: the file could not be read.
        before: the usage of the session when the turn began; None: not known.
        is_first: whether the session began in this turn.
    """
    session = (reported and reported.session) or before or SessionUsage()
    least = Usage() if reported is None else reported.turn
    if stored is None:
        if reported is None and session.stored is None:
            return None
        return TurnUsage(turn=least, session=replace(session, stored=None))
    if reported is not None and not reported.is_of_calls:
        return TurnUsage(turn=least, session=replace(session, stored=stored.calls))
    known = Usage() if is_first else session.stored
    gained = Usage() if known is None else stored.calls.minus(known)
    turn = (gained if gained.covers(Usage()) else Usage()).at_least(least)
    calls = session.calls
    if stored.is_open and turn.total_tokens:
        calls = turn if calls is None else calls.plus(turn.minus(least))
    total = session.total if stored.total is None else stored.total
    return TurnUsage(turn=turn, session=SessionUsage(total=total, calls=calls, stored=stored.calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limits on the usage of a run. None: no limit."""

    max_tokens: int | None = None
    max_cost_nanos: int | None = None

    @property
    def max_cost_usd(self) -> float | None:
        """The limit of the cost in US dollars; None: no limit."""
        return None if self.max_cost_nanos is None else self.max_cost_nanos / NANOS

    def narrowed(self, wanted: Budget) -> Budget:
        """Return the limits of `wanted`, completed by the limits of this budget."""
        tokens, cost = wanted.max_tokens, wanted.max_cost_nanos
        return Budget(
            max_tokens=self.max_tokens if tokens is None else tokens,
            max_cost_nanos=self.max_cost_nanos if cost is None else cost,
        )

    def why_used_up(self, used: Usage | None) -> str | None:
        """Return a sentence that names the reached limit, or None if no limit is reached."""
        if used is None:
            return None
        if self.max_tokens is not None and used.total_tokens >= self.max_tokens:
            return f"The run has used {used.total_tokens} of its {self.max_tokens} tokens."
        cost, most = used.cost_usd or 0.0, self.max_cost_usd
        if most is not None and cost >= most:
            return f"The run has cost {cost:.6f} of its {most:.6f} US dollars."
        return None

    def why_used_up_by(self, used: TurnUsage | None, *, before: Usage | None) -> str | None:
        """Return a sentence about the limit that a turn under way has reached, or None.

        Args:
            used: the usage of the turn so far; None: none was reported.
            before: the usage of the run when the turn began; None: none was reported.
        """
        if used is None:
            return self.why_used_up(before)
        return self.why_used_up(used.turn if before is None else before.plus(used.turn))


UNLIMITED: Final = Budget()


def cost_to_nanos(usd: float) -> int:
    """Return US dollars in 10⁻⁹ US dollars, at least 1: a limit of 0 would be no limit."""
    return max(1, round(usd * NANOS))
