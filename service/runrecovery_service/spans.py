"""What the service reports to a trace: spans, without any tracing library.

An object that gets a `Tracer` starts spans; while traces are off it gets none. `traces/` sends
spans to a collector. No span has an input, an output, a reply, a session handle or a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum, auto
from typing import Final, Protocol, TypeAlias

Facts: TypeAlias = Mapping[str, str | int | float | bool]

NO_FACTS: Final[Facts] = {}
TURN: Final = "turn"
"""The span of a turn. The execution ends it, or the recovery if the service ended before."""


class SpanKind(Enum):
    """Whether a span answers a call of another program."""

    INTERNAL = auto()
    SERVER = auto()


class Span(Protocol):
    """A piece of work that has begun."""

    @property
    def traceparent(self) -> str | None:
        """The context in which work below this span reports (W3C `traceparent`)."""
        ...

    def end(self, facts: Facts = NO_FACTS, *, error: str | None = None) -> None:
        """End the span. A span that has ended is left as it is.

        Args:
            error: the kind of the failure, a word of few values.
        """
        ...


class Tracer(Protocol):
    """Starts spans. It may be used by every thread, never waits, and never raises."""

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
            started_at: None: now.
            key: the same key gives the same span, whoever starts it. It may be a secret: only a
                digest of it is sent. None: the span is a new one.
        """
        ...

    async def stop(self) -> None:
        """Send the spans that have ended, for a bounded time."""
        ...


def turn_facts(*, run_id: str, engine: str, attempt: int, turn: int) -> dict[str, str | int]:
    """Return the facts of every span of a turn."""
    return {
        "runrecovery.run_id": run_id,
        "runrecovery.engine": engine,
        "runrecovery.attempt": attempt,
        "runrecovery.turn": turn,
    }
