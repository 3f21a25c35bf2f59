"""The possible meanings of an output event of an agent CLI. The module of each CLI parses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Final, TypeAlias

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.usage import Usage
from runrecovery_service.lazy_dataclass import dataclass

REFUSED: Final = (401, 403)
"""HTTP statuses by which a model refuses the credentials of its caller."""


@dataclass(frozen=True, slots=True)
class SessionNamed:
    """The CLI named the handle of its session."""

    handle: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TextWritten:
    """The agent wrote text. `is_piece`: the text continues the previous one."""

    text: str
    is_piece: bool = False


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """The agent itself called a tool, and not one of its background tasks."""

    call_id: str


@dataclass(frozen=True, slots=True)
class OtherActivity:
    """The agent did something other than writing, so its next text does not continue the last."""


@dataclass(frozen=True, slots=True)
class BackgroundTask:
    """A background task started or ended. Its end can make the agent begin another turn."""

    name: str
    is_running: bool


@dataclass(frozen=True, slots=True)
class BackgroundTasks:
    """The names of all background tasks that are running now."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class WarningShown:
    """The CLI warned. If the turn fails without a reason, the warning is its error message."""

    message: str


@dataclass(frozen=True, slots=True)
class RetryReported:
    """The CLI repeats a call of its model after a pause. It is retrying until an event shows work.

    `is_refused`: whether the model refused the credentials of the CLI.
    """

    message: str
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class UsageReported:
    """The CLI reported its usage.

    Attributes:
        total: the usage of the session if `spans_session`, else that of the process.
        of_process: the usage of the process alone; None: the CLI reports only the total.
        is_of_process: whether `total` certainly excludes earlier processes.
    """

    total: Usage
    spans_session: bool = False
    of_process: Usage | None = None
    is_of_process: bool = False


@dataclass(frozen=True, slots=True)
class CallReported:
    """The CLI reported the usage of one call of a model so far, before the report of the turn.

    A later event of the same `call` replaces this one. `calls_tool`: whether the event has a tool
    call of the model, so that the turn continues.
    """

    call: str
    usage: Usage
    calls_tool: bool = True


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The turn ended. `text`: its final text; None: its latest text. Another turn can follow."""

    text: str | None = None


@dataclass(frozen=True, slots=True)
class TurnDeferred:
    """A hook deferred this tool call: the turn ended before the call was carried out."""

    call_id: str
    tool: str
    input: JsonObject


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """The turn failed. `message` is None if the CLI gave no reason.

    `is_final`: whether the turn has failed even if the CLI reports success afterwards.
    """

    message: str | None
    is_final: bool = False


CliEvent: TypeAlias = (
    "SessionNamed | TextWritten | ToolCalled | OtherActivity | BackgroundTask | BackgroundTasks"
    " | WarningShown | RetryReported | TurnFinished | TurnDeferred | TurnFailed"
)
ReadEvent: TypeAlias = Callable[[JsonObject], Iterable[CliEvent]]
"""Yields the meanings of one JSON event of a CLI. It must not raise, whatever the event has."""
ReadsFailure: TypeAlias = Callable[[int | None, str], bool]
"""Returns whether a turn failed for a certain reason, by its exit code and the text of its
error."""
ReadUsage: TypeAlias = Callable[[JsonObject], UsageReported | CallReported | None]
"""Returns the usage that one JSON event reports; None: no usage, or impossible numbers. It must not
raise, whatever the event has."""
