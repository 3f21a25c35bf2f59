"""The interface of tracing: `Tracer` and `Span`, without any tracing library.

An object that reports spans gets a `Tracer`, or None if traces are off. `traces/` implements both
protocols and sends spans to a collector. No span contains an input, an output, a reply, a session
handle or a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum, auto
from typing import Final, Protocol, TypeAlias

Facts: TypeAlias = Mapping[str, str | int | float | bool]

NO_FACTS: Final[Facts] = {}
TURN: Final = "turn"
"""The name of a turn's span. If the service dies during the turn, recovery ends the span."""


class SpanKind(Enum):
    """SERVER: the span answers a call of another program. INTERNAL: all others."""

    INTERNAL = auto()
    SERVER = auto()


class Span(Protocol):
    """One operation under way."""

    @property
    def traceparent(self) -> str | None:
        """The W3C `traceparent` that makes other spans children of this one."""
        ...

    def end(self, facts: Facts = NO_FACTS, *, error: str | None = None) -> None:
        """End the span. A second call has no effect.

        Args:
            error: the kind of the failure, from a small fixed set; None: no failure.
        """
        ...


class Tracer(Protocol):
    """Starts spans. Thread-safe. `start` never blocks and never raises."""

    def start(
        self,
        name: str,
        parent: str | None,
        facts: Facts = NO_FACTS,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        started_at: datetime | None = None,
        key: str | None = None,
    ) -> Span:
        """Return a new span.

        Args:
            parent: a W3C `traceparent`; None: the span begins a trace.
            started_at: when the operation began; None: now.
            key: determines the ids of the span, so that another process can report the same span.
                The key can be secret, because only a digest is sent. None: random ids.
        """
        ...

    async def stop(self) -> None:
        """Send the spans that have ended; drop those left after a time limit."""
        ...


def turn_facts(*, run_id: str, engine: str, attempt: int, turn: int) -> dict[str, str | int]:
    """Return the attributes that every span of a turn has."""
    return {
        "runrecovery.run_id": run_id,
        "runrecovery.engine": engine,
        "runrecovery.attempt": attempt,
        "runrecovery.turn": turn,
    }
