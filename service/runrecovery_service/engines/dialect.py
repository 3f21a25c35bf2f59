"""How the service and the process of an engine understand each other.

A dialect knows what a process is launched with and told at its beginning; its listener, one a
process, knows what the lines mean that the process prints. Both are pure: pipes, files and the
store are the matter of `execution/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from runrecovery_service.domain.run import Interaction, JsonObject, Question, RunError, Session


class ProtocolError(Exception):
    """The engine broke the protocol. The text says how, without quoting what it printed."""


class HandleUnusable(Exception):
    """A session handle that must not become part of a command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMessage:
    """The handle by which this conversation can be resumed. A secret: never log it."""

    value: str

    def __repr__(self) -> str:
        return "SessionMessage(value=<secret>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskMessage:
    """A question for the user."""

    question: Question


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressMessage:
    """Something to show meanwhile."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultMessage:
    """The run's output; the engine is done."""

    output: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownMessage:
    """A message of a type that this version does not know: to be counted and ignored."""

    type: str


Message: TypeAlias = (
    "SessionMessage | AskMessage | ProgressMessage | ResultMessage | UnknownMessage"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every process of a run is told. `workspace` is an absolute path."""

    run_id: str
    attempt: int
    input: JsonObject
    workspace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a process goes on from: the conversation, and the answer to its last question."""

    session: Session
    reply: Interaction


@dataclass(frozen=True, slots=True)
class Heard:
    """What a line said.

    Attributes:
        shown: the line as it may be kept and shown: without the handle.
        at_work: whether more is to come after a turn that has ended once; None: no turn has ended,
            or the dialect does not say.
    """

    shown: bytes
    messages: tuple[Message, ...] = ()
    at_work: bool | None = None


class Listener(Protocol):
    """Understands the output of one process."""

    def hear(self, line: bytes) -> Heard:
        """Read one line that the process printed, without its newline.

        Raises:
            ProtocolError: it is none that this dialect allows.
        """
        ...

    @property
    def burden(self) -> int:
        """How many bytes the next line may make it look at, beside that line."""
        ...

    @property
    def longest_secret(self) -> int:
        """How many bytes must be seen together for `shown` to find what it looks for."""
        ...

    def shown(self, text: bytes) -> bytes:
        """Return what may be kept and shown of what the process wrote, on any channel."""
        ...

    def failure(self, exit_code: int | None, stderr_tail: str) -> RunError | None:
        """Return what the process failed with, if it said so or its exit code has a meaning.

        Args:
            exit_code: None when it had to be ended; negative for a signal.
            stderr_tail: the last lines of its standard error.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a process is launched with.

    Attributes:
        arguments: come after the words of the engine's command. They may hold the handle.
        input: what its standard input begins with.
        handle: the session handle, where we choose it; None: the process names it. A secret.
        listener: understands this process, and no other one.
    """

    arguments: tuple[str, ...] = field(default=(), repr=False)
    input: bytes = field(repr=False)
    handle: str | None = field(default=None, repr=False)
    listener: Listener


class Dialect(Protocol):
    """One way of speaking with an engine."""

    @property
    def session_type(self) -> str:
        """The type of the handles that it names."""
        ...

    @property
    def max_line_bytes(self) -> int:
        """The longest line that an engine may print."""
        ...

    @property
    def ends_once(self) -> bool:
        """True: a second, different result or question breaks the protocol. False: it counts in
        the place of the one before."""
        ...

    def open(self, task: Task, resumed: Resumed | None) -> Opening:
        """Return what a process is launched with; without `resumed` it begins the task.

        Raises:
            HandleUnusable: the conversation's handle is none that this engine could have named.
        """
        ...

    def reply(self, reply: Interaction) -> bytes:
        """Return what a process that lives through its question is told."""
        ...
