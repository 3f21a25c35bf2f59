"""What agent CLIs have in common as engines: a prompt in, JSON events out, one turn a process.

A CLI's own module says how it is called, what its events are, and what its exit codes mean; here is
how a turn is made of that. A line that is no event is kept and means nothing: a CLI's own warnings
go to the same place.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from uuid import uuid4

from runrecovery_service.domain.run import (
    ErrorCode,
    Interaction,
    JsonObject,
    RunError,
)
from runrecovery_service.engines import final_message, prompts
from runrecovery_service.engines.dialect import (
    HandleUnusable,
    Heard,
    Message,
    Opening,
    ProtocolError,
    Resumed,
    SessionMessage,
    Task,
)

MAX_LINE_BYTES: Final = 4 << 20
"""Longest event: tools' outputs are quoted in them."""
MAX_TEXT_CHARS: Final = 2 * final_message.MAX_BYTES
"""What is remembered of the text that a turn may end with: its end."""
MAX_MESSAGE_CHARS: Final = 2000
MOST_TASKS: Final = 1000
"""Tasks in the background that are told apart."""
HANDLE_CHARS: Final = 36
SECRET: Final = b"[secret]"

_HANDLE: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""A UUID, as all of them name sessions. Other words mean other things to a CLI: "latest"."""
_ANY_HANDLE: Final = re.compile(_HANDLE.pattern.encode())


# -- what an event may say ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Named:
    """The conversation can be resumed by this handle."""

    handle: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Wrote:
    """The agent wrote text; a piece goes on from the one before."""

    text: str
    piece: bool = False


@dataclass(frozen=True, slots=True)
class Acted:
    """The agent did something else: what it writes now is another text."""


@dataclass(frozen=True, slots=True)
class Began:
    """A task began in the background, which can make the agent go on after its turn."""

    task: str


@dataclass(frozen=True, slots=True)
class Ceased:
    """A task in the background ended."""

    task: str


@dataclass(frozen=True, slots=True)
class Runs:
    """These tasks, and no others, are in the background."""

    tasks: frozenset[str]


@dataclass(frozen=True, slots=True)
class Warned:
    """Something went wrong that need not end the turn; it is told if the turn fails unexplained."""

    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The turn is over, with the last text, or this one. The agent may begin another."""

    text: str | None = None


@dataclass(frozen=True, slots=True)
class Broke:
    """The turn is over and has failed. `message`: None where it does not say why."""

    message: str | None


@dataclass(frozen=True, slots=True)
class Doomed:
    """The turn has failed, even if the CLI then reports success."""

    message: str


