"""What one output event of an agent CLI can mean. Each CLI's own module reads its events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from runrecovery_service.domain.run import JsonObject


@dataclass(frozen=True, slots=True)
class SessionNamed:
    """The CLI named the handle of its session."""

    handle: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TextWritten:
    """The agent wrote text. `is_piece`: the text continues the one before."""

    text: str
    is_piece: bool = False


@dataclass(frozen=True, slots=True)
class OtherActivity:
    """The agent did something other than writing, so its next text does not continue the last."""


@dataclass(frozen=True, slots=True)
class BackgroundTask:
    """A background task started or ended. It can make the agent continue after its turn."""

    name: str
    is_running: bool


@dataclass(frozen=True, slots=True)
class BackgroundTasks:
    """The names of all background tasks that are running now."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class WarningShown:
    """The CLI warned. The message is used if the turn fails without another reason."""

    message: str


@dataclass(frozen=True, slots=True)
class RetryReported:
    """The CLI waits and calls its model again. Unless work follows, that is what it waits for."""

    message: str


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The turn ended with this text, or else with the latest one. Another turn may follow."""

    text: str | None = None


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """The turn failed. `message` is None if the CLI gave no reason.

    `is_final`: the turn has failed even if the CLI reports success afterwards.
    """

    message: str | None
    is_final: bool = False


CliEvent: TypeAlias = (
    "SessionNamed | TextWritten | OtherActivity | BackgroundTask | BackgroundTasks | WarningShown"
    " | RetryReported | TurnFinished | TurnFailed"
)
ReadEvent: TypeAlias = Callable[[JsonObject], Iterable[CliEvent]]
"""Yields what one output line of a CLI means. It must not raise, whatever the line contains."""
IsSessionLost: TypeAlias = Callable[[int | None, str], bool]
"""Returns from a resumed turn's exit code and error text whether the session is lost."""
