"""Follows the process of one turn from its launch to its end, and records what it does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import IO, Final, TypeAlias

import structlog

from runrecovery_service.agents.output import OutputChannel
from runrecovery_service.agents.session_checks import check_session, fingerprint_session
from runrecovery_service.domain.deadline import Due, DueKind
from runrecovery_service.domain.errors import Fenced, error_facts
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionState,
    Profile,
    Run,
    RunError,
    RunStatus,
    Session,
)
from runrecovery_service.domain.session_check import (
    REASON_TEXTS,
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    StoredHandle,
)
from runrecovery_service.domain.turn import (
    Asked,
    Failed,
    Interrupted,
    Observed,
    Succeeded,
    TurnEnd,
    is_repeated,
    judge,
)
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.dialect import (
    AskMessage,
    HandleUnusable,
    Listener,
    Message,
    Opening,
    ProgressMessage,
    ProtocolError,
    ResultMessage,
    Resumed,
    RunContext,
    SessionMessage,
    UnknownMessage,
)
from runrecovery_service.execution.launcher import Launch, StoodStill, Unguarded, Withdrawn
from runrecovery_service.execution.pipes import bytes_held, read, until_read, write_all
from runrecovery_service.execution.workshop import TurnLog, Workshop
from runrecovery_service.process.ending import NOTHING_LEFT, Ending
from runrecovery_service.process.launch_errors import LaunchFailed
from runrecovery_service.process.shim_events import (
    Empty,
    EndsItself,
    Exited,
    Gated,
    NotStarted,
    ShimEvent,
    Started,
)
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.storage import instances, interactions, turns
from runrecovery_service.storage.processes import Ended, Usage
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()


LONG_LINE_BYTES: Final = 16384
"""Longer lines are parsed in a thread: one of 1 MiB takes the loop a second and more."""
IGNORED_TYPES: Final = 100
"""Unknown message types of one turn that are told apart in the log."""
STDERR_TAIL_BYTES: Final = 2000
UTF8_CONTINUATION: Final = bytes(range(0x80, 0xC0))
LAST_OUTPUT_S: Final = 1.0
"""How long a process that has exited may leave its output open (a child may hold it)."""
OVERTIME_BYTES: Final = 16 << 20
"""Output that is still read and parsed after a deadline; a descendant may write for ever."""
UNGUARDED_LOOKS: Final = 2
"""Looks, 2 s apart, at which a shim must be found stopped or gone: one may be at its very end."""
SECOND_END: Final = "The agent gave a second, different result or question."
HANDLE_UNUSABLE: Final = "The session's handle is none that this engine could have named."
NOT_ENDED: Final = "not_ended"
HOME_LOOK_S: Final = 1.0
"""Between two looks for the home of a CLI that is not there."""
STOOD_STILL: Final = (
    "The service stood still for longer than its lease, so that the run's processes were ended."
)


class _Signal(Enum):
    """What can come beside a message of the agent."""

    STDOUT_ENDED = auto()
    STDERR_ENDED = auto()
    SHIM_GONE = auto()
    SHIM_USELESS = auto()
    CANCELED = auto()
    REPLY_LOST = auto()


@dataclass(frozen=True, slots=True)
class _Broken:
    how: str


@dataclass(frozen=True, slots=True)
class _TimedOut:
    kind: DueKind


@dataclass(frozen=True, slots=True)
class _Wrote:
    """The agent wrote lines. `at_work`: see `Heard`."""

    at_work: bool | None


_News: TypeAlias = "Message | ShimEvent | _Signal | _Broken | _TimedOut | _Wrote"


@dataclass(slots=True, kw_only=True, eq=False)
class TurnSupervisor:
    """One turn under way. `follow` is its whole life; the rest may be called meanwhile.

    `is_ending`: it is decided how the turn ended; that is only to be carried out and recorded.
    """

    turn: Turn
    shop: Workshop
    launch: Launch = field(init=False)
    _log: TurnLog = field(init=False)
    _listener: Listener = field(init=False)
    _news: asyncio.Queue[_News] = field(default_factory=asyncio.Queue)
    _replied: asyncio.Event = field(default_factory=asyncio.Event)
    _said: Asked | Succeeded | None = None
    _at_work: bool = False
    _broken: str | None = None
    _exited: Exited | None = None
    _interrupted: str | None = None
    _unsupervised: bool = False
    _emptied: bool = False
    _timed_out: DueKind | None = None
    _canceled: bool = False
    _in_wait: bool = False
    _undelivered: bool = False
    _handed_over: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    _has_session: bool = False
    _open_outputs: int = 2
    _ignored: Counter[str] = field(default_factory=Counter)
    _stderr_tail: bytes = b""
    _stderr_held: bytes = b""
    _deadline: float | None = None
    _is_parsing: bool = False
    _is_keeping: bool = False
    _read_bytes: int = 0
    _begun: list[bytes] = field(default_factory=list)
    _overtime_from: int | None = None
    _unguarded_looks: int = 0
    is_ending: bool = False

    def __post_init__(self) -> None:
        self._log = TurnLog(self.turn.run)
        self.launch = Launch(turn=self.turn, shop=self.shop, log=self._log)

    def cancel(self) -> None:
        """End the process; a cancel has been accepted."""
        self._news.put_nowait(_Signal.CANCELED)
        self.launch.stop_waiting()

    def time_out(self, kind: DueKind) -> None:
        """End the process; one of the run's deadlines has passed."""
        self._news.put_nowait(_TimedOut(kind))
        self.launch.stop_waiting()

    def deliver(self) -> None:
        """Give the process the reply that has been accepted."""
        self._replied.set()

    def look_at_shim(self) -> None:
        """Notice, at the second look, a shim that was stopped, or is gone although its report is
        held open by somebody."""
        self._unguarded_looks = 0 if self.launch.is_guarded else self._unguarded_looks + 1
        if self._unguarded_looks >= UNGUARDED_LOOKS:
            self._news.put_nowait(_Signal.SHIM_USELESS)

    async def follow(self) -> None:
        """Launch, converse, end, record. What is not on record is tried until it is.

        Cancelling the task leaves the run as it is on record: whoever stops us decides on it.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        end = await self._live()
        self.is_ending = True
        ending = await self._end_tree()
        for event in await self.shop.in_thread(lambda: self.launch.release(gone=ending.gone)):
            self._note(event)
        await self._demand_owned()
        await self._distrust(end)
        await self._record(end, self._ended(ending))

    async def give_up(self) -> None:
        """After a defect in `follow`: end the tree all the same; the run must not stay RUNNING.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        ending = await self.launch.end_tree(why="defect")
        await self.shop.in_thread(lambda: self.launch.release(gone=ending.gone))
        await self._demand_owned()
        await self._distrust(_defect())
        await self._record(_defect(), self._ended(ending))

    async def _live(self) -> TurnEnd:
        """Launch and converse; return how the turn ended."""
        try:
            opening = self._open()
            self._listener = opening.listener
            if (lost := await self._lost_session()) is not None:
                return Failed(RunError(code=ErrorCode.SESSION_RESUME_FAILED, message=lost))
            if opening.handle is not None:  # on record before the process can act
                await self._keep_session(opening.handle)
            process = await self.launch.start(self._engine, opening)
        except LaunchFailed as error:
            self._log.warning("execution.launch_failed", reason=error.reason)
            return Failed(RunError(code=ErrorCode.LAUNCH_FAILED, message=error.reason))
        except HandleUnusable:
            return Failed(RunError(code=ErrorCode.SESSION_RESUME_FAILED, message=HANDLE_UNUSABLE))
        except StoodStill:
            return Interrupted(STOOD_STILL)
        except Unguarded:
            self._unsupervised = True
            return judge(self._observed())
        except Withdrawn:
            while not self._news.empty():  # why, if it was not a cancel, which is on record
                await self._take(self._news.get_nowait())
            return judge(self._observed())
        return await self._conversation_end(process, opening)

    def _open(self) -> Opening:
        run = self.turn.run
        if run.engine not in self.shop.catalog.names:
            raise LaunchFailed(f"no engine {run.engine!r} is configured any more")
        workspace = self.shop.output.workspace(run.key, run.attempt)
        task = RunContext(
            run_id=run.run_id, attempt=run.attempt, input=run.input or {}, workspace=str(workspace)
        )
        return self._engine.dialect.open(task, self._resumed)

    @property
    def _resumed(self) -> Resumed | None:
        session, reply = self.turn.run.session, self.turn.reply
        if session is None or reply is None:
            return None
        return Resumed(session=session, reply=reply)

    async def _lost_session(self) -> str | None:
        """Return why there is no session to go on with. The CLIs do not look: what is left of one
        that was cut off they go on with, as if there had never been more."""
        run, engine, resumed = self.turn.run, self._engine, self._resumed
        if resumed is None or engine.sessions is None:
            return None
        stored = StoredHandle(
            handle=resumed.session.handle,
            workspace=self.shop.output.workspace(run.key, run.attempt),
            fingerprint=await self._log.retry_until_done(
                lambda: self.shop.storage.point(turns.mark_of, self.turn)
            ),
        )
        finding = await self._finding_at_home(engine, stored)
        if finding is None or finding.reason is None:
            return None
        if finding.reason is SessionReason.NOT_ANSWERED:
            self._log.warning("execution.session_not_seen", reason=finding.reason.value)
        if finding.holds:
            return None
        return f"The session cannot be resumed: {REASON_TEXTS[finding.reason]}."

    async def _finding_at_home(self, engine: Engine, stored: StoredHandle) -> SessionFinding | None:
        """Return what the check says once the CLI's home is there: to launch it before would make
        it another, empty home, in which every session is lost."""
        told = False
        while True:
            finding = await check_session(engine, stored, look_s=self.shop.look_s)
            away = (
                finding is not None and finding.reason is SessionReason.HOME_AWAY and finding.holds
            )
            if not away:
                return finding
            if not told:
                self._log.warning(
                    "execution.session_not_seen", reason=SessionReason.HOME_AWAY.value
                )
            told = True
            await self.launch.demand_wanted()
            await asyncio.sleep(HOME_LOOK_S)

    @property
    def _engine(self) -> Engine:
        return self.shop.catalog.get(self.turn.run.engine)

    # -- conversing ----------------------------------------------------------------------------

    async def _conversation_end(self, process: ShimmedProcess, opening: Opening) -> TurnEnd:
        try:
            await self._converse(process, opening)
        except (
            ExceptionGroup
        ) as group:  # the edge of this process's task: the run must not stay RUNNING
            if (fenced := _first_fenced(group)) is not None:
                raise fenced from None
            log.exception("execution.session_failed", run_id=self.turn.run.run_id)
            return _defect()
        return judge(self._observed())

    async def _converse(self, process: ShimmedProcess, opening: Opening) -> None:
        """Take the news until the process has ended or must be ended."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._read_stdout(process.stdout)),
                group.create_task(self._read_stderr(process.stderr)),
                group.create_task(self._hear_shim(process)),
                group.create_task(self._greet(process, opening)),
                group.create_task(self._hand_over_replies(process)),
                group.create_task(self._see_replies_read(process)),
            ]
            # A cancel that came before this session was known to anybody is only on record.
            if (await self._look()).cancel_requested:
                self.cancel()
            await self._take_news(process)
            for task in tasks:
                task.cancel()
        await self._take_what_was_begun()

    async def _look(self) -> Run:
        """Return the run as it is on record now."""
        storage, owner = self.shop.storage, self.shop.owner
        return await self._log.retry_until_done(
            lambda: storage.point(turns.look, self.turn, owner=owner)
        )

    async def _take_news(self, process: ShimmedProcess) -> None:
        while not self._is_over():
            try:
                async with asyncio.timeout_at(self._deadline):
                    news = await self._news.get()
            except TimeoutError:
                if not self._has_unread_output(process):
                    return
                self._expect_end_within(LAST_OUTPUT_S)
                continue
            await self._take(news)
            self._news.task_done()

    def _has_unread_output(self, process: ShimmedProcess) -> bool:
        """Return True while output is unread or unparsed, up to a bound of bytes: the time that
        our own reading takes does not count against the agent."""
        if self._overtime_from is None:
            self._overtime_from = self._read_bytes
        is_bounded = self._read_bytes - self._overtime_from < OVERTIME_BYTES
        held = sum(bytes_held(pipe.fileno()) for pipe in (process.stdout, process.stderr))
        return is_bounded and (self._is_parsing or self._is_keeping or held > 0)

    async def _take_what_was_begun(self) -> None:
        """Take the last line of an agent that has exited without a newline, while a child of it
        holds its output open. Half a line of that child is none."""
        await self._keep_stderr(self._stderr_held)
        line = b"".join(self._begun)
        if self._exited is None or self._broken is not None or not line:
            return
        shown, news = await self.shop.in_thread(self._understand, line)
        await self._keep(OutputChannel.STDOUT, shown)
        for each in news:
            if not isinstance(each, _Broken):
                await self._take(each)

    def _is_over(self) -> bool:
        # Its whole output comes before its end: whoever follows it must miss nothing.
        ended = self._exited is not None and not self._open_outputs
        lost = self._unsupervised or self._interrupted is not None
        stopped = self._canceled or self._timed_out is not None
        return ended or lost or stopped or self._broken is not None

    async def _take(self, news: _News) -> None:
        match news:
            case _Signal():
                self._take_signal(news)
            case _TimedOut(kind):
                self._timed_out = kind
            case Exited() | EndsItself() | Empty():
                self._note(news)
                self._expect_end_within(LAST_OUTPUT_S)
            case Gated() | Started() | NotStarted():
                pass  # was waited for by the launch
            case _Broken(how):
                self._broken = how
            case _:
                await self._hear(news)

    def _take_signal(self, signal: _Signal) -> None:
        match signal:
            case _Signal.CANCELED:
                self._canceled = True
            case _Signal.REPLY_LOST:
                self._undelivered = True
                self._expect_end_within(LAST_OUTPUT_S)  # it may be at its end
            case _Signal.STDOUT_ENDED:
                self._open_outputs -= 1
                self._expect_end_within(self.shop.exit_grace_s)
            case _Signal.STDERR_ENDED:
                self._open_outputs -= 1
            case _Signal.SHIM_GONE:
                self._unsupervised = self._exited is None
                self._expect_end_within(LAST_OUTPUT_S)
            case _Signal.SHIM_USELESS:
                # A shim ends after its tree. While a write is retried, the sweep may notice that
                # before the exit, which was reported earlier, has been taken.
                self._unsupervised = self._exited is None

    def _note(self, event: ShimEvent) -> None:
        match event:
            case EndsItself():
                # What it did before that counts: it may have ended well, unheard.
                self._interrupted = STOOD_STILL if self._exited is None else None
            case Exited():
                self._exited = event
            case Empty():
                self._emptied = True

    def _note_writing(self, wrote: _Wrote) -> None:
        """A turn that has ended is followed by the exit, within a time that begins anew with each
        line. An agent that is at work on another turn has no such time."""
        self._at_work = wrote.at_work is True
        if self._exited is not None or not self._open_outputs:
            return
        if self._at_work:
            self._deadline = None
        elif self._said is not None or wrote.at_work is False:
            self._expect_end_within(self.shop.exit_grace_s)

    def _expect_end_within(self, seconds: float) -> None:
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def _hear(self, message: Message | _Wrote) -> None:
        match message:
            case SessionMessage(value=handle):
                await self._keep_session(handle)
            case AskMessage(question=question):
                await self._hear_question(Asked(question))
            case ResultMessage(output=output):
                await self._hear_last_word(Succeeded(output))
            case UnknownMessage(type=kind):
                self._ignore(kind)
            case _Wrote():
                self._note_writing(message)
            case ProgressMessage():
                pass

    def _ignore(self, kind: str) -> None:
        if not self._ignored[kind]:
            self._log.info("execution.message_ignored", type=kind)
        if len(self._ignored) < IGNORED_TYPES:
            self._ignored[kind] += 1

    async def _keep_session(self, handle: str) -> None:
        kind = self._engine.dialect.session_type
        session = Session(type=kind, handle=handle, turn=self.turn.run.turn)
        await self._write(turns.keep_session, session=session, now=self.shop.clock.now())
        self._has_session = True

    async def _hear_question(self, asked: Asked) -> None:
        if self.turn.run.profile is Profile.RESUMABLE:
            if not self._has_session and self.turn.run.session is None:
                self._broken = "The agent asked without having named a session to resume."
                return
            await self._hear_last_word(asked)
            return
        if self._in_wait:
            self._broken = "The agent asked while its last question was open."
            return
        if self._said is not None:
            self._broken = SECOND_END
            return
        number = (await self._look()).interaction_count + 1
        self._in_wait = True  # before the commit: the reply may come right after it
        await self._write(
            turns.ask_and_stay,
            number=number,
            question=asked.question,
            due=self._wait_due(),
            now=self.shop.clock.now(),
        )
        self._log.info("execution.waiting")

    async def _hear_last_word(self, said: Asked | Succeeded) -> None:
        """Keep what ends the turn; what comes last counts. Some dialects allow but one."""
        if self._in_wait:
            self._broken = "The agent gave its result while its question was open."
            return
        if self._said is not None and self._engine.dialect.ends_once:
            if not await self.shop.in_thread(is_repeated, self._said, said):
                self._broken = SECOND_END
            return
        self._said = said

    def _wait_due(self) -> Due:
        """Return when a question that is asked now will have waited long enough."""
        run = self.turn.run
        own_s = run.session_timeout_s
        return self.shop.clock.due_in(own_s or self._engine.session_timeout_s)

    # -- speaking ------------------------------------------------------------------------------

    async def _greet(self, process: ShimmedProcess, opening: Opening) -> None:
        """Give the process its task, and with it the reply that it resumes by."""
        said = await self._say(process, opening.input[self.launch.given :])
        # Once it was read, not before: what lies in the pipe dies with the process, and a crash
        # gives it to another one. Who reads to the end of its input has read it by then.
        if self._resumed is not None:
            if said and await until_read(process.stdin.fileno()):
                await self._write(turns.delivered)
            else:
                self._news.put_nowait(_Signal.REPLY_LOST)
        if self.turn.run.profile is Profile.RESUMABLE:
            process.stdin.close()

    async def _hand_over_replies(self, process: ShimmedProcess) -> None:
        """Give a sticky process each reply as it is accepted.

        Beside the news, so that a cancel is heard while the process does not read.
        """
        while True:
            await self._replied.wait()
            self._replied.clear()
            if self._in_wait:  # else it was told twice, or was a resumed process's greeting
                await self._hand_over_reply(process)

    async def _hand_over_reply(self, process: ShimmedProcess) -> None:
        run = await self._look()
        reply = await self._log.retry_until_done(
            lambda: self.shop.storage.point(interactions.find, run.key, run.interaction_count)
        )
        accepted = reply is not None and reply.state is InteractionState.ANSWERED
        if reply is None or not accepted or run.status is not RunStatus.RUNNING:
            return
        self._in_wait = False
        if await self._say(process, self._engine.dialect.reply(reply)):
            await self._write(turns.delivered)
            self._handed_over.put_nowait(run.interaction_count)
        else:
            self._news.put_nowait(_Signal.REPLY_LOST)

    async def _see_replies_read(self, process: ShimmedProcess) -> None:
        """Notice a sticky process that closes its input with a reply in it. Apart from handing
        over: a process may read a reply long after its next question."""
        while True:
            number = await self._handed_over.get()
            if not await until_read(process.stdin.fileno()):
                await self._write(turns.undelivered, number=number)
                self._news.put_nowait(_Signal.REPLY_LOST)
                return

    async def _say(self, process: ShimmedProcess, line: bytes) -> bool:
        """Write a line to the process; False when it does not listen any more."""
        try:
            await write_all(process.stdin.fileno(), line)
        except (BrokenPipeError, ValueError):
            self._log.info("execution.input_refused")
            return False
        return True

    # -- listening -----------------------------------------------------------------------------

    async def _read_stdout(self, pipe: IO[bytes]) -> None:
        while data := await read(pipe.fileno()):
            self._is_parsing = True
            self._read_bytes += len(data)
            first, newline, more = data.partition(b"\n")
            self._begun.append(first)
            if newline:
                *lines, last = more.split(b"\n")
                lines = [b"".join(self._begun), *lines]
                self._begun = [last]
                await self._take_lines(lines)
            if sum(map(len, self._begun)) > self._engine.dialect.max_line_bytes:
                await self._refuse_line(b"".join(self._begun))
                return
            self._is_parsing = False
        if last := b"".join(self._begun):
            self._is_parsing = True
            self._begun = []
            await self._take_lines([last], end=b"")
        self._news.put_nowait(_Signal.STDOUT_ENDED)

    async def _refuse_line(self, line: bytes) -> None:
        await self._keep(OutputChannel.STDOUT, self._listener.redact(line))
        longest = self._engine.dialect.max_line_bytes
        self._news.put_nowait(_Broken(f"A line of the agent is longer than {longest} bytes."))

    async def _take_lines(self, lines: list[bytes], *, end: bytes = b"\n") -> None:
        """Keep what the lines say, then act on it."""
        longest = max(self._listener.buffered_bytes, *map(len, lines))
        if longest > LONG_LINE_BYTES:
            heard = await self.shop.in_thread(lambda: [self._understand(line) for line in lines])
        else:
            heard = [self._understand(line) for line in lines]
        await self._keep(OutputChannel.STDOUT, b"".join(shown + end for shown, _ in heard))
        for _, news in heard:
            for each in news:
                self._news.put_nowait(each)
        await self._news.join()  # an agent that floods us waits in its pipe

    def _understand(self, line: bytes) -> tuple[bytes, Sequence[_News]]:
        """Return what of a line may be kept and shown, and the news that it is."""
        try:
            heard = self._listener.hear(line)
        except ProtocolError as error:
            return self._listener.redact(line), [_Broken(f"The agent broke the protocol: {error}.")]
        return heard.redacted, [*heard.messages, _Wrote(heard.at_work)]

    async def _read_stderr(self, pipe: IO[bytes]) -> None:
        while data := await read(pipe.fileno()):
            self._is_keeping = True
            self._read_bytes += len(data)
            text = self._listener.redact(self._stderr_held + data)
            end = max(len(text) - max(self._listener.max_secret_bytes - 1, 0), 0)
            self._stderr_held = text[end:]  # a secret may come in two pieces
            await self._keep_stderr(text[:end])
            self._is_keeping = False
        held, self._stderr_held = self._stderr_held, b""
        await self._keep_stderr(held)
        self._news.put_nowait(_Signal.STDERR_ENDED)

    async def _keep_stderr(self, text: bytes) -> None:
        self._stderr_tail = (self._stderr_tail + text)[-STDERR_TAIL_BYTES:]
        await self._keep(OutputChannel.STDERR, text)

    async def _keep(self, channel: OutputChannel, data: bytes) -> None:
        run = self.turn.run
        if not data:
            return
        try:
            await self.shop.in_thread(self.shop.output.append, run.key, run.attempt, channel, data)
        except OSError as error:
            self._log.warning("execution.output_lost", channel=channel.value, error=error.strerror)

    async def _hear_shim(self, process: ShimmedProcess) -> None:
        events, process.unread_events = process.unread_events, []
        while True:
            for event in events:
                self._news.put_nowait(event)
            data = await read(process.report)
            if not data:
                break
            events = process.parse_report(data)
        self._news.put_nowait(_Signal.SHIM_GONE)

    # -- ending --------------------------------------------------------------------------------

    async def _end_tree(self) -> Ending:
        if self._emptied and not self._unsupervised:
            ending = NOTHING_LEFT  # the kernel told the shim so
        else:
            ending = await self.launch.end_tree(why=self._why_ended())
        if self._interrupted is None:
            return ending
        return ending.with_shim_kills(await self.shop.in_thread(self.launch.killed_by_shim))

    def _why_ended(self) -> str:
        reasons = {
            "canceled": self._canceled,
            "timed_out": self._timed_out is not None,
            "protocol_broken": self._broken is not None,
            "shim_lost": self._unsupervised,
            "reply_lost": self._undelivered,
        }
        return next((why for why, so in reasons.items() if so), "turn_over")

    def _observed(self) -> Observed:
        tail = self._stderr_tail
        if len(tail) == STDERR_TAIL_BYTES:  # it may begin inside a character
            tail = tail.lstrip(UTF8_CONTINUATION)
        told = tail.decode("utf-8", "replace").replace("\0", "").strip()
        exit_code = None if self._exited is None else self._exited.code
        return Observed(
            said=self._said,
            at_work=self._at_work,
            undelivered=self._undelivered,
            broken=self._broken,
            exit_code=exit_code,
            failure=self._listener.failure(exit_code, told),
            in_wait=self._in_wait,
            stderr_tail=told,
            interrupted=self._interrupted,
            unsupervised=self._unsupervised,
            timed_out=self._timed_out,
        )

    async def _demand_owned(self) -> None:
        """Ask whether the run is still ours before anything is done about its end: who took it over
        may have ended its processes. The write asks again, in its transaction.

        Raises:
            Fenced: a newer epoch of this instance has started.
        """
        storage, owner = self.shop.storage, self.shop.owner
        await self._log.retry_until_done(lambda: storage.point(instances.demand_current, owner))

    async def _distrust(self, end: TurnEnd) -> None:
        """Where the run ends with this turn, have no CLI trust its workspace any more. Whoever sees
        the end sees it done; what went wrong is the sweep's."""
        if isinstance(end, Asked | Interrupted) and not self._canceled:
            return
        run = self.turn.run
        try:
            if not await self.shop.storage.point(self.shop.trust.entries_of(run)):
                return
            done = await self.shop.in_thread(self.shop.trust.end, run)
        except Exception as error:  # noqa: BLE001 - whatever it was, the end must go on record
            self._log.warning("trust.not_cleared", **error_facts(error))
            return
        for reason in done.warnings:
            self._log.warning("trust.entry_kept", reason=reason)

    async def _mark(self, end: TurnEnd, *, gone: bool) -> SessionFingerprint | None:
        """Look at the session's file before the question is recorded, now that nothing writes to
        it: a restart then sees that it lacks nothing of the question. None if something may still
        write, or if there is no file where we look."""
        name = self.turn.run.engine
        catalog = self.shop.catalog
        sessions = catalog.get(name).sessions if name in catalog.names else None
        if sessions is None or not isinstance(end, Asked):
            return None
        if not gone:
            self._log.warning("execution.session_not_seen", reason=NOT_ENDED)
            return None
        session = (await self._look()).session
        if session is None:
            return None
        workspace = self.shop.output.workspace(self.turn.run.key, self.turn.run.attempt)
        stored = StoredHandle(handle=session.handle, workspace=workspace)
        seen = await fingerprint_session(sessions, stored, look_s=self.shop.look_s)
        if seen.fingerprint is None:
            reason = seen.finding.reason or SessionReason.NOT_ANSWERED
            self._log.warning("execution.session_not_seen", reason=reason.value)
        return seen.fingerprint

    async def _record(self, end: TurnEnd, ended: Ended) -> None:
        mark = await self._mark(end, gone=ended.gone)
        run = await self._log.retry_until_done(
            lambda: self.shop.storage.write(
                turns.end,
                self.turn,
                owner=self.shop.owner,
                end=end,
                ended=ended,
                # A resumable wait ends only where an automatic decision ends it.
                due=None if self.turn.run.require_user_reply else self._wait_due(),
                mark=mark,
                now=self.shop.clock.now(),
            )
        )
        usage = ended.usage
        self._log.info(
            "execution.turn_ended",
            status=run.status.value if run.status else None,
            error_code=run.error.code if run.error else None,
            exit_code=ended.exit_code,
            processes_ended=ended.processes_ended,
            cpu_s=None if usage is None else round((usage.user_us + usage.system_us) / 1e6, 3),
            max_rss_kib=None if usage is None else usage.max_rss_kib,
        )

    def _ended(self, ending: Ending) -> Ended:
        exited = self._exited
        if exited is None:
            return Ended(exit_code=None, processes_ended=ending.ended, gone=ending.gone)
        usage = Usage(
            user_us=exited.user_us, system_us=exited.system_us, max_rss_kib=exited.max_rss_kib
        )
        return Ended(
            exit_code=exited.code, processes_ended=ending.ended, gone=ending.gone, usage=usage
        )

    # -- tools ---------------------------------------------------------------------------------

    async def _write(self, use: Callable[..., object], **facts: object) -> None:
        storage, owner = self.shop.storage, self.shop.owner
        await self._log.retry_until_done(
            lambda: storage.write(use, self.turn, owner=owner, **facts)
        )


def _first_fenced(group: ExceptionGroup[Exception]) -> Fenced | None:
    found = group.subgroup(Fenced)
    while found is not None:
        first = found.exceptions[0]
        if isinstance(first, Fenced):
            return first
        found = first
    return None


def _defect() -> Failed:
    message = "The service failed while it followed the process; its log says how."
    return Failed(RunError(code=ErrorCode.INTERNAL_ERROR, message=message))
