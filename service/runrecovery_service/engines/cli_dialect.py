"""The dialect of agent CLIs: a prompt on stdin, JSON events on stdout, one turn per process.

The module of each CLI has the CLI's command line, events and exit codes. This module makes messages
of the events. A line that is not an event, such as a warning, is stored but ignored.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final
from uuid import uuid4

from runrecovery_service.domain.run import ErrorCode, Interaction, JsonObject, RunError
from runrecovery_service.domain.storable_text import storable
from runrecovery_service.domain.usage import SessionUsage
from runrecovery_service.engines import final_message, prompts
from runrecovery_service.engines.cli_events import (
    REFUSED,
    BackgroundTask,
    BackgroundTasks,
    CallReported,
    CliEvent,
    OtherActivity,
    ReadEvent,
    ReadsFailure,
    ReadUsage,
    RetryReported,
    SessionNamed,
    TextWritten,
    ToolCalled,
    TurnDeferred,
    TurnFailed,
    TurnFinished,
    WarningShown,
)
from runrecovery_service.engines.cli_usage import UsageCounter
from runrecovery_service.engines.dialect import (
    AskMessage,
    HandleUnusable,
    Heard,
    KeptTurn,
    Message,
    Opening,
    ProtocolError,
    Resumed,
    RetryMessage,
    RunContext,
    SessionMessage,
    UsageMessage,
)
from runrecovery_service.engines.message_limits import MAX_CLI_LINE_BYTES, MAX_FINAL_MESSAGE_BYTES
from runrecovery_service.engines.permissions import (
    LEAST_VERSION,
    DeferredCalls,
    Permissions,
    returns_to_call,
)
from runrecovery_service.lazy_dataclass import dataclass

MAX_TEXT_CHARS: Final = 2 * MAX_FINAL_MESSAGE_BYTES
"""How many characters of the latest text are kept, from its end."""
MAX_MESSAGE_CHARS: Final = 2000
MAX_RETRY_CHARS: Final = 200
"""The longest report of a retry on standard error that is found if it arrives in pieces."""
MAX_TASKS: Final = 1000
"""The most background tasks whose names are remembered."""
HANDLE_CHARS: Final = 36
SECRET: Final = b"[secret]"
UNRECORDED_HANDLE: Final = "00000000-0000-0000-0000-000000000000"
"""Used in place of a handle that was never recorded and is hidden in the stored output."""

_HANDLE: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Matches a UUID, which is the session id of every supported CLI. A CLI could take another text,
such as "latest", for a keyword."""
_ANY_HANDLE: Final = re.compile(_HANDLE.pattern.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class CliDialect:
    """The dialect of one CLI.

    Attributes:
        session_type: the type of the session handles.
        first: returns the arguments of a first turn. It gets the handle that the service chose, or
            None if the CLI chooses the handle.
        resume: returns the arguments of a later turn. It gets the handle.
        read: yields the meaning of one event.
        read_usage: returns the usage that an event reports.
        says_lost: returns whether the failure of a resumed turn means a lost session.
        says_refused: returns whether a failure means refused credentials.
        retry_on_stderr: matches reports of retries on standard error; its group is the HTTP status.
            None: the CLI reports retries by events.
        chooses_handle: whether the service chooses the handle, a UUID.
        when_trusted: further arguments if the operator lets the CLI trust the workspace.
        trusted: whether the operator lets the CLI trust the workspace.
        permissions: which tool calls need the user's permission. None: the CLI cannot end its turn
            before a call and return to this call later.
    """

    session_type: str
    first: Callable[[str | None], tuple[str, ...]]
    resume: Callable[[str], tuple[str, ...]]
    read: ReadEvent
    read_usage: ReadUsage
    says_lost: ReadsFailure
    says_refused: ReadsFailure
    chooses_handle: bool = False
    when_trusted: tuple[str, ...] = ()
    trusted: bool = False
    retry_on_stderr: re.Pattern[str] | None = None
    reports_cost: bool = False
    permissions: Permissions | None = None
    max_line_bytes: int = MAX_CLI_LINE_BYTES
    ends_once: bool = False

    def open(self, run: RunContext, resumed: Resumed | None) -> Opening:
        """Return the command's arguments and its input.

        The prompt goes to standard input, where its length has no limit and other users cannot
        read it.
        """
        if resumed is None:
            chosen = str(uuid4()) if self.chooses_handle else None
            opening = Opening(
                arguments=self.first(chosen),
                input=_encode(prompts.first_prompt(run.input)),
                handle=chosen,
                listener=CliListener(self, chosen, resumed=False, calls=self._calls(run)),
            )
            return self._completed(opening, run, None)
        handle = resumed.session.handle
        if resumed.session.type != self.session_type or not _HANDLE.fullmatch(handle):
            raise HandleUnusable
        returns = self.permissions is not None and returns_to_call(resumed.reply)
        opening = Opening(
            arguments=self.resume(handle),
            # Without a prompt the CLI returns to the deferred call, and the hook gives the answer.
            input=b"" if returns else _encode(prompts.resume_prompt(run.input, resumed)),
            listener=CliListener(
                self,
                handle,
                resumed=True,
                used_before=resumed.usage,
                calls=self._calls(run, has_prompt=not returns),
            ),
        )
        return self._completed(opening, run, resumed)

    def _completed(self, opening: Opening, run: RunContext, resumed: Resumed | None) -> Opening:
        """Add the arguments and files that every opening needs, for trust and permissions."""
        more = self.when_trusted if self.trusted else ()
        hook = None if self.permissions is None else self.permissions.prepare(run, resumed)
        if hook is None:
            return replace(opening, arguments=(*opening.arguments, *more))
        return replace(
            opening,
            arguments=(*opening.arguments, *more, *hook.arguments),
            files=hook.files,
            least_version=LEAST_VERSION,
        )

    def _calls(
        self, run: RunContext | KeptTurn, *, has_prompt: bool = True
    ) -> DeferredCalls | None:
        if self.permissions is None:
            return None
        return DeferredCalls(
            permissions=self.permissions,
            workspace=run.workspace,
            deferred=run.deferred,
            has_prompt=has_prompt,
        )

    def reread(self, turn: KeptTurn) -> KeptListener:
        """Return a listener that restores the handle, which the stored output hides."""
        if turn.handle is not None and not _HANDLE.fullmatch(turn.handle):
            raise HandleUnusable
        return KeptListener(
            self,
            turn.handle,
            resumed=turn.is_resumed,
            used_before=turn.used_before,
            calls=self._calls(turn),
        )

    def reply(self, reply: Interaction) -> bytes:
        """Raise ProtocolError: a CLI exits after its question, so no process can get a reply."""
        raise ProtocolError("an agent CLI takes no reply while it runs")


def deferred_text(tool: str | None) -> str:
    """Return the error of a turn that a user's hook ended before a call of `tool`, if known."""
    call = "tool call" if tool is None else f"call of the tool {tool}"
    return f"A hook deferred its {call}, so the turn ended unfinished."


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _event(line: bytes) -> JsonObject:
    """Return the event in a line, or an empty object if the line is no event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


class CliListener:
    """Turns the events of one process into messages.

    Args:
        handle: the session's handle, if it is known before the process names it.
        resumed: whether the process resumes this session.
        used_before: the usage that earlier processes of this session have reported.
        calls: makes questions of the calls that the permission hook has deferred. None: the CLI
            has no hook.
    """

    max_secret_bytes = HANDLE_CHARS

    def __init__(
        self,
        cli: CliDialect,
        handle: str | None,
        *,
        resumed: bool,
        used_before: SessionUsage | None = None,
        calls: DeferredCalls | None = None,
    ) -> None:
        self._cli = cli
        self._calls = calls
        self._last_call: str | None = None
        self._handle = handle
        self._resumed = resumed
        self._usage = UsageCounter(used_before)
        self._pieces: deque[str] = deque()
        self._chars = 0
        self._begins_new_text = False
        self._at_work: bool | None = None
        self._tasks: frozenset[str] = frozenset()
        self._failure: TurnFailed | None = None
        self._final_failure: TurnFailed | None = None
        self._resumed_another = False
        self._warning: str | None = None
        self._retry: RetryReported | None = None
        self._stderr_rest = ""
        self._is_refused = False

    @property
    def buffered_bytes(self) -> int:
        """The size of the text that will be parsed when the turn ends."""
        return self._chars

    def hear(self, line: bytes) -> Heard:
        """Return the meaning of one line.

        Only the end of a turn yields a question or a result. The CLI can begin another turn when a
        background task has ended.
        """
        event = _event(line)
        messages = [each for one in self._cli.read(event) for each in self._handle_event(one)]
        if (used := self._cli.read_usage(event)) is not None:  # after the result of the same event
            is_answering = isinstance(used, CallReported) and not used.calls_tool
            messages.append(UsageMessage(used=self._usage.add(used), is_answering=is_answering))
        at_work = self._at_work if self._at_work is None else self._at_work or bool(self._tasks)
        return Heard(self.redact(line), tuple(messages), at_work)

    def hear_stderr(self, text: str) -> tuple[Message, ...]:
        """Return the retries that the next piece of standard error reports."""
        if self._cli.retry_on_stderr is None:
            return ()
        text, end = self._stderr_rest + text, 0
        messages = []
        for found in self._cli.retry_on_stderr.finditer(text):
            end = found.end()
            is_refused = found[1] in map(str, REFUSED)
            messages.append(self._note_retry(RetryReported(found[0], is_refused=is_refused)))
        self._stderr_rest = text[end:][-MAX_RETRY_CHARS:]  # a report can come in two pieces
        return tuple(messages)

    def redact(self, text: bytes) -> bytes:
        """Return the text without the handle, or without every UUID until the handle is known."""
        if self._handle is None:
            return _ANY_HANDLE.sub(SECRET, text)
        return text.replace(self._handle.encode("ascii"), SECRET)

    def failure(self, exit_code: int | None, stderr_tail: str) -> RunError | None:
        """Return the failure that the CLI reported by events or its exit code; None: no failure."""
        if self._resumed_another:
            message = "The agent resumed another session than the one that it was told to resume."
            return RunError(code=ErrorCode.SESSION_RESUME_FAILED, message=message)
        failure = self._final_failure or self._failure
        if failure is None and exit_code in {None, 0}:
            return None
        text = (failure and failure.message) or self._warning or stderr_tail
        lost = self._resumed and self._cli.says_lost(exit_code, text)
        if failure is None and not lost and self._warning is None:
            return None  # the caller's message about the exit code says as much
        code = "" if exit_code is None else f" (exit code {exit_code})"
        reason = self._shown(text) or "it gave no reason"
        refused = self._is_refused or self._cli.says_refused(exit_code, text)
        failed = ErrorCode.ENGINE_UNAUTHENTICATED if refused else ErrorCode.ENGINE_FAILED
        return RunError(
            code=ErrorCode.SESSION_RESUME_FAILED if lost else failed,
            message=f"The agent failed{code}: {reason}",
        )

    def retry(self) -> str | None:
        """Return the latest reported retry; None if there was none, or if work followed."""
        return None if self._retry is None else self._shown(self._retry.message)

    def _shown(self, text: str) -> str:
        """Return a text of the CLI without secrets, cut to the length of a message."""
        return storable(self._redact_text(text.strip()))[:MAX_MESSAGE_CHARS]

    # -- events --------------------------------------------------------------------------------

    def _handle_event(self, event: CliEvent) -> Iterable[Message]:
        match event:
            case SessionNamed(handle):  # comes before the first call of the model
                self._note_activity()
                yield from self._name_session(handle)
            case TextWritten(text, is_piece):
                self._note_work()
                self._add_text(text, continues=is_piece and not self._begins_new_text)
            case OtherActivity():
                self._note_work()
                self._begins_new_text = True
            case BackgroundTask() | BackgroundTasks():
                self._update_tasks(event)
            case WarningShown(message):
                self._warning = message
            case RetryReported():
                yield self._note_retry(event)
            case ToolCalled(call_id):
                self._last_call = call_id
            case TurnFinished() | TurnDeferred() | TurnFailed():
                yield from self._handle_end(event)

    def _handle_end(self, event: TurnFinished | TurnDeferred | TurnFailed) -> Iterable[Message]:
        match event:
            case TurnFinished(text):
                self._end_turn(None)
                yield final_message.parse(self._redact_text(text or "".join(self._pieces)))
            case TurnDeferred():
                yield from self._defer(event)
            case TurnFailed(is_final=True):
                self._final_failure = self._final_failure or event
            case TurnFailed():
                self._end_turn(event)

    def _note_retry(self, retry: RetryReported) -> RetryMessage:
        """Return the message of a retry.

        After the first refusal the CLI can renew a token that was out of date. A second refusal in
        a row is final.
        """
        is_hopeless = retry.is_refused and self._is_refused
        self._retry, self._is_refused = retry, retry.is_refused
        return RetryMessage(message=self._shown(retry.message), is_hopeless=is_hopeless)

    def _defer(self, event: TurnDeferred) -> Iterable[Message]:
        """End the turn with the question about the deferred call, or as failed without one."""
        if self._calls is not None and self._calls.is_repeated(event):
            return  # the CLI returned to a call of an earlier turn, and reads its prompt next
        question = None
        if self._calls is not None:
            is_last = event.call_id == self._last_call
            question = self._calls.question(event, session=self._handle or "", is_last=is_last)
        if question is None:
            self._end_turn(TurnFailed(deferred_text(event.tool)))
        else:
            self._end_turn(None)
            yield AskMessage(question=question)

    def _note_work(self) -> None:
        self._retry, self._is_refused = None, False
        self._note_activity()

    def _note_activity(self) -> None:
        if self._at_work is not None:
            self._at_work = True

    def _end_turn(self, failure: TurnFailed | None) -> None:
        self._at_work = False
        self._begins_new_text = True  # the next text belongs to another turn
        self._failure = failure

    def _update_tasks(self, event: BackgroundTask | BackgroundTasks) -> None:
        match event:
            case BackgroundTasks(names):
                self._tasks = names
            case BackgroundTask(name, is_running=True):
                if len(self._tasks) < MAX_TASKS:
                    self._tasks |= {name}
            case BackgroundTask(name):
                self._tasks -= {name}

    def _add_text(self, text: str, *, continues: bool) -> None:
        if not continues:
            self._pieces.clear()
            self._chars = 0
        self._begins_new_text = False
        self._pieces.append(text[-MAX_TEXT_CHARS:])
        self._chars += len(self._pieces[-1])
        while self._chars - len(self._pieces[0]) > MAX_TEXT_CHARS // 2:
            self._chars -= len(self._pieces.popleft())

    def _name_session(self, handle: str) -> Iterable[Message]:
        if not _HANDLE.fullmatch(handle):
            raise ProtocolError("the agent named a session by an id that is not a UUID")
        if self._resumed and handle != self._handle:
            self._resumed_another = True
        elif handle != self._handle:
            self._handle = handle
            yield SessionMessage(value=handle)

    def _redact_text(self, text: str) -> str:
        """Return the text without the handle, which any text of the agent can quote."""
        return text if self._handle is None else text.replace(self._handle, SECRET.decode())


class KeptListener(CliListener):
    """Parses the stored output of a process that has ended. `redact` has hidden handles in it."""

    def hear(self, line: bytes) -> Heard:
        """Return the meaning of one line, as it was when the process printed it.

        Raises:
            ProtocolError: the line hides an id that is not known.
        """
        hidden = UNRECORDED_HANDLE if self._handle is None else self._handle
        heard = super().hear(line.replace(SECRET, hidden.encode("ascii")))
        if self._handle is None and SECRET in line:
            raise ProtocolError("an id is hidden, and the agent has not named its session yet")
        return heard