Said: TypeAlias = (
    "Named | Wrote | Acted | Began | Ceased | Runs | Warned | Finished | Broke | Doomed"
)
Read: TypeAlias = Callable[[JsonObject], Iterable[Said]]
"""Tells what one event of a CLI says. It never raises, whatever the event is."""
SaysLost: TypeAlias = Callable[[int | None, str], bool]
"""Tells from the exit code of a resumed turn, and what was told of it, that its session is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CliDialect:
    """A CLI as a dialect.

    Attributes:
        session_type: the type of its handles.
        first: arguments of a first turn, given the handle that we chose for it (None: we do not).
        resume: arguments of a turn that goes on, given the handle.
        read, says_lost: see there.
        chooses_handle: it takes a UUID of ours as the handle.
        when_trusted: further arguments where the operator lets the workspace be trusted.
        trusted: he does.
    """

    session_type: str
    first: Callable[[str | None], tuple[str, ...]]
    resume: Callable[[str], tuple[str, ...]]
    read: Read
    says_lost: SaysLost
    chooses_handle: bool = False
    when_trusted: tuple[str, ...] = ()
    trusted: bool = False
    max_line_bytes: int = MAX_LINE_BYTES
    ends_once: bool = False

    def open(self, task: Task, resumed: Resumed | None) -> Opening:
        """Return the command's arguments; the prompt goes to standard input, where its length has
        no limit and other users cannot read it."""
        if resumed is not None:
            handle = resumed.session.handle
            if resumed.session.type != self.session_type or not _HANDLE.fullmatch(handle):
                raise HandleUnusable
            return Opening(
                arguments=(*self.resume(handle), *self._flags),
                input=_bytes(prompts.answer(resumed.reply)),
                listener=CliListener(self, handle, resumed=True),
            )
        chosen = str(uuid4()) if self.chooses_handle else None
        return Opening(
            arguments=(*self.first(chosen), *self._flags),
            input=_bytes(prompts.task(task.input)),
            handle=chosen,
            listener=CliListener(self, chosen, resumed=False),
        )

    @property
    def _flags(self) -> tuple[str, ...]:
        return self.when_trusted if self.trusted else ()

    def reply(self, reply: Interaction) -> bytes:
        """Refuse: a CLI ends with its question, and the configuration allows nothing else."""
        raise ProtocolError("an agent CLI takes no reply while it runs")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


class CliListener:
    """Makes one turn of the events of one process.

    Args:
        handle: the session's handle, where it is known before the process names it.
        resumed: the process goes on with that session.
    """

    longest_secret = HANDLE_CHARS

    def __init__(self, cli: CliDialect, handle: str | None, *, resumed: bool) -> None:
        self._cli = cli
        self._handle = handle
        self._resumed = resumed
        self._pieces: deque[str] = deque()
        self._chars = 0
        self._acted = False
        self._at_work: bool | None = None
        self._tasks: frozenset[str] = frozenset()
        self._broke: Broke | None = None
        self._doomed: Broke | None = None
        self._strayed = False
        self._warning: str | None = None

    @property
    def burden(self) -> int:
        """The text that an end of the turn makes it look at."""
        return self._chars

    def hear(self, line: bytes) -> Heard:
        """Read one line. Only the end of a turn brings a question or a result; the CLI may begin
        another turn, when a task in the background has ended."""
        messages = tuple(message for said in self._said(line) for message in self._take(said))
        at_work = self._at_work if self._at_work is None else self._at_work or bool(self._tasks)
        return Heard(self.shown(line), messages, at_work)

    def shown(self, text: bytes) -> bytes:
        """Return the text without the handle; as long as it is not known, without any that could
        be it."""
        if self._handle is None:
            return _ANY_HANDLE.sub(SECRET, text)
        return text.replace(self._handle.encode("ascii"), SECRET)

    def failure(self, exit_code: int | None, stderr_tail: str) -> RunError | None:
        """Return what the CLI said of its failure, with what its exit code means."""
        if self._strayed:
            message = "The agent went on in another session than the one that it was to resume."
            return RunError(code=ErrorCode.SESSION_RESUME_FAILED, message=message)
        broke = self._doomed or self._broke
        if broke is None and exit_code in {None, 0}:
            return None
        told = (broke and broke.message) or self._warning or stderr_tail
        lost = self._resumed and self._cli.says_lost(exit_code, told)
        if broke is None and not lost and self._warning is None:
            return None  # what is said of any process that exits badly, is said of this one
        how = "" if exit_code is None else f" (exit code {exit_code})"
        message = self._hidden(told.strip()).replace("\0", "") or "it did not say why"
        return RunError(
            code=ErrorCode.SESSION_RESUME_FAILED if lost else ErrorCode.ENGINE_FAILED,
            message=f"The agent failed{how}: {message[:MAX_MESSAGE_CHARS]}",
        )

    def _said(self, line: bytes) -> Iterable[Said]:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return ()
        return self._cli.read(event) if isinstance(event, dict) else ()

    def _take(self, said: Said) -> Iterable[Message]:
        match said:
            case Named(handle):
                self._go_on()
                yield from self._name(handle)
            case Wrote(text, piece):
                self._go_on()
                self._write(text, goes_on=piece and not self._acted)
            case Acted():
                self._go_on()
                self._acted = True
            case Began() | Ceased() | Runs():
                self._count(said)
            case Warned(message):
                self._warning = message
            case Finished(text):
                self._end(None)
                yield final_message.parse(self._hidden(text or "".join(self._pieces)))
            case Broke():
                self._end(said)
            case Doomed(message):
                self._doomed = self._doomed or Broke(message)

    def _go_on(self) -> None:
        if self._at_work is not None:
            self._at_work = True

    def _end(self, broke: Broke | None) -> None:
        self._at_work = False
        self._acted = True  # what it writes now belongs to another turn
        self._broke = broke

    def _count(self, said: Began | Ceased | Runs) -> None:
        match said:
            case Began(task):
                if len(self._tasks) < MOST_TASKS:
                    self._tasks |= {task}
            case Ceased(task):
                self._tasks -= {task}
            case Runs(tasks):
                self._tasks = tasks

    def _write(self, text: str, *, goes_on: bool) -> None:
        if not goes_on:
            self._pieces.clear()
            self._chars = 0
        self._acted = False
        self._pieces.append(text[-MAX_TEXT_CHARS:])
        self._chars += len(self._pieces[-1])
        while self._chars - len(self._pieces[0]) > MAX_TEXT_CHARS // 2:
            self._chars -= len(self._pieces.popleft())

    def _name(self, handle: str) -> Iterable[Message]:
        if not _HANDLE.fullmatch(handle):
            raise ProtocolError("it named a session by what is no UUID")
        if self._resumed and handle != self._handle:
            self._strayed = True
        elif handle != self._handle:
            self._handle = handle
            yield SessionMessage(value=handle)

    def _hidden(self, text: str) -> str:
        """Return the text without the handle. Whatever the agent writes may quote it."""
        return text if self._handle is None else text.replace(self._handle, SECRET.decode())
