"""The interface of a dialect: how the service and the process of an engine communicate.

A dialect returns the arguments and the input of a process. Its listener, one per process, parses
the lines that the process prints. Both are pure: `execution/` handles pipes, files and storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Protocol, TypeAlias

from runrecovery_service.domain.interruption import Interruption
from runrecovery_service.domain.run import Interaction, JsonObject, Question, RunError, Session
from runrecovery_service.domain.usage import SessionUsage, TurnUsage
from runrecovery_service.lazy_dataclass import dataclass


class ProtocolError(Exception):
    """The engine broke the protocol. The text says how, and quotes no output of the engine."""


class HandleUnusable(Exception):
    """The session handle must not become part of a command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMessage:
    """The handle by which the session can be resumed. The handle is a secret: never log it."""

    value: str

    def __repr__(self) -> str:
        return "SessionMessage(value=<secret>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskMessage:
    """A question for the user."""

    question: Question


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressMessage:
    """A message to show while the engine works."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultMessage:
    """The run's output."""

    output: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageMessage:
    """The usage of the turn so far. It replaces the previous report."""

    used: TurnUsage
    is_answering: bool = False
    """Whether the model called no tool in its latest answer, which is then perhaps the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryMessage:
    """The agent waits and calls its model again.

    Attributes:
        message: the reason, as the agent reports it.
        is_hopeless: whether the model has refused the agent's credentials twice in a row.
    """

    message: str
    is_hopeless: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownMessage:
    """A message that is logged and ignored.

    Attributes:
        problem: what is wrong with the message; empty: this version does not know its type.
    """

    type: str
    problem: str = ""


Message: TypeAlias = (
    "SessionMessage | AskMessage | ProgressMessage | ResultMessage | UsageMessage | RetryMessage"
    " | UnknownMessage"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The facts that every process of a run receives.

    Attributes:
        turn: the number of the process in its attempt.
        workspace: an absolute path.
        permissions: the absolute path of the folder for the files of a permission hook.
        deferred: the ids of the calls that the hook has deferred in earlier turns of the attempt.
    """

    run_id: str
    attempt: int
    input: JsonObject
    workspace: str
    turn: int = 1
    permissions: str = ""
    deferred: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The session that a process resumes, and the reason.

    Attributes:
        reply: the reply to the session's last question, for the process; None: no reply.
        interruption: the interruption of the turn that this process completes; None: the process
            begins a new turn.
        usage: the usage that earlier processes of the session have reported.
    """

    session: Session
    reply: Interaction | None = None
    interruption: Interruption | None = None
    usage: SessionUsage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTurn:
    """A turn whose process has ended, and whose stored output is parsed again.

    Attributes:
        handle: the recorded session's handle, a secret; None: no session is recorded.
        is_resumed: whether the process resumed this session.
        used_before: the usage that earlier processes of the session had reported.
        workspace, deferred: see `RunContext`.
    """

    handle: str | None = field(default=None, repr=False)
    is_resumed: bool = False
    used_before: SessionUsage | None = None
    workspace: str = ""
    deferred: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Heard:
    """The meaning of a line.

    Attributes:
        redacted: the line without the handle, so that the line can be stored and shown.
        at_work: whether the agent has resumed work after the end of a turn. None: no turn has
            ended, or the dialect does not show the end of a turn.
    """

    redacted: bytes
    messages: tuple[Message, ...] = ()
    at_work: bool | None = None


class Listener(Protocol):
    """Parses the output of one process."""

    def hear(self, line: bytes) -> Heard:
        """Return the meaning of one line that the process printed, without its newline.

        Raises:
            ProtocolError: the dialect does not allow this line.
        """
        ...

    def hear_stderr(self, text: str) -> tuple[Message, ...]:
        """Return the meaning of the next piece of standard error, which has no secrets."""
        ...

    @property
    def buffered_bytes(self) -> int:
        """The most bytes that the listener will parse in addition to those of the next line."""
        ...

    @property
    def max_secret_bytes(self) -> int:
        """The length of the longest secret. `redact` finds only a secret that is not split."""
        ...

    def redact(self, text: bytes) -> bytes:
        """Return the text without secrets, so that the text can be stored and shown."""
        ...

    def failure(self, exit_code: int | None, stderr_tail: str) -> RunError | None:
        """Return the failure that the process reported by a message or its exit code, or None.

        Args:
            exit_code: negative for a signal; None: the service had to end the process.
            stderr_tail: the last lines of standard error.
        """
        ...

    def retry(self) -> str | None:
        """Return the reason of the model call that the process was retrying at its end, or None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Arguments and input of a process, and its listener.

    Attributes:
        arguments: appended to the engine's command. They can contain the handle, a secret.
        input: the beginning of standard input.
        handle: the session handle that the service chose, a secret. None: the process names it.
        files: the contents of files that must exist before the process starts.
        least_version: the first version of the engine's program that supports these arguments and
            files. None: any.
        listener: parses the output of this process only.
    """

    arguments: tuple[str, ...] = field(default=(), repr=False)
    input: bytes = field(repr=False)
    handle: str | None = field(default=None, repr=False)
    files: Mapping[Path, bytes] = field(default_factory=dict, repr=False)
    least_version: tuple[int, ...] | None = None
    listener: Listener


class Dialect(Protocol):
    """One protocol between the service and an engine."""

    @property
    def session_type(self) -> str:
        """The type of the session handles of this dialect."""
        ...

    @property
    def max_line_bytes(self) -> int:
        """The longest line that an engine is allowed to print."""
        ...

    @property
    def ends_once(self) -> bool:
        """Whether a second, different result or question breaks the protocol.

        If not, it replaces the previous result or question.
        """
        ...

    @property
    def reports_cost(self) -> bool:
        """Whether engines with this dialect can report a cost."""
        ...

    def open(self, run: RunContext, resumed: Resumed | None) -> Opening:
        """Return arguments and input of a process. If `resumed` is None, it begins the run.

        Raises:
            HandleUnusable: this engine cannot have named the session's handle.
        """
        ...

    def reread(self, turn: KeptTurn) -> Listener:
        """Return a listener for the stored output of a process, in which the handle is hidden.

        Raises:
            HandleUnusable: this engine cannot have named the session's handle.
        """
        ...

    def reply(self, reply: Interaction) -> bytes:
        """Return the input that gives a reply to a process that waits for it."""
        ...
